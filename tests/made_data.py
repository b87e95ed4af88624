"""Image files made by the tests, in shards laid out as data sets on the Hub are."""

import io
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
from PIL import Image


def encoded(image: Image.Image, file_format: str = "PNG", **options) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def numbered(number: int) -> dict:
    """An image of one colour that carries its number in its red pixels."""
    return encoded(Image.new("RGB", (8, 8), (number, 255 - number, 7)))


def numbers(pixel_values) -> list[int]:
    """The numbers of a batch of such images, processed as for the digits."""
    return ((pixel_values[:, 0, 0, 0] * 0.5 + 0.5) * 255).round().long().tolist()


def odd(number: int, size: int = 16) -> dict:
    """A photograph as data sets have them: every second RGB, others grey, CMYK, or turned by their EXIF data."""
    pixels = np.random.default_rng(number).integers(0, 256, (size, size + 4, 3), dtype=np.uint8)
    image, kind = Image.fromarray(pixels), number % 6
    if kind == 1:
        return encoded(image.convert("L"), "JPEG")
    if kind == 3:
        return encoded(image.convert("CMYK"), "JPEG")
    if kind == 5:
        exif = Image.Exif()
        exif[0x0112] = 6
        return encoded(image, "JPEG", exif=exif)
    return encoded(image, "JPEG")


def write_shards(
    folder: Path,
    split: str,
    cells: Sequence[dict],
    labels: dict[str, tuple[Sequence[int], int]],
    shards: int,
    image_column: str = "image",
) -> Path:
    """Parquet shards named as on the Hub; `labels` are columns of class ids, each with its number of classes."""
    folder.mkdir(parents=True, exist_ok=True)
    classes = {
        name: datasets.ClassLabel(names=[f"{name} {number}" for number in range(count)])
        for name, (_, count) in labels.items()
    }
    features = datasets.Features({image_column: datasets.Image(), **classes})
    columns = {image_column: list(cells), **{name: list(values) for name, (values, _) in labels.items()}}
    whole = datasets.Dataset.from_dict(columns, features=features)
    for number in range(shards):
        shard = whole.shard(shards, number, contiguous=True)
        shard.to_parquet(folder / f"{split}-{number:05d}-of-{shards:05d}.parquet")
    return folder


def write_numbered(folder: Path, train: int, evaluation: int, shards: int, num_labels: int = 3) -> Path:
    """ImageNet's layout with [`numbered`] images, 0 to train - 1 and on."""
    for split, start, count, parts in (("train", 0, train, shards), ("validation", train, evaluation, 1)):
        values = range(start, start + count)
        labels = [number % num_labels for number in values]
        write_shards(folder, split, [numbered(n) for n in values], {"label": (labels, num_labels)}, parts)
    return folder
