"""The images that entropies and scores are measured on."""

from __future__ import annotations

import hashlib
from typing import Any

import datasets
import numpy as np
from transformers.image_processing_backends import PilBackend

from .data import ImageData
from .images import ImageBatches, ImageDataset, undecoded
from .streams import describe_row


# Images that a stream is shuffled through before calibration images are taken from it.
SHUFFLE_BUFFER = 4096
# Calibration images are gone through many times, so more of them are kept in memory than of an ordinary data set.
CALIBRATION_BYTES = 2**30


class SampledStream(ImageDataset):
    """Images that were taken from `source`, a stream, and go by their rows there."""

    def __init__(self, source: datasets.IterableDataset, *args: Any, **kwargs: Any) -> None:
        self.source = source
        super().__init__(*args, **kwargs)

    def describe_row(self, index: int) -> str:
        """Names a row for a message, after a search in the stream."""
        return describe_row(self.source, self.hf_dataset[int(index)])


class CalibrationSet(ImageBatches):
    """
    Calibration images as batches that can be gone through again and again (see [`calibration_batches`]).

    Attributes:
        num_images (`int`): How many images there are.
        sha256 (`str`): Hash over size, RGB pixels and label of every image, in order, before processing.
        notes (`list[str]`): What a reader of the results has to know.
    """

    def __init__(self, dataset: ImageDataset, batch_size: int, notes: list[str]) -> None:
        super().__init__(dataset, batch_size)
        self.notes = notes
        self.num_images = len(dataset)
        digest = hashlib.sha256()
        for index, label in enumerate(dataset.labels):
            image = dataset.decode(index)
            digest.update(f"{image.width}x{image.height} RGB {label}\n".encode())
            digest.update(image.tobytes())
        self.sha256 = digest.hexdigest()


def calibration_batches(
    data: ImageData, processor: PilBackend, num_images: int, batch_size: int, seed: int, num_labels: int
) -> CalibrationSet:
    """
    Draws the calibration images: a seeded, class-mixed sample of the training split, never of the evaluation images.

    A streamed training split goes through a shuffle buffer. With the same seed, fewer images are the first of more
    (streams excepted).

    Args:
        data (`ImageData`): The data set.
        processor (`PilBackend`): The checkpoint's image processor.
        num_images (`int`): How many images; where there are fewer, all are taken and a note says so.
        batch_size (`int`): Images a batch.
        seed (`int`): Seed of the sample.
        num_labels (`int`): Number of classes of the model.

    Raises:
        `ValueError`: where the set would be empty, or as [`ImageDataset`] does.
    """
    if num_images < 1:
        raise ValueError(f"`num_images` must be 1 or more, got {num_images}: the calibration set would be empty.")
    if isinstance(data.train, datasets.IterableDataset):
        stream = undecoded(data.train, [data.image_column], [data.label_column])
        shuffled = stream.shuffle(seed=seed, buffer_size=max(SHUFFLE_BUFFER, num_images))
        rows = list(shuffled.take(num_images))
        features = datasets.Features(
            {data.image_column: datasets.Image(decode=False), data.label_column: datasets.Value("int64")}
        )
        chosen = datasets.Dataset.from_list(rows, features=features, split=datasets.Split("calibration"))
    elif data.train is not None:
        order = np.random.default_rng(seed).permutation(len(data.train))
        chosen = data.train.select(order[:num_images])
    if data.train is None or len(chosen) == 0:
        raise ValueError(
            "`data` has no training images, so the calibration set would be empty. Calibration images come from the "
            "training split; load a data set that has one."
        )
    notes = []
    if len(chosen) < num_images:
        notes.append(f"{num_images} calibration images were asked for; all {len(chosen)} training images were taken")
    described = (chosen, processor, data.image_column, data.label_column, num_labels, CALIBRATION_BYTES)
    if isinstance(data.train, datasets.IterableDataset):
        images: ImageDataset = SampledStream(stream, *described)
    else:
        images = ImageDataset(*described)
    return CalibrationSet(images, batch_size, notes)
