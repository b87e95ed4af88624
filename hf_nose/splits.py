"""Where a data set comes from, and which of its splits and columns serve what."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
from datasets.exceptions import DatasetGenerationError
from PIL import Image


# In order of preference; the test split of many Hub data sets has no labels, so it comes late.
EVALUATION_SPLITS = ("validation", "val", "valid", "dev", "test", "eval", "evaluation")
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
DIGITS_EVALUATION = 450


def load_splits(dataset: str) -> dict[str, datasets.Dataset]:
    """
    Loads all splits of a data set: `"digits"`, a parquet file, a folder (parquet, images, `save_to_disk`) or a Hub id.

    Raises:
        `ValueError`: where there is nothing, or nothing that can be read.
    """
    if dataset == "digits":
        return digits()
    path = Path(dataset).expanduser()
    if not path.exists() and (path.is_absolute() or dataset.startswith((".", "~")) or path.suffix == ".parquet"):
        raise ValueError(f"`dataset`: there is no file or folder {dataset!r}.")
    if path.is_file() and path.suffix != ".parquet":
        raise ValueError(f"`dataset`: {dataset!r} is not a parquet file. Give a parquet file or a folder.")
    try:
        if path.is_file():
            name = path.stem if path.stem in ("train", *EVALUATION_SPLITS) else "train"
            return dict(datasets.load_dataset("parquet", data_files={name: str(path)}))
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            loaded = datasets.load_from_disk(str(path))
            if isinstance(loaded, datasets.DatasetDict):
                return {str(name): split for name, split in loaded.items()}
            return {str(loaded.split or "train"): loaded}
        return dict(datasets.load_dataset(str(path) if path.is_dir() else dataset))
    except (FileNotFoundError, ConnectionError, DatasetGenerationError, ValueError) as error:
        raise ValueError(
            f"`dataset`: {dataset!r} could not be loaded: {error.__cause__ or error}. Give 'digits', a parquet file, "
            "a folder of parquet files, a folder of images with one subfolder per class, a folder written by "
            "save_to_disk, or the id of a data set on the Hub that can be reached."
        ) from error


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
