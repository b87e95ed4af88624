"""From stored image files to the tensors a model is fed: decoding, the checkpoint's image processor, batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, ViTImageProcessorPil
from transformers.image_processing_backends import PilBackend

from .crops import RandomResizedCrop
from .sampling import Draw, DrawnDataset


Rows = TypeVar("Rows", datasets.Dataset, datasets.IterableDataset)

# Names the row of the split as it was loaded, before a split in two or a sample renumbered it.
ROW_COLUMN = "row_in_split"
# Images processed at a time while a data set is filled into memory.
FILL = 256


def decode_image(value: dict[str, Any]) -> Image.Image:
    """
    Decodes one cell of a column of type `datasets.Image(decode=False)` to an RGB image.

    EXIF orientation is applied. Grey, palette and CMYK images are converted, an alpha channel is dropped, as the
    Transformers pipelines do; 16-bit grey keeps its upper 8 bits instead of saturating.

    Raises:
        `ValueError`: where the pixels have no fixed range (32-bit integers, floats). What Pillow raises at a
            file that it cannot read is passed on.
    """
    image = datasets.Image().decode_example(value)
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode!r} have no fixed range; store them as 8-bit grey or RGB")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns at the direct way, which gives the same colours
    return image.convert("RGB")


def undecoded(rows: Rows, images: Sequence[str], others: Sequence[str]) -> Rows:
    """Those columns of a data set or stream, with the images as they are stored."""
    rows = rows.select_columns([*images, *others])
    for column in images:
        rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows


def name_row(row: int, split: datasets.Split | None) -> str:
    """A row in a message: its number in its split, from 0."""
    return f"Row {row}" if split is None else f"Row {row} of split {str(split)!r}"


def read_image(
    row: Mapping[str, Any],
    column: str,
    describe: Callable[[], str],
    decode: Callable[[dict[str, Any]], Image.Image] = decode_image,
) -> Image.Image:
    """
    Decodes the image in a column of a row.

    Raises:
        `ValueError`: where there is none, or it cannot be read, naming the row by what `describe` says.
    """
    value = row[column]
    if value is None:
        raise ValueError(f"{describe()} has no image in column {column!r}.")
    try:
        return decode(value)
    except Exception as error:  # Pillow's decoders raise nearly anything at broken files
        file = "" if value["path"] is None else f" ({value['path']})"
        raise ValueError(
            f"{describe()}: the image in column {column!r}{file} cannot be read: {error}. Repair or remove the row."
        ) from error


def check_label(label: int | None, num_labels: int | None, column: str, describe: Callable[[], str]) -> None:
    """`ValueError` naming the row where a label lies outside the classes (of which `None` means any number)."""
    if label is None or label < 0 or (num_labels is not None and label >= num_labels):
        valid = "0 or more" if num_labels is None else f"between 0 and {num_labels - 1}"
        raise ValueError(
            f"{describe()} has label {label} in column {column!r}; labels must be {valid}. Choose another label "
            "column or split, or a model with as many classes as the data set."
        )


def prepare_images(
    images: Sequence[Image.Image],
    processor: PilBackend,
    crop: RandomResizedCrop | None = None,
    draws: Sequence[Draw] = (),
) -> list[np.ndarray]:
    """What a model is fed of RGB images, (3, height, width) each: brought to size by `crop`, or by the processor."""
    if crop is None:
        return processor(list(images))["pixel_values"]
    cut = [crop(image, draw) for image, draw in zip(images, draws, strict=True)]
    return processor(cut, do_resize=False)["pixel_values"]


def check_shape(shape: tuple[int, ...], expected: tuple[int, ...], describe: Callable[[], str]) -> None:
    """`ValueError` naming the row of an image that has another shape than those before it."""
    if shape != expected:
        raise ValueError(
            f"{describe()} has shape {shape} after processing, others {expected}. Use an image processor that resizes "
            "or crops all images to one size."
        )


def load_processor(model: str | Path) -> PilBackend:
    """
    Loads the image processor of a checkpoint, in the Pillow backend.

    The torchvision backend resizes differently, so its figures would depend on what happens to be installed.

    Args:
        model (`str` or `Path`): A folder or a Hub id.

    Raises:
        `ValueError`: where a folder holds no `preprocessor_config.json`, or the processor has no Pillow backend.
    """
    folder = Path(model)
    if folder.is_dir() and not (folder / "preprocessor_config.json").is_file():
        raise ValueError(
            f"`model`: {str(model)!r} holds no preprocessor_config.json, so size, mean and std of its input images "
            "are unknown. Copy the file from the checkpoint that the weights came from."
        )
    processor = AutoImageProcessor.from_pretrained(str(model), backend="pil")
    if not isinstance(processor, PilBackend):
        raise ValueError(
            f"`model`: the image processor of {str(model)!r} is a {type(processor).__name__}, which has no Pillow "
            "backend. Use a checkpoint with a processor of Transformers' own, for example ViTImageProcessor."
        )
    # The code of somebody else: saved with it, it would be run by whoever trusts the code of ours.
    vars(processor).pop("auto_map", None)
    return processor


def digits_processor() -> PilBackend:
    """Builds the image processor for the 8x8 digits: values to [-1, 1]; images of another size are resized to 8x8."""
    return ViTImageProcessorPil(
        size={"height": 8, "width": 8}, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5], resample=3
    )


class ImageDataset(DrawnDataset):
    """
    Processed images of one split, the same at every access, unless `crop` draws another part of them in every epoch.

    Where they fit into `max_bytes`, all images are decoded and processed once, in the constructor (in the parent
    process, so that forked loader workers share them), and kept as one float32 tensor. With `crop` none is kept.

    Args:
        hf_dataset (`datasets.Dataset`):
            The split.
        processor (`PilBackend`):
            The checkpoint's image processor (see [`load_processor`]).
        image_column (`str`):
            Column of images.
        label_column (`str`):
            Column of integer labels.
        num_labels (`int`, *optional*):
            Number of classes of the model. By default the number of class names where the column has them.
        max_bytes (`int`, *optional*, defaults to 256 MiB):
            Largest size of the processed images to keep in memory.
        crop (`RandomResizedCrop`, *optional*):
            What cuts training images, instead of the processor's resize; items are then asked for by [`Draw`]s.
        repeats (`int`, *optional*, defaults to 1):
            How often each image drawn for an epoch appears in it (see [`EpochSampler`]).

    Items are `{"pixel_values": float32 tensor of shape (3, height, width), "labels": int}`.

    Raises:
        `ValueError`: naming split and row, where a label lies outside the classes (at once), or an image cannot be
            read or has another shape than the first (at once if kept in memory, otherwise when it is asked for).
    """

    def __init__(
        self,
        hf_dataset: datasets.Dataset,
        processor: PilBackend,
        image_column: str,
        label_column: str,
        num_labels: int | None = None,
        max_bytes: int = 256 * 2**20,
        crop: RandomResizedCrop | None = None,
        repeats: int = 1,
    ) -> None:
        self.hf_dataset = hf_dataset.cast_column(image_column, datasets.Image(decode=False)).with_format(None)
        self.processor = processor
        self.image_column = image_column
        self.label_column = label_column
        self.crop = crop
        self.repeats = repeats
        feature = hf_dataset.features[label_column]
        if num_labels is None and isinstance(feature, datasets.ClassLabel):
            num_labels = feature.num_classes
        self.labels = self.hf_dataset[label_column][:]
        for index, label in enumerate(self.labels):
            check_label(label, num_labels, label_column, partial(self.describe_row, index))

        self.pixel_values: torch.Tensor | None = None
        self.shape: tuple[int, ...] | None = None
        if len(self) > 0 and crop is None:
            self.shape = tuple(self._process([0]).shape[1:])
            if len(self) * math.prod(self.shape) * 4 <= max_bytes:
                self.pixel_values = torch.cat(
                    [self._process(range(i, min(i + FILL, len(self)))) for i in range(0, len(self), FILL)]
                )

    def __len__(self) -> int:
        return len(self.hf_dataset)

    def __getitem__(self, index: int | Draw) -> dict[str, Any]:
        row = index.image if isinstance(index, Draw) else index
        if self.crop is not None and not isinstance(index, Draw):
            raise ValueError(f"`index` must be a Draw, got {index!r}: an image is cropped anew in every epoch.")
        pixel_values = self._process([index])[0] if self.pixel_values is None else self.pixel_values[row]
        return {"pixel_values": pixel_values, "labels": self.labels[row]}

    def decode(self, index: int) -> Image.Image:
        """Decodes one image to RGB, unprocessed. Raises a `ValueError` naming split and row if it cannot be read."""
        return read_image(self.hf_dataset[int(index)], self.image_column, lambda: self.describe_row(index))

    def describe_row(self, index: int) -> str:
        """Names a row for a message: its split and its number there, from 0."""
        row = self.hf_dataset[int(index)][ROW_COLUMN] if ROW_COLUMN in self.hf_dataset.column_names else int(index)
        return name_row(row, self.hf_dataset.split)

    def _process(self, indices: Sequence[int | Draw]) -> torch.Tensor:
        draws = [index for index in indices if isinstance(index, Draw)]
        rows = [index.image if isinstance(index, Draw) else index for index in indices]
        images = prepare_images([self.decode(row) for row in rows], self.processor, self.crop, draws)
        for row, image in zip(rows, images, strict=True):
            check_shape(image.shape, self.shape or images[0].shape, partial(self.describe_row, row))
        return torch.from_numpy(np.stack(images)).to(torch.float32)


class ImageBatches(Sequence):
    """
    The images of an [`ImageDataset`] in order, as batches that can be gone through again and again.

    A batch can be asked for by number, so that a process decodes only the batches dealt to it. The last one may be
    smaller. Items are `{"pixel_values": (batch, 3, height, width) float32, "labels": (batch,) int64}`.

    Args:
        dataset (`ImageDataset`): The images.
        batch_size (`int`): Images a batch, 1 or more.
    """

    def __init__(self, dataset: ImageDataset, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be 1 or more, got {batch_size}.")
        self.dataset = dataset
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        rows = range(index * self.batch_size, min((index + 1) * self.batch_size, len(self.dataset)))
        items = [self.dataset[row] for row in rows]
        return {
            "pixel_values": torch.stack([item["pixel_values"] for item in items]),
            "labels": torch.tensor([item["labels"] for item in items]),
        }
