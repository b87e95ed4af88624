"""Accuracy: an `evaluate` metric fed class ids, and the evaluation of a model on one process or several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object

from .processes import Batches, deal, place


TOP = 5
DESCRIPTION = "Top-1 and top-5 accuracy, as fractions of 1, computed from class ids."
INPUTS = """
Args:
    predictions: for each image the ids of its five most likely classes, the likeliest first, filled up with -1 where
        there are fewer classes; or only the likeliest id.
    references: for each image the id of its class, 0 or more.
Returns:
    top1: the fraction of images whose likeliest class is right.
    top5: the fraction of images whose class is among the five (left out where only one id was given).
"""


class TopKAccuracy(evaluate.Metric):
    """
    Top-1 and top-5 accuracy as fractions of 1, offline and usable in `evaluate.combine`.

    Fed class ids (see [`top5_ids`]), not logits: those of 50,000 images and 1,000 classes would take 200 MB and
    seconds. Feed it on one process after `gather_for_metrics`, with `keep_in_memory=True` if no file is to be written.

    `compute(predictions=..., references=...)` with predictions of shape (images, 5) gives `{"top1": float, "top5":
    float}`, with predictions of shape (images,) only `{"top1": float}`. It raises a `ValueError` where there are no
    images, predictions have another width, or references are negative.
    """

    def _info(self) -> evaluate.MetricInfo:
        integers = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=[
                datasets.Features({"predictions": datasets.List(integers), "references": integers}),
                datasets.Features({"predictions": integers, "references": integers}),
            ],
        )

    def _compute(self, predictions: Sequence, references: Sequence) -> dict[str, float]:
        ids, labels = torch.as_tensor(np.asarray(predictions)), torch.as_tensor(np.asarray(references))
        if len(labels) == 0:
            raise ValueError("`references` is empty; accuracy needs at least one image.")
        top1, top5 = count_hits(ids, labels)
        accuracies = {"top1": top1 / len(labels)}
        if ids.ndim == 2:
            accuracies["top5"] = top5 / len(labels)
        return accuracies


def top5_ids(logits: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    """
    Reduces logits to the ids of the five highest, for `Trainer(preprocess_logits_for_metrics=top5_ids)`.

    Args:
        logits (`torch.Tensor` of shape `(batch, classes)`): Of equal logits, the lower id comes first.
        labels (`torch.Tensor`, *optional*): Passed by the Trainer, not used.

    Returns:
        `torch.Tensor` of shape `(batch, 5)`, int64, filled up with -1 where there are fewer than five classes.
    """
    ids = logits.argsort(dim=-1, descending=True, stable=True)[:, :TOP]
    return F.pad(ids, (0, TOP - ids.shape[1]), value=-1)


def count_hits(ids: torch.Tensor, labels: torch.Tensor) -> tuple[int, int]:
    """Counts the images whose label is the first id, and those whose label is any of them."""
    if ids.ndim == 1:
        ids = ids[:, None]
    elif ids.ndim != 2 or ids.shape[1] != TOP:
        raise ValueError(f"`predictions` must have shape (images,) or (images, {TOP}), got {tuple(ids.shape)}.")
    if (labels < 0).any():
        raise ValueError(f"`references` must be 0 or more, got {int(labels.min())}: -1 marks a missing prediction.")
    hits = ids == labels[:, None]
    return int(hits[:, 0].sum()), int(hits.any(dim=1).sum())


def evaluate_model(model: torch.nn.Module, batches: Batches, device: torch.device | str) -> dict[str, Any]:
    """
    Evaluates a classifier. With several processes, whole batches are dealt to the ranks: no image is counted twice and
    every rank returns the numbers that one process would. On CPUs, `PartialState(cpu=True)` (or an `Accelerator` or
    `TrainingArguments` told to use the CPU) must come first: accelerate otherwise takes each process for the only one.

    Args:
        model (`torch.nn.Module`):
            Returns an object with `logits` of shape `(batch, classes)`. Moved to the device; its training mode is
            restored afterwards.
        batches (iterable of dicts with `pixel_values` and `labels`):
            The same on every rank. Of a sequence ([`~hf_nose.images.ImageBatches`]) each builds only its own batches;
            anything else is gone through in full.
        device (`torch.device` or `str`):
            Where to compute.

    Returns:
        `dict`: `top1` and `top5` (fractions of 1), `loss` (mean cross-entropy in nats), `num_images`.

    Raises:
        `FloatingPointError`: on every rank, where logits are not finite.
        `ValueError`: where there are no images.
    """
    model.to(device)
    dtype = next(model.parameters()).dtype
    training = model.training
    model.eval()
    counts: list[tuple[int, int, int, int, float]] = []
    broken: list[int] = []
    try:
        with torch.no_grad():
            for number, batch in deal(batches, *place()):
                logits = model(pixel_values=batch["pixel_values"].to(device, dtype)).logits.float()
                labels = batch["labels"].to(device)
                if not torch.isfinite(logits).all():
                    # Raised below, by all ranks together: one alone would leave the others waiting.
                    broken.append(number)
                    break
                top1, top5 = count_hits(top5_ids(logits), labels)
                loss = F.cross_entropy(logits, labels, reduction="sum")
                counts.append((number, len(labels), top1, top5, float(loss)))
    finally:
        model.train(training)

    broken = gather_object(broken)
    counts = gather_object(counts)
    if broken:
        raise FloatingPointError(
            f"The model's logits are not finite in evaluation batch {min(broken)} (from 0). Check the weights for "
            "NaN, and the dtype for overflow."
        )
    num_images = sum(count[1] for count in counts)
    if num_images == 0:
        raise ValueError("`batches` holds no images; evaluation needs at least one.")
    return {
        "top1": sum(count[2] for count in counts) / num_images,
        "top5": sum(count[3] for count in counts) / num_images,
        "loss": math.fsum(count[4] for count in counts) / num_images,  # exact, so the same in any order of ranks
        "num_images": num_images,
    }
