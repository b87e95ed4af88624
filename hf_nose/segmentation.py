"""Images with an annotation of every pixel: both brought to size by one draw, so that they stay aligned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import datasets
import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend

from .crops import RandomResizedCrop, input_size
from .images import name_row, prepare_images, read_image, undecoded
from .sampling import Draw, DrawnDataset
from .specs import DatasetSpec


# Label of pixels that belong to no class: the one that the losses of PyTorch and Transformers are told to ignore.
IGNORED = 255


class AnnotatedImages:
    """
    Rows of an image and its annotation, for segmentation; a [`~hf_nose.streams.Reader`].

    The image is resized as the processor says, the annotation to the same size by its nearest pixels. With `crop`
    both are cut by the same box.

    Args:
        processor (`PilBackend`): The checkpoint's image processor; it must bring images to one height and width.
        spec (`DatasetSpec`): The columns, and what the values of annotations mean.
        crop (`RandomResizedCrop`, *optional*): What brings both to size instead of the processor.

    Items are `{"pixel_values": float32 (3, height, width), "labels": int64 (height, width)}`, labels from 0, with 255
    where there is no class.

    Raises:
        `ValueError`: where `spec` has no annotations or the processor's size is unknown; for a row, by its name, where
            an image cannot be read, the two have different sizes, or a value lies outside the classes.
    """

    def __init__(self, processor: PilBackend, spec: DatasetSpec, crop: RandomResizedCrop | None = None) -> None:
        if spec.annotation_column is None or spec.num_classes is None:
            raise ValueError(f"`spec` must name the column and number of classes of annotations, got {spec}.")
        if cast(Any, processor).do_center_crop:
            raise ValueError("`processor` crops in the middle after its resize: switch do_center_crop off.")
        self.processor = processor
        self.height, self.width = input_size(processor)
        self.image_columns = [spec.image_column, spec.annotation_column]
        self.other_columns: list[str] = []
        self.spec = spec
        self.crop = crop
        self.classes = np.full(256, -1)
        last = spec.first_class + spec.num_classes
        self.classes[spec.first_class : last] = np.arange(spec.num_classes)
        if spec.void is not None:
            self.classes[spec.void] = IGNORED

    def __call__(self, row: Mapping[str, Any], draw: Draw, describe: Callable[[], str]) -> dict[str, torch.Tensor]:
        image_column, annotation_column = self.image_columns
        image = read_image(row, image_column, describe)
        annotation = read_image(row, annotation_column, describe, decode_annotation)
        if image.size != annotation.size:
            raise ValueError(
                f"{describe()} has an image of {image.width}x{image.height} pixels and an annotation of "
                f"{annotation.width}x{annotation.height}. Repair or remove the row."
            )
        (pixel_values,) = prepare_images([image], self.processor, self.crop, [draw])
        if self.crop is None:
            annotation = annotation.resize((self.width, self.height), Image.Resampling.NEAREST)
        else:
            box = self.crop.box(*image.size, draw)
            annotation = self.crop.cut(annotation, box, Image.Resampling.NEAREST)
        labels = self.classes[np.asarray(annotation)]
        if labels.min() < 0:
            value = int(np.asarray(annotation)[labels < 0][0])
            raise ValueError(
                f"{describe()} has the value {value} in its annotation, which is no class of {self.spec}. Give the "
                "layout of the data set, or repair the row."
            )
        return {
            "pixel_values": torch.from_numpy(pixel_values).to(torch.float32),
            "labels": torch.from_numpy(labels),
        }


class SegmentationDataset(DrawnDataset):
    """
    Images and annotations of one split, asked for by plain indices or, where they are cropped, by [`Draw`]s.

    Args:
        hf_dataset (`datasets.Dataset`): The split.
        read (`AnnotatedImages`): What makes an item of a row.
    """

    def __init__(self, hf_dataset: datasets.Dataset, read: AnnotatedImages) -> None:
        self.hf_dataset = undecoded(hf_dataset, read.image_columns, read.other_columns)
        self.read = read

    def __len__(self) -> int:
        return len(self.hf_dataset)

    def __getitem__(self, index: int | Draw) -> dict[str, torch.Tensor]:
        if self.read.crop is not None and not isinstance(index, Draw):
            raise ValueError(f"`index` must be a Draw, got {index!r}: an image is cropped anew in every epoch.")
        draw = index if isinstance(index, Draw) else Draw(int(index), 0)
        return self.read(self.hf_dataset[draw.image], draw, lambda: name_row(draw.image, self.hf_dataset.split))


def decode_annotation(value: dict[str, Any]) -> Image.Image:
    """Decodes an annotation; `ValueError` where its pixels are not one byte each, as class ids are."""
    image = datasets.Image().decode_example(value)
    if image.mode not in ("L", "P"):
        raise ValueError(f"pixels of mode {image.mode!r} are no class ids; store them as 8-bit grey")
    return image
