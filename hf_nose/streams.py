"""Training images from a stream: every one once an epoch, the same after a resume, by any number of workers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol

import datasets
import fsspec.asyn
import torch
from transformers.image_processing_backends import PilBackend

from .crops import RandomResizedCrop
from .images import check_label, check_shape, name_row, prepare_images, read_image, undecoded
from .sampling import Draw


logger = logging.getLogger(__name__)
# Rows taken from a stream at a time.
ROWS = 16


class Reader(Protocol):
    """Makes an item of a row: what a model is fed."""

    image_columns: list[str]
    other_columns: list[str]

    def __call__(self, row: Mapping[str, Any], draw: Draw, describe: Callable[[], str]) -> dict[str, Any]:
        """The item; `ValueError` naming the row, by what `describe` says, where there is none to make."""


class LabelledImages:
    """
    Rows of an image and a class id, for classification.

    Args:
        processor (`PilBackend`): The checkpoint's image processor.
        image_column (`str`): Column of images.
        label_column (`str`): Column of integer labels.
        num_labels (`int`): Number of classes of the model.
        crop (`RandomResizedCrop`, *optional*): What brings images to size instead of the processor.

    Items are those of [`ImageDataset`].
    """

    def __init__(
        self,
        processor: PilBackend,
        image_column: str,
        label_column: str,
        num_labels: int,
        crop: RandomResizedCrop | None = None,
    ) -> None:
        self.processor = processor
        self.image_columns, self.other_columns = [image_column], [label_column]
        self.num_labels = num_labels
        self.crop = crop
        self.shape: tuple[int, ...] | None = None

    def __call__(self, row: Mapping[str, Any], draw: Draw, describe: Callable[[], str]) -> dict[str, Any]:
        (image_column,), (label_column,) = self.image_columns, self.other_columns
        check_label(row[label_column], self.num_labels, label_column, describe)
        (image,) = prepare_images([read_image(row, image_column, describe)], self.processor, self.crop, [draw])
        self.shape = self.shape or image.shape
        check_shape(image.shape, self.shape, describe)
        return {"pixel_values": torch.from_numpy(image).to(torch.float32), "labels": row[label_column]}


class ImageStream(torch.utils.data.IterableDataset):
    """
    A shuffled stream with a length, of which every epoch is the same whenever and by whomever it is read.

    The order depends on (seed, epoch) alone: shards are shuffled, and their rows mixed in a buffer. Every loader
    worker reads the whole stream and decodes only its own batches, so that batches come out as without workers,
    whatever the number of shards; what is read twice are bytes of files. Under several processes accelerate has the
    first one read and hand out the batches, which repeats images only to even out the last batch of an epoch.

    Args:
        source (`datasets.IterableDataset`): The split.
        length (`int`): Number of its rows.
        read (`Reader`): What makes an item of a row.
        seed (`int`): Seed of the run.
        buffer_size (`int`): Rows that are mixed at a time, held undecoded by every worker.
        batch_size (`int`, *optional*, defaults to 1): Batch size of the loader; `NoseTrainer` sets it.

    Raises:
        `ValueError`: for a length or buffer size below 1; on the way, where the stream has more or fewer rows than
            `length`, or a row cannot be used, which is named by its number in the split.
    """

    def __init__(
        self,
        source: datasets.IterableDataset,
        length: int,
        read: Reader,
        seed: int,
        buffer_size: int,
        batch_size: int = 1,
    ) -> None:
        for name, value in (("length", length), ("buffer_size", buffer_size), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"`{name}` must be 1 or more, got {value}.")
        self.source = undecoded(source, read.image_columns, read.other_columns)
        self.length = length
        self.read = read
        self.seed = seed
        self.buffer_size = buffer_size
        self.batch_size = batch_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch the next pass is."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        if worker is not None:
            # Held by a thread of the parent, it would stay locked here; what iterates over shards does this itself.
            fsspec.asyn.reset_lock()
        shuffled = self.source.shuffle(seed=self.seed, buffer_size=self.buffer_size)
        shuffled.set_epoch(self.epoch)
        count = 0
        for count, row in enumerate(rows_of(shuffled), start=1):
            if count > self.length:
                break
            # A loader asks its workers for batches in turn.
            if (count - 1) // self.batch_size % workers == number:
                yield self.read(row, Draw(count - 1, self.epoch), partial(describe_row, self.source, row))
        if count != self.length:
            found = "more" if count > self.length else f"only {count}"
            raise ValueError(
                f"The training stream was said to have {self.length} images and has {found}. Set train_images to the "
                "number there is: the length of an epoch, and with it every schedule, depends on it."
            )


def rows_of(stream: datasets.IterableDataset) -> Iterator[dict[str, Any]]:
    """All rows of a stream, in a loader's worker too, where iterating over it would give a share of its shards."""
    for batch in stream.iter(batch_size=ROWS):
        yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


def describe_row(source: datasets.IterableDataset, row: Mapping[str, Any]) -> str:
    """Names a row of a shuffled stream for a message, which takes a search: its split and its number there, from 0."""
    logger.warning("A row of the training stream cannot be used. Its number is being looked for from the beginning.")
    for number, other in enumerate(rows_of(source)):
        if other == row:
            return name_row(number, source.split)
    raise RuntimeError("The training data have changed while they were read: a row that was there is gone.")
