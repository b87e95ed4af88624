"""An exponential moving average of the weights, kept beside training; in the end it is the result of training."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


EMA_FILE = "ema.safetensors"


class ExponentialMovingAverage(TrainerCallback):
    """
    Keeps `average = decay * average + (1 - decay) * weights` of the trained parameters, from the initial weights on,
    and puts it in their place when training ends. [`NoseTrainer`] takes one; it also evaluates, saves and restores it.

    Only parameters are averaged. Buffers, and with them the mask M, are the model's own at any time: an average of M
    would be a mask that no step was trained with.

    The average reaches back some 1 / (1 - decay) steps (25,000 for DeiT's 0.99996): longer than training, it mostly
    holds what training began with; longer than the tail at M = 0, it holds weights that still had attention beside
    them. Every process keeps the same average, because all hold the same weights after a step.

    Args:
        decay (`float`):
            In (0, 1).

    Raises:
        `ValueError`: for a decay out of range; on resuming, for a checkpoint without this average or of other weights.
    """

    def __init__(self, decay: float):
        if not 0 < decay < 1:
            raise ValueError(f"ema_decay must be in (0, 1), such as 0.9999, got {decay}.")
        self.decay = decay
        self.update = get_ema_multi_avg_fn(decay)
        self.average: dict[str, torch.Tensor] = {}
        # Where training goes on from, if it does: set by the Trainer.
        self.checkpoint: Path | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        self.average = {name: parameter.detach().clone() for name, parameter in trained_parameters(model).items()}
        if self.checkpoint is not None:
            self.restore(self.checkpoint / EMA_FILE)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        self.update(list(self.average.values()), list(trained_parameters(model).values()), None)

    @torch.no_grad()
    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        for name, parameter in trained_parameters(model).items():
            parameter.copy_(self.average[name])

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within the context `model` holds the average and this object its weights; then both have theirs again."""
        self.exchange(model)
        try:
            yield
        finally:
            self.exchange(model)

    @torch.no_grad()
    def exchange(self, model: nn.Module) -> None:
        """Exchanges average and weights in place, bit for bit, with memory for one parameter more."""
        for name, parameter in trained_parameters(model).items():
            weights = parameter.clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(weights)

    def save(self, checkpoint: Path) -> None:
        """Writes the average into a checkpoint."""
        save_file(self.average, checkpoint / EMA_FILE, metadata={"format": "pt"})

    def restore(self, file: Path) -> None:
        """Takes the average from a checkpoint, bit for bit."""
        if not file.is_file():
            raise ValueError(
                f"{file.parent.name} holds no {EMA_FILE}: it was written without an EMA. Resume without ema_decay, or "
                "train anew."
            )
        saved = load_file(file)
        own, given = ({name: tensor.shape for name, tensor in each.items()} for each in (self.average, saved))
        if own != given:
            raise ValueError(f"{EMA_FILE} of {file.parent.name} is of other weights than those being trained.")
        for name, tensor in saved.items():
            self.average[name].copy_(tensor)


def trained_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters that training may change; frozen ones, as under LoRA, are their own average."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
