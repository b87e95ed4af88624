"""Where a data set comes from: its splits by name, each to be loaded or streamed on its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow.parquet
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.parquet.parquet import Parquet
from PIL import Image

from .splits import EVALUATION_SPLITS


DIGITS_EVALUATION = 450
# Shards that a data set in memory is streamed in, so that their order can be shuffled too.
SHARDS = 16

Stream = tuple[datasets.IterableDataset, int | None]


@dataclass(frozen=True)
class Source:
    """
    A data set that has been found, with nothing read of it but the names of its splits.

    Args:
        dataset (`str`): What was asked for, for messages.
        splits (`list[str]`): Names of its splits.
        reader (`Callable[[str], datasets.Dataset]`): Loads one split.
        streamer (`Callable[[str], tuple]`): Streams one split.
    """

    dataset: str
    splits: list[str]
    reader: Callable[[str], datasets.Dataset]
    streamer: Callable[[str], Stream]

    def load(self, split: str) -> datasets.Dataset:
        """Loads one split; of parquet files, on the Hub too, no other is fetched. `ValueError` if it is unreadable."""
        with readable(self.dataset):
            return self.reader(split)

    def stream(self, split: str) -> Stream:
        """Streams one split: its rows, and how many there are (`None` where nothing says so). Raises as `load`."""
        with readable(self.dataset):
            return self.streamer(split)


def find_source(dataset: str) -> Source:
    """
    Finds a data set: `"digits"`, a parquet file, a folder (parquet, images, `save_to_disk`) or a Hub id.

    Raises:
        `ValueError`: where there is nothing, or nothing that can be read.
    """
    if dataset == "digits":
        return loaded_source(dataset, digits())
    path = Path(dataset).expanduser()
    if not path.exists() and (path.is_absolute() or dataset.startswith((".", "~")) or path.suffix == ".parquet"):
        raise ValueError(f"`dataset`: there is no file or folder {dataset!r}.")
    if path.is_file() and path.suffix != ".parquet":
        raise ValueError(f"`dataset`: {dataset!r} is not a parquet file. Give a parquet file or a folder.")
    with readable(dataset):
        if path.is_file():
            name = path.stem if path.stem in ("train", *EVALUATION_SPLITS) else "train"
            return parquet_source(dataset, {name: [str(path)]}, datasets.DatasetInfo())
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            loaded = datasets.load_from_disk(str(path))
            if not isinstance(loaded, datasets.DatasetDict):
                loaded = {loaded.split or "train": loaded}
            return loaded_source(dataset, {str(name): split for name, split in loaded.items()})
        name = str(path) if path.is_dir() else dataset
        builder = datasets.load_dataset_builder(name)
        files = {str(split): [str(file) for file in found] for split, found in builder.config.data_files.items()}
        if isinstance(builder, Parquet):
            return parquet_source(dataset, files, builder.info)
        # Of images in folders every split is needed to know the classes.
        whole = cache(partial(datasets.load_dataset, name))
        return Source(
            dataset,
            splits=list(files),
            reader=lambda split: whole()[split],
            streamer=lambda split: (builder.as_streaming_dataset(split), number_of_rows(builder.info, split)),
        )


@contextmanager
def readable(dataset: str) -> Iterator[None]:
    """Says of what the datasets library raises which data set it came from, and what may be given instead."""
    try:
        yield
    except (FileNotFoundError, ConnectionError, DatasetGenerationError, ValueError) as error:
        raise ValueError(
            f"`dataset`: {dataset!r} could not be loaded: {error.__cause__ or error}. Give 'digits', a parquet file, "
            "a folder of parquet files, a folder of images with one subfolder per class, a folder written by "
            "save_to_disk, or the id of a data set on the Hub that can be reached."
        ) from error


def loaded_source(dataset: str, splits: dict[str, datasets.Dataset]) -> Source:
    """A source whose splits are loaded already."""

    def stream(split: str) -> Stream:
        found = splits[split]
        return found.to_iterable_dataset(num_shards=max(1, min(SHARDS, len(found)))), len(found)

    return Source(dataset, list(splits), splits.__getitem__, stream)


def parquet_source(dataset: str, files: dict[str, list[str]], info: datasets.DatasetInfo) -> Source:
    """A source of parquet files, of which each split is read from its own files alone."""

    def load(split: str, streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
        # `split=` alone would have every split fetched and only one of them returned.
        return datasets.load_dataset(
            "parquet", data_files={split: files[split]}, features=info.features, split=split, streaming=streaming
        )

    def stream(split: str) -> Stream:
        number = number_of_rows(info, split)
        return load(split, True), sum(map(rows_in_file, files[split])) if number is None else number

    return Source(dataset, list(files), partial(load, streaming=False), stream)


def number_of_rows(info: datasets.DatasetInfo, split: str) -> int | None:
    """How many rows a split has according to the data set's card, `None` where it does not say."""
    return info.splits[split].num_examples if info.splits and split in info.splits else None


def rows_in_file(file: str) -> int:
    """How many rows a parquet file has, from its last bytes: on the Hub nothing more is fetched."""
    with fsspec.open(file, "rb") as opened:
        return pyarrow.parquet.read_metadata(opened).num_rows


def digits() -> dict[str, datasets.Dataset]:
    """Scikit-learn's 1,797 handwritten digits, 8x8 RGB: 1,347 train and 450 test, stratified, always the same."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    grey, labels = load_digits(return_X_y=True)
    pixels = np.rint(grey.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    rows = train_test_split(np.arange(len(labels)), test_size=DIGITS_EVALUATION, stratify=labels, random_state=0)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    )
    return {
        name: datasets.Dataset.from_dict(
            {"image": [Image.fromarray(pixels[i]).convert("RGB") for i in chosen], "label": labels[chosen]},
            features=features,
            split=datasets.Split(name),
        )
        for name, chosen in zip(("train", "test"), rows, strict=True)
    }
