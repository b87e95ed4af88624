"""Accuracy of any checkpoint, dense or compressed, on any data set."""

from __future__ import annotations

from typing import Any

from accelerate import PartialState

from .data import load_image_data
from .devices import choose_device
from .images import ImageBatches, ImageDataset, load_processor
from .launch import check_launch
from .metrics import evaluate_model
from .progress import Progress
from .weights import load_classifier


def evaluate_checkpoint(
    model: str,
    dataset: str,
    eval_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    max_eval_samples: int | None = None,
    eval_batch_size: int = 64,
    device: str = "auto",
    seed: int = 0,
) -> dict[str, Any]:
    """
    Evaluates `model` (a Hub id or folder of a ViT or NoseViT) on a whole split of `dataset`.

    Returns:
        `{"top1", "top5", "loss", "num_images", "notes"}`, accuracies as fractions, loss in nats.

    Raises:
        `ValueError`: where model or data cannot be used, see [`~hf_nose.data.load_image_data`].
    """
    target = choose_device(device)
    state = PartialState(cpu=target.type == "cpu")
    check_launch(state.num_processes)
    loaded = load_classifier(model)
    images, notes = evaluation_images(
        dataset,
        load_processor(model),
        loaded.num_labels,
        image_column=image_column,
        label_column=label_column,
        seed=seed,
        eval_split=eval_split,
        max_eval_samples=max_eval_samples,
    )
    with Progress(ImageBatches(images, eval_batch_size), "Evaluating", disable=not state.is_main_process) as batches:
        return {**evaluate_model(loaded, batches, target), "notes": notes}


def evaluation_images(
    dataset: str, processor: Any, num_labels: int | None = None, **options: Any
) -> tuple[ImageDataset, list[str]]:
    """
    The images that `dataset` evaluates on, or a sample of them, and what is to be noted of how they were found.

    Args:
        dataset, options: see [`~hf_nose.data.load_image_data`], whose errors these are.
        processor: the image processor of the model.
        num_labels (`int`, *optional*): labels must be below it.
    """
    data = load_image_data(dataset, evaluation_only=True, **options)
    columns = data.image_column, data.label_column
    return ImageDataset(data.evaluation, processor, *columns, num_labels=num_labels), data.notes
