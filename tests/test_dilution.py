"""M over training: a function of the step alone, in every log line, and no attention where it is 0."""

import pytest
import torch
from tiny_training import Images, arguments, model, weights
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_nose.dilution import DilutionCallback
from hf_nose.modeling_nose_vit import nose_vit
from hf_nose.schedules import scheduled_masks
from hf_nose.training import NoseTrainer


DILUTED = [1, 2]
STEPS = 12


class Watch(TrainerCallback):
    """What there was in each step: M, the gradients, and how often each attention was computed."""

    def __init__(self, watched):
        self.masks, self.epochs, self.calls, self.without_gradient = [], [], [], []
        self.counts = {}
        for layer, block in enumerate(nose_vit(watched).layers):
            block.attention.register_forward_hook(self.counter(layer))

    def counter(self, layer):
        def count(*args):
            self.counts[layer] = self.counts.get(layer, 0) + 1

        return count

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.counts.clear()
        self.epochs.append(int(state.epoch or 0))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.masks.append(nose_vit(model).mask_values())
        self.calls.append(dict(self.counts))
        self.without_gradient.append({name for name, found in model.named_parameters() if found.grad is None})


def train(folder, diluted, callback, steps=STEPS, epochs=None, count=22, resume=None, callbacks=(), **settings):
    watch = Watch(diluted)
    args = arguments(folder, steps, epochs, **settings)
    trainer = NoseTrainer(
        model=diluted,
        args=args,
        train_dataset=Images(count),
        eval_dataset=Images(6),
        callbacks=[callback, watch, *callbacks],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, watch


def begin(callback, found, state):
    callback.on_train_begin(TrainingArguments(output_dir="unused"), state, TrainerControl(), model=found)


def step(callback, found, state):
    callback.on_step_begin(None, state, TrainerControl(), model=found)
    return nose_vit(found).mask_values()


def test_a_mask_that_would_be_zero_at_once_goes_without_compensation(tmp_path):
    """A decay of one step, or of one epoch, is one_shot by another name."""
    short = {"decay": 1 / STEPS}
    with pytest.raises(ValueError, match="M would be 0 from the first step on"):
        train(tmp_path / "a", model(DILUTED), DilutionCallback("linear", **short))
    found = model([])
    found.dilute(DILUTED, feature_compensation=False)
    train(tmp_path / "b", found, DilutionCallback("linear", **short))


def test_the_mask_follows_the_step_whatever_came_before():
    callback, found = DilutionCallback("cosine", 0.5), model(DILUTED)
    masks = {}
    for order in (range(40), reversed(range(40)), [7, 3, 39, 0]):
        for number in order:
            value = step(callback, found, TrainerState(max_steps=40, global_step=number))
            assert value == pytest.approx(scheduled_masks("cosine", 0.5, "step", number, 40, count=2), abs=1e-7)
            assert masks.setdefault(number, value) == value
    assert vars(callback) == {"schedule": "cosine", "decay": 0.5, "unit": "step", "order": "together"}


def test_layers_fade_one_after_another():
    callback, found = DilutionCallback("linear", 0.5, order="descending"), model(DILUTED)
    assert step(callback, found, TrainerState(max_steps=40, global_step=9)) == [1.0, 0.0]
    assert step(callback, found, TrainerState(max_steps=40, global_step=10)) == [1.0, 0.0]
    assert step(callback, found, TrainerState(max_steps=40, global_step=19)) == [0.0, 0.0]


def test_one_shot_has_no_turns():
    with pytest.raises(ValueError, match="one_shot.*excludes order='ascending'"):
        DilutionCallback("one_shot", order="ascending")


def test_the_tail_is_exactly_zero_and_the_start_is_exactly_one(tmp_path):
    found = model(DILUTED)
    _, watch = train(tmp_path, found, DilutionCallback("linear", 0.5))
    assert watch.masks[0] == [1.0, 1.0]
    assert all(0.0 < value < 1.0 for value in watch.masks[4])
    assert watch.masks[5:] == [[0.0, 0.0]] * (STEPS - 5)
    assert nose_vit(found).is_mask_zero


def test_attention_at_zero_is_not_computed_and_gets_no_gradient(tmp_path):
    found = model(DILUTED)
    _, watch = train(tmp_path, found, DilutionCallback("linear", 0.5), gradient_accumulation_steps=2)
    gone = {
        name
        for name, _ in found.named_parameters()
        if any(f"layers.{layer}.{part}" in name for layer in DILUTED for part in ("attention", "layernorm_before"))
    }
    assert len(gone) == 2 * 10
    first_zero = watch.masks.index([0.0, 0.0])
    # No gradient is `None`: with zeros, AdamW's momentum and decay would go on moving these weights.
    assert watch.without_gradient == [set()] * first_zero + [gone] * (STEPS - first_zero)
    for masks, calls in zip(watch.masks, watch.calls, strict=True):
        assert set(calls) == ({0, 1, 2, 3} if any(masks) else {0, 3})


def test_weights_of_attention_stay_where_they_were_when_the_mask_reached_zero(tmp_path):
    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 5:
                self.before = weights(model)

    keep, found = Keep(), model(DILUTED)
    train(tmp_path, found, DilutionCallback("linear", 0.5), callbacks=[keep])
    for name, tensor in weights(found).items():
        still = any(
            f"layers.{layer}.{part}" in name for layer in DILUTED for part in ("attention", "layernorm_before")
        )
        assert torch.equal(tensor, keep.before[name]) == still, name


def test_the_mask_stands_in_every_log_line(tmp_path, capsys):
    class Lines(TrainerCallback):
        lines: list[dict] = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.lines.append(dict(logs))

    trainer, watch = train(tmp_path, model(DILUTED), DilutionCallback("linear", 0.75), callbacks=[Lines()])
    history = trainer.state.log_history
    assert len(history) == STEPS + STEPS // 4 + 1
    assert all("mask" in line for line in history)
    assert [line["mask"] for line in Lines.lines] == [line["mask"] for line in history]
    losses = [line for line in history if "loss" in line]
    # The M that a logged step was taken with.
    assert [line["mask"] for line in losses] == [pytest.approx(masks[0]) for masks in watch.masks]
    assert [line["step"] for line in losses] == list(range(1, STEPS + 1))
    assert {"eval_top1", "eval_top5", "eval_loss"} <= set(next(line for line in history if "eval_loss" in line))


def test_unequal_masks_are_logged_one_by_one(tmp_path):
    class Unequal(DilutionCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            nose_vit(model).set_mask([0.5, 0.25])

    trainer, _ = train(tmp_path, model(DILUTED), Unequal(), steps=2)
    for line in trainer.state.log_history:
        assert (line["mask"], line["mask_1"], line["mask_2"]) == (0.375, 0.5, 0.25)


def test_a_dense_training_logs_no_mask(tmp_path):
    trainer = NoseTrainer(
        model=model(), args=arguments(tmp_path, 2), train_dataset=Images(), eval_dataset=Images(6), callbacks=[]
    )
    trainer.train()
    assert not any("mask" in line for line in trainer.state.log_history)


def test_one_shot_is_zero_from_the_first_step(tmp_path):
    found = model(DILUTED, compensated=False)
    trainer, watch = train(tmp_path, found, DilutionCallback("one_shot"), steps=4)
    assert watch.masks == [[0.0, 0.0]] * 4
    assert all(set(calls) == {0, 3} for calls in watch.calls)
    assert all(line["mask"] == 0.0 for line in trainer.state.log_history)


def test_one_shot_with_compensation_is_refused():
    state = TrainerState(max_steps=10)
    with pytest.raises(ValueError, match=r"schedule='one_shot' .* layers \[1, 2\] use feature compensation"):
        begin(DilutionCallback("one_shot"), model(DILUTED), state)
    mixed = model([1], compensated=False)
    mixed.dilute([3], feature_compensation=True)
    with pytest.raises(ValueError, match=r"layers \[3\] use feature compensation"):
        begin(DilutionCallback("one_shot"), mixed, state)
    begin(DilutionCallback("one_shot"), model(DILUTED, compensated=False), state)


def test_a_model_without_diluted_layers_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no diluted layers: call model.dilute"):
        train(tmp_path, model(), DilutionCallback())


def test_a_decay_longer_than_training_is_refused_before_the_first_step(tmp_path):
    found = model(DILUTED)
    before = weights(found)
    with pytest.raises(ValueError, match="decay must be .*12.* got 13"):
        train(tmp_path, found, DilutionCallback("linear", 13))
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(found).items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "exponential"}, "schedule must be one of .*one_shot.* got 'exponential'"),
        ({"unit": "minute"}, "unit must be one of .*epoch.* got 'minute'"),
    ],
)
def test_unknown_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DilutionCallback(**options)


