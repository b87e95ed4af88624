"""Training that can be trusted: what changes, what stops it, and what a resume gives back bit for bit."""

import json
import logging
import math

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import Images, arguments, differing, halves, model, weights, zero_logits
from transformers import TrainerCallback

from hf_nose import checkpoints
from hf_nose.augmentation import BatchAugmentation
from hf_nose.checkpoints import STAGING, checkpoint_record, latest_whole_checkpoint, steps_from_last
from hf_nose.dilution import DilutionCallback
from hf_nose.mixing import Mixing
from hf_nose.modeling_nose_vit import nose_vit
from hf_nose.training import NoseTrainer, fit


def train(folder, found, steps=8, images=None, augmentation=None, callbacks=(), resume=False, mixing=None, **settings):
    """Trains through `fit`, as the main job does."""
    callbacks = [*([DilutionCallback()] if nose_vit(found).config.diluted_attention_layers else []), *callbacks]
    images = Images() if images is None else images
    evaluation = Images(6, images.pixel_values.dtype)
    args = arguments(folder, steps, **settings)
    return fit(
        found,
        images,
        evaluation,
        args,
        augmentation=augmentation,
        mixing=mixing,
        callbacks=callbacks,
        resume=resume,
    )


def trainer(folder, found, **settings):
    return NoseTrainer(model=found, args=arguments(folder, **settings), train_dataset=Images(), eval_dataset=Images(6))


