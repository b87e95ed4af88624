"""Which split and column serve what."""

import datasets
import pytest

from hf_nose.splits import choose_splits, find_image_column, find_label_column


CLASSES = ["cat", "dog"]
IMAGE, LABEL = datasets.Image(), datasets.ClassLabel(names=CLASSES)
INTEGER, STRING = datasets.Value("int64"), datasets.Value("string")


@pytest.mark.parametrize(
    ("found", "arguments", "chosen"),
    [
        (["train", "validation", "test"], (None, None, False), ("train", "validation")),
        (["train", "test"], (None, None, False), ("train", "test")),
        (["train", "validation", "test"], (None, "test", False), ("train", "test")),
        (["train", "validation", "test"], ("validation", None, False), ("validation", "test")),
        (["validation"], (None, None, False), ("validation", "validation")),
        (["train"], (None, None, False), ("train", "train")),
        (["odd"], (None, None, False), ("odd", "odd")),
        (["train", "extra"], (None, "train", False), ("train", "train")),
        (["train", "extra"], (None, "extra", False), ("train", "extra")),
        (["train", "test"], (None, None, True), (None, "test")),
        (["train"], (None, None, True), (None, "train")),
        (["validation", "test"], (None, None, True), (None, "validation")),
    ],
)
def test_choice_of_splits(found, arguments, chosen):
    assert choose_splits(found, *arguments) == chosen


@pytest.mark.parametrize(
    ("found", "arguments", "message"),
    [
        (["train", "test"], ("fit", None, False), r"`train_split`: there is no split 'fit'. Splits found: \['train'"),
        (["train", "test"], (None, "dev", True), "`eval_split`: there is no split 'dev'"),
        (["train", "extra"], (None, None, False), r"`eval_split`: which of the splits \['train', 'extra'\] evaluates"),
        (["validation", "test"], (None, None, False), "`train_split`: which of the splits .* trains"),
    ],
)
def test_doubtful_splits_are_refused(found, arguments, message):
    with pytest.raises(ValueError, match=message):
        choose_splits(found, *arguments)


@pytest.mark.parametrize(
    ("features", "name", "column"),
    [
        ({"label": LABEL, "picture": IMAGE}, None, "picture"),
        ({"annotation": IMAGE, "image": IMAGE}, None, "image"),
        ({"image": IMAGE, "annotation": IMAGE}, "annotation", "annotation"),
        ({"img": datasets.Value("binary"), "label": LABEL}, None, "img"),
        ({"image": {"bytes": datasets.Value("binary"), "path": STRING}, "label": LABEL}, None, "image"),
    ],
)
def test_image_column(features, name, column):
    assert find_image_column(datasets.Features(features), name) == column


@pytest.mark.parametrize(
    ("features", "name", "message"),
    [
        ({"label": LABEL, "text": STRING}, None, r"no column of images. Columns found: \['label', 'text'\]"),
        ({"left": IMAGE, "right": IMAGE}, None, r"no column of images. Columns found: \['left', 'right'\]"),
        ({"image": IMAGE}, "photo", r"`image_column`: there is no column 'photo'. Columns found: \['image'\]"),
        ({"image": STRING, "label": LABEL}, None, "column 'image' holds Value.*string.*, not images"),
    ],
)
def test_missing_image_column_lists_the_columns(features, name, message):
    with pytest.raises(ValueError, match=message):
        find_image_column(datasets.Features(features), name)


@pytest.mark.parametrize(
    ("features", "name", "column"),
    [
        ({"image": IMAGE, "species": LABEL}, None, "species"),
        ({"img": IMAGE, "fine_label": LABEL, "coarse_label": LABEL}, None, "fine_label"),
        ({"img": IMAGE, "fine_label": LABEL, "coarse_label": LABEL}, "coarse_label", "coarse_label"),
        ({"image": IMAGE, "label": datasets.Value("uint8"), "id": INTEGER}, None, "label"),
    ],
)
def test_label_column(features, name, column):
    assert find_label_column(datasets.Features(features), name) == column


@pytest.mark.parametrize(
    ("features", "name", "message"),
    [
        ({"image": IMAGE, "id": INTEGER}, None, r"no column of labels. Columns found: \['image', 'id'\]"),
        ({"image": IMAGE, "label": LABEL}, "class", "`label_column`: there is no column 'class'"),
        ({"image": IMAGE, "label": STRING}, None, "column 'label' holds .*string.*class_encode_column"),
        ({"image": IMAGE, "label": datasets.Value("float32")}, None, "column 'label' holds .*float32"),
    ],
)
def test_missing_label_column_lists_the_columns(features, name, message):
    with pytest.raises(ValueError, match=message):
        find_label_column(datasets.Features(features), name)
