"""Where a data set comes from, and which of its splits and columns serve what."""

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


# In order of preference; the test split of many Hub data sets has no labels, so it comes late.
EVALUATION_SPLITS = ("validation", "val", "valid", "dev", "test", "eval", "evaluation")
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
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


def choose_splits(
    found: list[str], train_split: str | None, eval_split: str | None, evaluation_only: bool
) -> tuple[str | None, str]:
    """
    Chooses the training split (`None` with `evaluation_only`) and the evaluation split from those found.

    They are the same where there is only one or where the arguments say so.

    Raises:
        `ValueError`: where a split asked for does not exist, or the names do not tell which to take.
    """
    for argument, name in (("train_split", train_split), ("eval_split", eval_split)):
        if name is not None and name not in found:
            raise ValueError(f"`{argument}`: there is no split {name!r}. Splits found: {found}.")
    if eval_split is None:
        candidates = [name for name in EVALUATION_SPLITS if name in found and name != train_split]
        if not candidates and len(found) > 1:
            raise ValueError(f"`eval_split`: which of the splits {found} evaluates? Name it.")
        eval_split = candidates[0] if candidates else found[0]
    if evaluation_only:
        return None, eval_split
    if train_split is None:
        if "train" not in found and len(found) > 1:
            raise ValueError(f"`train_split`: which of the splits {found} trains? Name it.")
        train_split = "train" if "train" in found else found[0]
    return train_split, eval_split


def find_image_column(features: datasets.Features, name: str | None) -> str:
    """
    Finds the column of images: the one named, the only one of type image, or the one called image or img.

    Raises:
        `ValueError`: listing the columns, where there is none or more than one.
    """
    if name is not None and name not in features:
        raise ValueError(f"`image_column`: there is no column {name!r}. Columns found: {list(features)}.")
    if name is None:
        typed = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
        named = [column for column in IMAGE_COLUMNS if column in (typed or features)]
        if len(typed) == 1:
            named = typed
        if not named:
            raise ValueError(f"`image_column`: no column of images. Columns found: {list(features)}. Name it.")
        name = named[0]
    feature = features[name]
    encoded = isinstance(feature, dict) and "bytes" in feature
    binary = isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")
    if not (isinstance(feature, datasets.Image) or encoded or binary):
        raise ValueError(
            f"`image_column`: column {name!r} holds {feature}, not images. Columns found: {list(features)}. Name "
            "another, or store the encoded bytes of the images."
        )
    return name


def find_label_column(features: datasets.Features, name: str | None) -> str:
    """
    Finds the column of labels: the one named, the only class label, or the one called label, labels or fine_label.

    Raises:
        `ValueError`: listing the columns, where there is none or more than one, or it does not hold integers.
    """
    if name is not None and name not in features:
        raise ValueError(f"`label_column`: there is no column {name!r}. Columns found: {list(features)}.")
    if name is None:
        typed = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        named = [column for column in LABEL_COLUMNS if column in (typed or features)]
        if len(typed) == 1:
            named = typed
        if not named:
            raise ValueError(f"`label_column`: no column of labels. Columns found: {list(features)}. Name it.")
        name = named[0]
    feature = features[name]
    integers = isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint"))
    if not (isinstance(feature, datasets.ClassLabel) or integers):
        raise ValueError(
            f"`label_column`: column {name!r} holds {feature}; labels are class labels or integers. Columns found: "
            f"{list(features)}. Name another, or number the classes (`datasets.Dataset.class_encode_column`)."
        )
    return name