class At(TrainerCallback):
    """Does something when a step has ended."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.action(model, control)


def interrupt(model, control):
    raise KeyboardInterrupt


# --- what training changes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("diluted", [[], [1, 2]])
def test_every_parameter_that_should_change_changes(tmp_path, diluted):
    found = model(diluted)
    before = weights(found)
    record = train(tmp_path, found, steps=4)
    same = {name for name, tensor in weights(found).items() if torch.equal(tensor, before[name])}
    assert same == set()
    assert record["steps"] == 4
    assert [line["step"] for line in record["log"] if "loss" in line] == [1, 2, 3, 4]


def test_training_learns(tmp_path):
    record = train(tmp_path, model(), steps=60, learning_rate=1e-2, save_steps=60, eval_steps=60, label_smoothing=0.0)
    losses = [line["loss"] for line in record["log"] if "loss" in line]
    assert math.fsum(losses[-5:]) < 0.5 * math.fsum(losses[:5])
    assert next(line for line in record["log"] if "eval_top1" in line)["eval_top1"] == 1.0


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_loss_and_weights_do_not_depend_on_gradient_accumulation(tmp_path, label_smoothing):
    def run(batch_size, accumulation):
        found = model([1], drop_path_rate=0.0).double()
        record = train(
            tmp_path / str(accumulation),
            found,
            images=Images(24, torch.float64),
            steps=8,
            batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            label_smoothing=label_smoothing,
            optim="sgd",
            learning_rate=0.1,
        )
        return [line["loss"] for line in record["log"] if "loss" in line], weights(found)

    (one, weights_of_one), *others = (run(*sizes) for sizes in ((8, 1), (4, 2), (2, 4)))
    for losses, found in others:
        assert losses == pytest.approx(one, rel=1e-6)
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, weights_of_one[name], rtol=1e-9, atol=1e-12, msg=name)


def test_label_smoothing_is_that_of_cross_entropy(tmp_path):
    images, found = Images(4, torch.float64), model().double()
    labels = torch.tensor(images.labels)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(found(images.pixel_values).logits, labels, label_smoothing=0.1)
    record = train(tmp_path, found, steps=1, images=images, label_smoothing=0.1)
    assert record["log"][0]["loss"] == pytest.approx(float(expected), rel=1e-6)


def test_weight_decay_spares_norms_biases_class_token_and_positions(tmp_path):
    found = model([1])
    decayed = set(trainer(tmp_path, found).get_decay_parameter_names(found))
    matrices = {name for name, parameter in found.named_parameters() if parameter.ndim >= 2}
    assert decayed == matrices - {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"}
    assert "vit.layers.1.attention.q_proj.weight" in decayed


def test_augmentation_is_given_its_place_in_training(tmp_path):
    places = []

    def record(pixel_values, step, micro_step, rank):
        places.append((step, micro_step, rank))
        return pixel_values

    train(tmp_path, model(), steps=4, gradient_accumulation_steps=2, augmentation=record)
    # 22 images in batches of 4: the sixth batch of an epoch ends a step of two.
    assert places == [(step, micro_step, 0) for step in range(4) for micro_step in range(2)]


# --- soft targets ----------------------------------------------------------------------------------------------------


def losses(record):
    return [line["loss"] for line in record["log"] if "loss" in line]


@pytest.mark.parametrize(("num_labels", "label_smoothing"), [(3, 0.0), (700, 0.1)])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("options", [{}, {"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}], ids=str)
def test_the_loss_of_zero_logits_is_the_log_of_the_classes(
    tmp_path, num_labels, label_smoothing, accumulation, options
):
    """In every step: at a learning rate of next to nothing the logits stay. An epoch ends in a smaller batch."""
    mixing = Mixing(num_labels, **options) if options else None
    rate = {"learning_rate": 1e-12, "min_learning_rate": 1e-12}
    sizes = {"gradient_accumulation_steps": accumulation, "label_smoothing": label_smoothing}
    record = train(tmp_path, zero_logits(num_labels), steps=7, mixing=mixing, **rate, **sizes)
    assert losses(record) == pytest.approx([math.log(num_labels)] * 7, rel=1e-6)
    assert [line["eval_loss"] for line in record["log"] if "eval_loss" in line] == pytest.approx(
        [math.log(num_labels)] * 2, rel=1e-6
    )


def test_the_loss_is_the_soft_cross_entropy_of_the_mixed_images(tmp_path):
    images, found, mixing = Images(4, torch.float64), model().double(), Mixing(3, mixup=0.8, seed=5)
    run = NoseTrainer(
        model=found,
        args=arguments(tmp_path, 1, label_smoothing=0.2),
        mixing=lambda *tensors, **place: seen.append(mixing(*tensors, **place)) or seen[-1],
        train_dataset=images,
        eval_dataset=Images(6),
    )
    seen, before = [], weights(found)
    run.train()
    ((mixed, targets),) = seen
    found.load_state_dict(before)
    with torch.no_grad():
        logs = torch.log_softmax(found(mixed).logits, -1)
    smoothed = 0.8 * targets.double() + 0.2 / 3
    assert targets.gt(0).sum(1).max() == 2
    assert run.state.log_history[0]["loss"] == pytest.approx(float(-(smoothed * logs).sum(1).mean()), rel=1e-6)


def test_mixing_is_given_its_place_in_training_and_the_augmented_images(tmp_path):
    places = []

    def mixing(pixel_values, labels, **place):
        places.append(place)
        assert pixel_values.eq(place["step"]).all()
        return one_hot(pixel_values, labels)

    options = {"mixing": mixing, "augmentation": lambda pixel_values, step, **place: 0 * pixel_values + step}
    train(tmp_path, model(), steps=3, gradient_accumulation_steps=2, **options)
    assert places == [{"step": step, "micro_step": micro, "rank": 0} for step in range(3) for micro in range(2)]


def one_hot(pixel_values, labels, **place):
    """A mixing that mixes nothing."""
    return pixel_values, torch.nn.functional.one_hot(labels, 3).float()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_soft_targets_of_one_class_train_as_its_id(tmp_path, label_smoothing):
    def run(mixing):
        found = model([1]).double()
        options = {"label_smoothing": label_smoothing, "learning_rate": 0.1, "optimizer": "sgd"}
        images = Images(22, torch.float64)
        record = train(tmp_path / str(mixing), found, images=images, mixing=mixing, **options)
        return losses(record), weights(found)

    (soft, of_soft), (hard, of_hard) = run(one_hot), run(None)
    assert soft == pytest.approx(hard, rel=1e-6)
    for name, tensor in of_hard.items():
        torch.testing.assert_close(of_soft[name], tensor, rtol=1e-9, atol=1e-12, msg=name)


def test_loss_and_weights_under_soft_targets_do_not_depend_on_gradient_accumulation(tmp_path):
    def run(batch_size, accumulation):
        found = model([1]).double()
        sizes = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        options = {"optimizer": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
        folder = tmp_path / str(accumulation)
        # 22 images: the last step of an epoch has six, which come in batches of four and two, or of two.
        record = train(folder, found, images=Images(22, torch.float64), mixing=halves, **sizes, **options)
        return losses(record), weights(found)

    (one, weights_of_one), *others = (run(*sizes) for sizes in ((8, 1), (4, 2), (2, 4)))
    for found, of_found in others:
        assert found == pytest.approx(one, rel=1e-6)
        for name, tensor in of_found.items():
            torch.testing.assert_close(tensor, weights_of_one[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("problem_type", [None, "single_label_classification"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixing", [None, Mixing(3, mixup=0.8, cutmix=1.0)], ids=["class ids", "mixed"])
def test_training_never_changes_the_problem_type(tmp_path, problem_type, label_smoothing, mixing):
    found = model()
    found.config.problem_type = problem_type
    train(tmp_path, found, steps=4, mixing=mixing, label_smoothing=label_smoothing)
    assert found.config.problem_type == problem_type
    saved = json.loads((tmp_path / "checkpoint-4" / "config.json").read_text())
    assert saved.get("problem_type") == problem_type


def test_images_of_several_gpus_in_one_process_are_counted_together(tmp_path):
    """The Trainer gives every GPU its share of the images, as (GPUs, 1)."""
    found, images = zero_logits(), Images(8)
    inputs = {"pixel_values": images.pixel_values, "labels": torch.tensor(images.labels)}
    run = trainer(tmp_path, found)
    for count in (None, 8, torch.tensor(8), torch.tensor([[4], [4]])):
        loss, outputs = run.label_loss(found, inputs, count)
        assert loss.item() == pytest.approx(math.log(3), rel=1e-6) and outputs.logits.shape == (8, 3)
    assert "labels" in inputs


# --- what is refused, and what stops it ------------------------------------------------------------------------------


def test_the_best_model_may_not_be_chosen_while_layers_are_diluted(tmp_path):
    with pytest.raises(ValueError, match=r"load_best_model_at_end would pick .* layers \[1, 2\] still have M > 0"):
        trainer(tmp_path, model([1, 2]), load_best_model_at_end=True)


def test_the_best_dense_model_is_loaded_at_the_end(tmp_path):
    options = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}

    def spoil(model, control):
        with torch.no_grad():
            model.classifier.weight.mul_(-5)

    found = model()
    run = NoseTrainer(
        model=found,
        args=arguments(tmp_path, 9, save_steps=3, eval_steps=3, **options),
        train_dataset=Images(),
        eval_dataset=Images(6),
        callbacks=[At(4, spoil)],
    )
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")
    assert not list(tmp_path.glob(f"{STAGING}*"))
    saved = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert differing(weights(found), saved) == []


def test_the_best_dense_model_is_remembered_by_a_resume(tmp_path):
    options = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}

    def run(action):
        return NoseTrainer(
            model=model(),
            args=arguments(tmp_path, 6, save_steps=3, eval_steps=3, learning_rate=1e-1, **options),
            train_dataset=Images(),
            eval_dataset=Images(6),
            callbacks=[At(4, action)],
        )

    def spoil(model, control):
        with torch.no_grad():
            model.classifier.weight.mul_(-50)

    with pytest.raises(KeyboardInterrupt):
        run(interrupt).train()
    resumed = run(spoil)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")
    assert differing(weights(resumed.model), load_file(tmp_path / "checkpoint-3" / "model.safetensors")) == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_with_the_step(tmp_path, value):
    def poison(pixel_values, step, micro_step, rank):
        return pixel_values * value if step == 5 else pixel_values

    found = model()
    with pytest.raises(FloatingPointError, match=r"The loss is (nan|inf) at step 5\. Training stops"):
        train(tmp_path, found, augmentation=poison)
    # No step was taken with it.
    assert all(tensor.isfinite().all() for tensor in weights(found).values())
    assert latest_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    assert [path.name for path in steps_from_last(tmp_path)] == ["checkpoint-3"]


def test_a_loss_that_is_not_finite_is_found_in_every_accumulated_batch(tmp_path):
    def poison(pixel_values, step, micro_step, rank):
        return pixel_values * math.nan if (step, micro_step) == (2, 0) else pixel_values

    with pytest.raises(FloatingPointError, match="at step 2"):
        train(tmp_path, model(), gradient_accumulation_steps=2, augmentation=poison)


@pytest.mark.parametrize(
    ("step", "last"), [(6, "checkpoint-3"), (8, "checkpoint-6")], ids=["at a checkpoint", "at the end"]
)
def test_weights_that_are_not_finite_are_never_saved(tmp_path, step, last):
    def spoil(model, control):
        with torch.no_grad():
            model.vit.layers[2].mlp.fc1.weight[0, 0] = math.inf

    with pytest.raises(FloatingPointError, match=rf"layers\.2\.mlp\.fc1\.weight is not finite at step {step}"):
        train(tmp_path, model(), callbacks=[At(step, spoil)])
    assert latest_whole_checkpoint(tmp_path) == tmp_path / last
    assert steps_from_last(tmp_path)[0] == tmp_path / last
    assert not (tmp_path / STAGING).exists()


def test_a_training_that_returned_early_is_refused(tmp_path):
    def stop(model, control):
        control.should_training_stop = True

    with pytest.raises(RuntimeError, match=r"Training ended at step 4 of 8\. Continue with --resume"):
        train(tmp_path, model(), callbacks=[At(4, stop)])


def test_a_resume_after_an_early_return_finishes(tmp_path):
    def stop(model, control):
        control.should_training_stop = control.should_save = True

    with pytest.raises(RuntimeError):
        train(tmp_path, model(), callbacks=[At(4, stop)])
    assert train(tmp_path, model(), resume=True)["resumed_from"] == "checkpoint-4"


def test_fewer_images_than_a_step_takes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="The training data have 7 images, fewer than the 8 of one step"):
        train(tmp_path, model(), images=Images(7), gradient_accumulation_steps=2)
    train(tmp_path, model(), steps=1, images=Images(8), gradient_accumulation_steps=2)


# --- checkpoints and resuming ----------------------------------------------------------------------------------------

HARD = {"gradient_accumulation_steps": 2, "learning_rate": 1e-2}


def hard_model():
    """Everything that draws: stochastic depth, beside the augmentation and the order of images."""
    return model([1, 2], drop_path_rate=0.2)


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    found = hard_model()
    augmentation = BatchAugmentation(seed=3, shift=1, flip=True)
    record = train(tmp_path_factory.mktemp("whole"), found, augmentation=augmentation, **HARD)
    return weights(found), record["log"]


def test_two_checkpoints_are_kept_and_hold_what_ran(tmp_path):
    train(tmp_path, model(), steps=10)
    assert [path.name for path in steps_from_last(tmp_path)] == ["checkpoint-10", "checkpoint-9"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]
    record = checkpoint_record(tmp_path / "checkpoint-9")
    assert (record["step"], record["threads"], record["world_size"]) == (9, torch.get_num_threads(), 1)
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= set(
        record["files"]
    )


# A stop inside an epoch of three steps, at its end, and right behind a checkpoint.
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [4, 6, 7])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, never_stopped, stop, workers):
    expected, log = never_stopped
    options = {**HARD, "num_workers": workers}
    with pytest.raises(KeyboardInterrupt):
        augmentation = BatchAugmentation(seed=3, shift=1, flip=True)
        train(tmp_path, hard_model(), augmentation=augmentation, callbacks=[At(stop, interrupt)], **options)
    torch.manual_seed(99)
    found = model([1, 2], drop_path_rate=0.2, seed=99)
    augmentation = BatchAugmentation(seed=3, shift=1, flip=True)
    record = train(tmp_path, found, augmentation=augmentation, resume=True, **options)
    assert record["resumed_from"] == ("checkpoint-6" if stop == 7 else "checkpoint-3")
    assert differing(weights(found), expected) == []
    for name in ("loss", "mask", "learning_rate", "eval_loss", "eval_top1"):
        assert [line[name] for line in record["log"] if name in line] == [line[name] for line in log if name in line]


def test_a_resume_without_augmentation_would_be_noticed(tmp_path, never_stopped):
    found = hard_model()
    train(tmp_path, found, **HARD)
    assert differing(weights(found), never_stopped[0]) != []


EVERYTHING = {"shift": 1, "flip": True, "rand_augment": 9.0, "random_erasing": 0.5, "color_jitter": 0.4}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stop", [4, 7])
def test_a_resume_draws_the_same_augmentation_and_mixing(tmp_path, stop, accumulation):
    def run(folder, found, resume=False, callbacks=()):
        augmentation = BatchAugmentation(seed=3, mean=(0.5,) * 3, std=(0.5,) * 3, **EVERYTHING)
        mixing = Mixing(3, mixup=0.8, cutmix=1.0, seed=3)
        settings = {"gradient_accumulation_steps": accumulation, "learning_rate": 1e-2}
        return train(folder, found, 8, None, augmentation, callbacks, resume, mixing, **settings)

    whole = hard_model()
    log = run(tmp_path / "whole", whole)["log"]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", hard_model(), callbacks=[At(stop, interrupt)])
    torch.manual_seed(99)
    resumed = model([1, 2], drop_path_rate=0.2, seed=99)
    record = run(tmp_path / "stopped", resumed, resume=True)
    assert record["resumed_from"] == ("checkpoint-6" if stop == 7 else "checkpoint-3")
    assert differing(weights(resumed), weights(whole)) == []
    assert losses(record) == losses({"log": log})


def test_a_resume_restores_the_encoder_bit_for_bit(tmp_path):
    class Begin(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.weights, self.step = weights(model), state.global_step

    begin = Begin()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, model([1, 2]), callbacks=[At(5, interrupt)])
    train(tmp_path, model([1, 2], seed=99), callbacks=[begin], resume=True)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "again", model([1, 2]), callbacks=[At(5, interrupt)])
    saved = load_file(tmp_path / "again" / "checkpoint-3" / "model.safetensors")
    assert begin.step == 3
    assert any("layers.3.mlp" in name for name in saved)
    assert differing(begin.weights, saved) == []


def test_a_mask_that_had_reached_zero_is_zero_after_a_resume(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, model([1, 2]), callbacks=[At(7, interrupt)])

    class Begin(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.found = nose_vit(model).mask_values(), nose_vit(model).is_mask_zero

    begin = Begin()
    train(tmp_path, model([1, 2]), callbacks=[begin], resume=True)
    assert begin.found == ([0.0, 0.0], True)


# Killed between its last checkpoint and the record of the stage. 8 steps end inside an epoch of 6, 12 at its end.
@pytest.mark.parametrize("steps", [8, 12])
def test_a_resume_of_a_finished_training_changes_nothing(tmp_path, steps):
    found = model([1, 2])
    first = train(tmp_path, found, steps=steps)
    again = model([1, 2], seed=99)
    record = train(tmp_path, again, steps=steps, resume=True)
    assert record["steps"] == steps
    assert differing(weights(again), weights(found)) == []
    assert steps_from_last(tmp_path)[0].name == f"checkpoint-{steps}"
    losses = [[line["loss"] for line in each["log"] if "loss" in line] for each in (first, record)]
    assert losses[0] == losses[1]


def test_a_damaged_checkpoint_is_passed_over_and_the_bits_are_the_same(tmp_path, never_stopped, caplog):
    augmentation = BatchAugmentation(seed=3, shift=1, flip=True)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, hard_model(), augmentation=augmentation, callbacks=[At(7, interrupt)], **HARD)
    file = tmp_path / "checkpoint-6" / "optimizer.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    found = hard_model()
    record = train(tmp_path, found, augmentation=augmentation, resume=True, **HARD)
    assert record["resumed_from"] == "checkpoint-3"
    assert "Passing over checkpoint-6" in caplog.text
    assert "optimizer.pt" in caplog.text
    assert differing(weights(found), never_stopped[0]) == []


def test_the_trainer_alone_looks_before_it_resumes(tmp_path):
    """Resuming without `fit`, as anyone who uses the Trainer does: `True` takes the last whole checkpoint."""
    with pytest.raises(ValueError, match="whole checkpoint"):
        trainer(tmp_path, model()).train(resume_from_checkpoint=True)
    trainer(tmp_path, model(), steps=7).train()
    (tmp_path / "checkpoint-7" / "scheduler.pt").unlink()
    run = trainer(tmp_path, model(), steps=8)
    run.train(resume_from_checkpoint=True)
    assert run._initial_global_step == 6
    (tmp_path / "checkpoint-8" / "scheduler.pt").unlink()
    with pytest.raises(ValueError, match=r"scheduler\.pt is missing"):
        trainer(tmp_path, model()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_the_same_trainer_can_go_on_after_an_interruption(tmp_path, never_stopped):
    """In a notebook: Ctrl-C between two accumulated batches, then `trainer.train(resume_from_checkpoint=True)`."""
    draw = BatchAugmentation(seed=3, shift=1, flip=True)
    armed = [True]

    def augmentation(pixel_values, step, micro_step, rank):
        if armed and (step, micro_step) == (3, 1):
            armed.clear()
            raise KeyboardInterrupt
        return draw(pixel_values, step, micro_step, rank)

    found = hard_model()
    run = NoseTrainer(
        model=found,
        args=arguments(tmp_path, 8, **HARD),
        augmentation=augmentation,
        train_dataset=Images(),
        eval_dataset=Images(6),
        callbacks=[DilutionCallback()],
    )
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.train(resume_from_checkpoint=True)
    assert differing(weights(found), never_stopped[0]) == []


def test_a_resume_under_another_thread_count_says_so(tmp_path, caplog):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, model(), callbacks=[At(4, interrupt)])
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with caplog.at_level(logging.WARNING):
            record = train(tmp_path, model(), steps=5, resume=True)
    finally:
        torch.set_num_threads(threads)
    assert f"Resuming with threads = {threads + 1} what ran with {threads}" in caplog.text
    assert record["threads"] == threads + 1


def test_a_resume_on_another_number_of_processes_is_refused(tmp_path, monkeypatch):
    """A step would take other images, and an epoch have other steps: M would jump, and images be left out."""
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, model(), callbacks=[At(4, interrupt)])
    read = checkpoints.checkpoint_record
    monkeypatch.setattr(checkpoints, "checkpoint_record", lambda folder: read(folder) | {"world_size": 2})
    with pytest.raises(ValueError, match="Training ran on 2 processes or GPUs and cannot go on with 1"):
        train(tmp_path, model(), steps=8, resume=True)


def test_pixels_are_not_moved_without_their_labels(tmp_path):
    data = {"train_dataset": Images(), "eval_dataset": Images(6)}
    moving = NoseTrainer(model=model(), args=arguments(tmp_path), augmentation=BatchAugmentation(flip=True), **data)
    batch = {"pixel_values": torch.zeros(2, 3, 8, 8), "labels": torch.zeros(2, 8, 8, dtype=torch.long)}
    with pytest.raises(ValueError, match="moves pixels and not the labels of each"):
        moving.training_step(moving.model, batch)


def test_a_resume_under_the_same_thread_count_says_nothing(tmp_path, caplog):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, model(), callbacks=[At(4, interrupt)])
    train(tmp_path, model(), steps=8, resume=True)
    assert [message for message in caplog.messages if "Resuming" in message or "Passing" in message] == []


def test_without_resume_old_checkpoints_are_not_used(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, model(), callbacks=[At(4, interrupt)])
    assert train(tmp_path, model())["resumed_from"] is None
