"""Which of a data set's splits and columns serve what."""

from __future__ import annotations

import datasets


# In order of preference; the test split of many Hub data sets has no labels, so it comes late.
EVALUATION_SPLITS = ("validation", "val", "valid", "dev", "test", "eval", "evaluation")
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")


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
