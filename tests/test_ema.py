"""The moving average of the weights: the recursion by hand, the mask never in it, and what a resume gives back."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_training import Images, arguments, differing, model, weights
from transformers import TrainerCallback

from hf_nose.augmentation import BatchAugmentation
from hf_nose.checkpoints import checkpoint_record, latest_whole_checkpoint
from hf_nose.dilution import DilutionCallback
from hf_nose.ema import EMA_FILE, ExponentialMovingAverage
from hf_nose.modeling_nose_vit import nose_vit
from hf_nose.training import NoseTrainer, fit


DECAY = 0.8


class Each(TrainerCallback):
    """The weights at the beginning and after every step; stops where told."""

    def __init__(self, stop=None):
        self.stop, self.seen, self.end = stop, [], None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.seen.append(weights(model))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(weights(model))
        if state.global_step == self.stop:
            raise KeyboardInterrupt


def train(folder, found, steps=8, decay=DECAY, resume=False, callbacks=(), **settings):
    diluted = nose_vit(found).config.diluted_attention_layers
    callbacks = [*([DilutionCallback()] if diluted else []), *callbacks]
    images, evaluation = Images(22, found.dtype), Images(6, found.dtype)
    options = {"learning_rate": 1e-2, "gradient_accumulation_steps": 2, **settings}
    args = arguments(folder, steps, **options)
    augmentation = BatchAugmentation(seed=3, shift=1, flip=True)
    return fit(
        found,
        images,
        evaluation,
        args,
        augmentation=augmentation,
        callbacks=callbacks,
        resume=resume,
        ema_decay=decay,
    )


def parameters(found):
    return {name: parameter.detach().clone() for name, parameter in found.named_parameters()}


def by_hand(seen, names, decay=DECAY):
    average = {name: seen[0][name].double() for name in names}
    for step in seen[1:]:
        average = {name: decay * average[name] + (1 - decay) * step[name].double() for name in names}
    return average


def accuracies(log):
    return [
        (line["step"], name, line[name]) for line in log for name in ("eval_top1", "eval_ema_top1") if name in line
    ]


# --- what is averaged ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.5, 0.99, 0.99996])
def test_the_result_is_the_recursion_from_the_initial_weights_on(tmp_path, decay):
    found, each = model([1, 2]).double(), Each()
    train(tmp_path, found, decay=decay, callbacks=[each])
    assert len(each.seen) == 9
    expected = by_hand(each.seen, dict(found.named_parameters()), decay)
    for name, parameter in parameters(found).items():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-12, atol=1e-14, msg=name)
    assert set(differing(weights(found), each.seen[-1])) == set(expected)


def test_training_itself_is_not_changed(tmp_path):
    """The weights of every step and their evaluations are those of a training without an average."""
    with_average, without = Each(), Each()
    one, other = (
        train(tmp_path / name, model([1, 2], drop_path_rate=0.2), decay=decay, callbacks=[each])
        for name, decay, each in (("one", DECAY, with_average), ("other", None, without))
    )
    for averaged, plain in zip(with_average.seen, without.seen, strict=True):
        assert differing(averaged, plain) == []
    names = ("loss", "eval_loss", "eval_top1", "learning_rate")
    assert [[line[name] for line in one["log"] if name in line] for name in names] == [
        [line[name] for line in other["log"] if name in line] for name in names
    ]


def test_the_mask_is_the_live_one_and_never_averaged(tmp_path):
    """While M falls, in evaluation of the average and in its checkpoint; at the end it is 0, and so is the flag."""
    found, seen = model([1, 2]), []

    class Evaluated(TrainerCallback):
        def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
            is_average = any(name.startswith("eval_ema") for name in metrics)
            vit = nose_vit(model)
            seen.append((state.global_step, is_average, vit.mask_values(), vit.is_mask_zero, parameters(model)))

    record = train(tmp_path, found, eval_steps=2, callbacks=[Evaluated()])
    masks = {line["step"]: line["mask"] for line in record["log"] if "loss" in line}
    assert [(step, is_average) for step, is_average, *_ in seen] == [
        (step, is_average) for step in (2, 4, 6, 8) for is_average in (False, True)
    ]
    for step, _, values, is_zero, _ in seen:
        assert values == pytest.approx([masks[step]] * 2) and is_zero == (masks[step] == 0.0)
    assert 0.0 < masks[2] < 1.0 and masks[8] == 0.0
    # Two models were evaluated at every step, and the last average is the result.
    for one, average in zip(seen[::2], seen[1::2], strict=True):
        assert all(not torch.equal(one[-1][name], average[-1][name]) for name in one[-1])
    assert differing(seen[-1][-1], parameters(found)) == []
    assert nose_vit(found).mask_values() == [0.0, 0.0] and nose_vit(found).is_mask_zero
    assert "vit.dilution_mask" not in load_file(tmp_path / "checkpoint-8" / EMA_FILE)


def test_the_average_is_evaluated_beside_the_weights(tmp_path):
    found, each, images = model(), Each(), Images(6)
    record = train(tmp_path, found, callbacks=[each])
    assert [(step, name) for step, name, _ in accuracies(record["log"])] == [
        (step, name) for step in (4, 8) for name in ("eval_top1", "eval_ema_top1")
    ]
    last = {name: value for line in record["log"] for name, value in line.items()}
    labels = torch.tensor(images.labels)
    result = parameters(found)
    for prefix, state in (("eval", each.seen[-1]), ("eval_ema", result)):
        found.load_state_dict(state)
        with torch.no_grad():
            logits = found.eval()(images.pixel_values).logits
        assert last[f"{prefix}_top1"] == pytest.approx(float((logits.argmax(-1) == labels).float().mean()))
        expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
        assert last[f"{prefix}_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_both_are_evaluated_at_the_end_whatever_the_interval(tmp_path):
    record = train(tmp_path, model(), steps=7, eval_steps=100)
    assert [(step, name) for step, name, _ in accuracies(record["log"])] == [(7, "eval_top1"), (7, "eval_ema_top1")]


def test_frozen_parameters_are_left_out(tmp_path):
    found = model()
    found.vit.requires_grad_(False)
    before = weights(found)
    train(tmp_path, found)
    assert set(differing(weights(found), before)) == {"classifier.weight", "classifier.bias"}
    assert set(load_file(tmp_path / "checkpoint-8" / EMA_FILE)) == {"classifier.weight", "classifier.bias"}


def test_an_average_of_bfloat16_training_is_in_float32(tmp_path):
    found = model([1])
    train(tmp_path, found, bf16=True)
    assert {tensor.dtype for tensor in load_file(tmp_path / "checkpoint-8" / EMA_FILE).values()} == {torch.float32}
    assert found.dtype == torch.float32


def test_exchanging_twice_gives_back_every_bit():
    found, ema = model([1], seed=1), ExponentialMovingAverage(DECAY)
    ema.on_train_begin(None, None, None, model=model([1], seed=2))
    before, average = weights(found), {name: tensor.clone() for name, tensor in ema.average.items()}
    with pytest.raises(KeyboardInterrupt), ema.applied(found):
        assert differing(parameters(found), average) == []
        assert all(torch.equal(ema.average[name], before[name]) for name in average)
        raise KeyboardInterrupt
    assert differing(weights(found), before) == [] and differing(ema.average, average) == []


# --- off -------------------------------------------------------------------------------------------------------------


def test_off_it_costs_nothing(tmp_path):
    found, each = model([1]), Each()
    record = train(tmp_path, found, decay=None, callbacks=[each])
    assert not any("ema" in name for line in record["log"] for name in line)
    assert not list(tmp_path.rglob("*ema*"))
    assert differing(weights(found), each.seen[-1]) == []
    run = NoseTrainer(model=model(), args=arguments(tmp_path), train_dataset=Images(), eval_dataset=Images(6))
    assert run.ema is None
    assert not any(isinstance(callback, ExponentialMovingAverage) for callback in run.callback_handler.callbacks)


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    found = model([1, 2], drop_path_rate=0.2)
    record = train(folder, found)
    return weights(found), record["log"], load_file(folder / "checkpoint-8" / EMA_FILE)


# Before the first checkpoint, inside an epoch of three steps, at its end, behind a checkpoint.
@pytest.mark.parametrize("stop", [2, 4, 6, 7])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, never_stopped, stop):
    expected, log, average = never_stopped
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, model([1, 2], drop_path_rate=0.2), callbacks=[Each(stop)])
    fresh = 0 if stop == 2 else 99
    found = model([1, 2], drop_path_rate=0.2, seed=fresh)
    record = train(tmp_path, found, resume=True)
    assert record["resumed_from"] == {2: None, 4: "checkpoint-3", 6: "checkpoint-3", 7: "checkpoint-6"}[stop]
    assert differing(weights(found), expected) == []
    assert differing(load_file(tmp_path / "checkpoint-8" / EMA_FILE), average) == []
    names = ("eval_loss", "eval_ema_loss", "eval_ema_top1")
    for name in names:
        assert [line[name] for line in record["log"] if name in line] == [line[name] for line in log if name in line]


def test_a_resume_of_a_finished_training_still_ends_with_the_average(tmp_path, never_stopped):
    """Killed between its last checkpoint and the record of the stage: the weights there are not the average."""
    expected, log, _ = never_stopped
    train(tmp_path, model([1, 2], drop_path_rate=0.2))
    found = model([1, 2], drop_path_rate=0.2, seed=99)
    record = train(tmp_path, found, resume=True)
    assert record["resumed_from"] == "checkpoint-8"
    assert differing(weights(found), expected) == []
    assert differing(load_file(tmp_path / "checkpoint-8" / "model.safetensors"), expected) != []
    assert accuracies(record["log"]) == accuracies(log)


def test_the_average_is_hashed_with_the_checkpoint(tmp_path, never_stopped, caplog):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, model([1, 2], drop_path_rate=0.2), callbacks=[Each(7)])
    assert EMA_FILE in checkpoint_record(tmp_path / "checkpoint-6")["files"]
    file = tmp_path / "checkpoint-6" / EMA_FILE
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert latest_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    found = model([1, 2], drop_path_rate=0.2)
    assert train(tmp_path, found, resume=True)["resumed_from"] == "checkpoint-3"
    assert f"{EMA_FILE} has changed" in caplog.text
    assert differing(weights(found), never_stopped[0]) == []


def test_a_checkpoint_without_an_average_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, model([1]), decay=None, callbacks=[Each(4)])
    with pytest.raises(ValueError, match="checkpoint-3 holds no ema.safetensors: it was written without an EMA"):
        train(tmp_path, model([1]), resume=True)


def test_an_average_of_other_weights_is_refused(tmp_path):
    ema = ExponentialMovingAverage(DECAY)
    for change in (lambda state: state.popitem(), lambda state: state.update(more=torch.zeros(2))):
        state = parameters(model())
        change(state)
        folder = tmp_path / "checkpoint-3"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        save_file(state, folder / EMA_FILE)
        ema.checkpoint = folder
        with pytest.raises(ValueError, match="ema.safetensors of checkpoint-3 is of other weights than those"):
            ema.on_train_begin(None, None, None, model=model())


def test_a_trainer_that_trains_anew_begins_its_average_anew(tmp_path):
    """What an earlier call resumed from is forgotten."""

    def run(folder):
        ema = ExponentialMovingAverage(DECAY)
        return NoseTrainer(
            model=model(),
            args=arguments(folder, learning_rate=1e-2),
            ema=ema,
            train_dataset=Images(),
            eval_dataset=Images(6),
        )

    run(tmp_path).train()
    resumed = run(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    start = parameters(resumed.model)
    for name, tensor in start.items():
        assert torch.equal(resumed.ema.average[name], tensor)
    resumed.train()
    assert json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())["global_step"] == 8
    assert resumed.ema.checkpoint is None


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_a_decay_out_of_range(decay):
    with pytest.raises(ValueError, match=r"ema_decay must be in \(0, 1\), such as 0.9999, got"):
        ExponentialMovingAverage(decay)


def test_the_best_model_and_the_average_exclude_each_other(tmp_path):
    options = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    args = arguments(tmp_path, save_steps=4, eval_steps=4, **options)
    with pytest.raises(ValueError, match="ema needs load_best_model_at_end and FSDP off"):
        NoseTrainer(
            model=model(),
            args=args,
            ema=ExponentialMovingAverage(DECAY),
            train_dataset=Images(),
            eval_dataset=Images(6),
        )
