"""How work tells of its progress: a bar through batches, a bar through a training, and a training's pace."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.trainer_callback import ProgressCallback

from .images import ImageBatches
from .processes import place


class Progress(Sequence):
    """Batches under a progress bar that counts `rounds` times through this process's share of them."""

    def __init__(self, batches: ImageBatches, description: str, rounds: int = 1, disable: bool = False):
        self.batches = batches
        rank, world_size = place()
        share = len(range(rank, len(batches), world_size))
        self.bar = tqdm(total=rounds * share, desc=description, unit="batch", disable=disable)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Mapping[str, torch.Tensor]:  # type: ignore[override]
        batch = self.batches[index]
        self.bar.update()
        return batch

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()


class BarCallback(ProgressCallback):
    """One bar for a whole training, with the latest figures behind it, instead of a line for every log."""

    figures: dict[str, float]

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs is not None:
            shown = {name: logs[name] for name in ("loss", "mask", "eval_top1") if name in logs}
            self.figures = {**self.figures, **shown}
            self.training_bar.set_postfix({name: f"{value:.3f}" for name, value in self.figures.items()})

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.figures = {}
        super().on_train_begin(args, state, control, **kwargs)

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """No bar of its own: evaluations within a training are short."""


class Pace:
    """
    Images per second and seconds left, for every log line of a training. What happens between two lines (evaluation,
    checkpoints) counts, as it does for whoever waits.
    """

    def __init__(self) -> None:
        self._mark: tuple[int, float] | None = None

    def start(self, step: int) -> None:
        """Marks the beginning, at the first step that is trained; later calls change nothing."""
        if self._mark is None:
            self._mark = (step, time.perf_counter())

    def measure(self, step: int, max_steps: int, images_per_step: int) -> dict[str, float]:
        """
        Args:
            step (`int`): Steps that are done.
            max_steps (`int`): Steps of the whole training.
            images_per_step (`int`): Images of one step, over processes and accumulated batches.

        Returns:
            `images_per_s` and `seconds_left`; nothing where no step was trained since the last call.
        """
        if self._mark is None or step == self._mark[0]:
            return {}
        now, (before, started) = time.perf_counter(), self._mark
        self._mark = (step, now)
        seconds = (now - started) / (step - before)
        return {"images_per_s": images_per_step / seconds, "seconds_left": seconds * (max_steps - step)}
