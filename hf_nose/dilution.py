"""Dilution: train while the mask M falls from 1 to 0 and the attention of the selected layers fades out (Eq. 8, 9)."""

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .modeling_nose_vit import nose_vit
from .schedules import ORDERS, SCHEDULES, UNITS, scheduled_masks


class DilutionCallback(TrainerCallback):
    """
    Sets the mask M before every optimizer step (Eq. 8). It holds no state: M follows from the step, so a resumed run
    goes on along the same curve.

    Args:
        schedule (`str`, *optional*, defaults to `"linear"`):
            `"linear"`, `"cosine"`, or `"one_shot"`: M = 0 from the first step, for layers without compensation.
        decay (`float`, *optional*, defaults to 0.75):
            How long M falls: a fraction of training in (0, 1], or a whole number of units above 1. Then M stays 0.
        unit (`str`, *optional*, defaults to `"step"`):
            `"step"` or `"epoch"`: M changes with every step or is constant within an epoch.
        order (`str`, *optional*, defaults to `"together"`):
            `"together"`, or the layers one after another, in equal turns: `"ascending"` or `"descending"`.

    Raises:
        `ValueError`: for an option out of range; at the start of training for a decay longer than it, for a model
            without diluted layers, for `one_shot` with feature compensation, and for `load_best_model_at_end`.
    """

    def __init__(self, schedule: str = "linear", decay: float = 0.75, unit: str = "step", order: str = "together"):
        known_values = (("schedule", schedule, SCHEDULES), ("unit", unit, UNITS), ("order", order, ORDERS))
        for name, value, known in known_values:
            if value not in known:
                raise ValueError(f"{name} must be one of {known}, got {value!r}.")
        if schedule == "one_shot" and order != "together":
            raise ValueError(f"schedule='one_shot' removes all layers at once: it excludes order={order!r}.")
        self.schedule, self.decay, self.unit, self.order = schedule, decay, unit, order

    def masks_at(
        self, step: int, count: int, args: TrainingArguments, state: TrainerState, train_dataloader: Any
    ) -> list[float]:
        """M of each of `count` diluted layers at optimizer step `step`, from 0."""
        num_epochs = None
        if self.unit == "epoch":
            # `state.num_train_epochs` is rounded up, which would move the ends of epochs.
            num_epochs = state.max_steps / math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
        return scheduled_masks(
            self.schedule, self.decay, self.unit, step, state.max_steps, num_epochs, self.order, count
        )

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end would pick an early checkpoint, whose M is above 0: turn it off, the last "
                "model is the compressed one."
            )
        config = nose_vit(model).config
        if not config.diluted_attention_layers:
            raise ValueError("The model has no diluted layers: call model.dilute([...]) before training.")
        compensated = set(config.diluted_attention_layers) & set(config.compensated_attention_layers)
        if self.schedule == "one_shot" and compensated:
            raise ValueError(
                f"schedule='one_shot' removes at once, as f = x, but layers {sorted(compensated)} use feature "
                "compensation: dilute them with feature_compensation=False."
            )
        masks = self.masks_at(0, len(config.diluted_attention_layers), args, state, train_dataloader)
        if compensated and 0.0 in masks:
            raise ValueError(
                "M would be 0 from the first step on, which goes without feature compensation only: make the decay "
                "longer, count it in steps, or dilute with feature_compensation=False."
            )

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        count = len(nose_vit(model).config.diluted_attention_layers)
        nose_vit(model).set_mask(self.masks_at(state.global_step, count, args, state, train_dataloader))