# 22 images in batches of 4 are 6 batches an epoch, the last one short: 6 steps, or 3 with two batches a step.
@pytest.mark.parametrize(
    ("length", "accumulation", "num_steps"),
    [
        ({"epochs": 4}, 1, 24),
        ({"epochs": 4}, 2, 12),
        ({"epochs": 2.5}, 1, 15),
        ({"steps": 20}, 1, 20),
        ({"steps": 11}, 2, 11),
    ],
)
def test_in_epochs_the_mask_is_constant_within_each(tmp_path, length, accumulation, num_steps):
    callback = DilutionCallback("linear", 1.0, unit="epoch")
    _, watch = train(tmp_path, model(DILUTED), callback, gradient_accumulation_steps=accumulation, **length)
    steps_per_epoch = 6 // accumulation
    assert watch.epochs == [number // steps_per_epoch for number in range(num_steps)]
    last = watch.epochs[-1]
    expected = [[pytest.approx(1 - epoch / last)] * 2 for epoch in watch.epochs]
    assert watch.masks == expected
    assert watch.masks[-1] == [0.0, 0.0]


def test_a_resumed_run_goes_on_along_the_same_curve(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    for unit in ("step", "epoch"):
        _, whole = train(tmp_path / unit / "whole", model(DILUTED), DilutionCallback(unit=unit), steps=15)
        folder = tmp_path / unit / "cut"
        with pytest.raises(KeyboardInterrupt):
            train(folder, model(DILUTED), DilutionCallback(unit=unit), steps=15, callbacks=[Stop()])
        checkpoint = str(folder / "checkpoint-3")
        _, rest = train(folder, model(DILUTED), DilutionCallback(unit=unit), steps=15, resume=checkpoint)
        assert rest.masks == whole.masks[3:]


class Wrapper(nn.Module):
    """A model around the model, as UperNet, peft or DDP are."""

    def __init__(self, inner):
        super().__init__()
        self.inner = nn.ModuleDict({"classifier": inner})
        # The Trainer looks for it.
        self.config = inner.config

    def forward(self, pixel_values, labels=None):
        return self.inner["classifier"](pixel_values, labels=labels)


def test_the_model_is_found_inside_a_wrapper(tmp_path):
    wrapped = Wrapper(model(DILUTED))
    trainer, watch = train(tmp_path, wrapped, DilutionCallback("linear", 0.5))
    assert watch.masks[0] == [1.0, 1.0]
    assert watch.masks[5:] == [[0.0, 0.0]] * (STEPS - 5)
    assert all("mask" in line for line in trainer.state.log_history)


def test_none_or_two_models_inside_are_refused():
    state = TrainerState(max_steps=10)
    with pytest.raises(ValueError, match="exactly one NoseViTModel, Linear holds 0"):
        begin(DilutionCallback(), nn.Linear(2, 2), state)
    with pytest.raises(ValueError, match="exactly one NoseViTModel, ModuleList holds 2"):
        begin(DilutionCallback(), nn.ModuleList([model(DILUTED), model(DILUTED)]), state)


def test_the_best_model_at_the_end_is_refused_by_the_callback_too():
    """A stock Trainer with this callback would load an early checkpoint with M near 1."""
    arguments = TrainingArguments(
        output_dir="unused",
        load_best_model_at_end=True,
        eval_strategy="steps",
        save_steps=500,
        eval_steps=500,
        save_strategy="steps",
    )
    with pytest.raises(ValueError, match="load_best_model_at_end would pick an early checkpoint"):
        DilutionCallback().on_train_begin(arguments, TrainerState(max_steps=10), TrainerControl(), model=model([1]))
