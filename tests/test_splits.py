"""Which split and column serve what."""

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_nose.splits import choose_splits, digits, find_image_column, find_label_column, load_splits


CLASSES = ["cat", "dog"]
IMAGE, LABEL = datasets.Image(), datasets.ClassLabel(names=CLASSES)
INTEGER, STRING = datasets.Value("int64"), datasets.Value("string")


def make_split(count: int, seed: int = 0) -> datasets.Dataset:
    generator = np.random.default_rng(seed)
    images = [Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(count)]
    labels = [index % 2 for index in range(count)]
    features = datasets.Features({"image": IMAGE, "label": LABEL})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def sizes(splits: dict[str, datasets.Dataset]) -> dict[str, int]:
    return {name: len(split) for name, split in splits.items()}


def test_parquet_file_is_one_split_with_its_own_name(tmp_path):
    make_split(4).to_parquet(tmp_path / "validation.parquet")
    make_split(3).to_parquet(tmp_path / "my-images.parquet")
    assert sizes(load_splits(str(tmp_path / "validation.parquet"))) == {"validation": 4}
    assert sizes(load_splits(str(tmp_path / "my-images.parquet"))) == {"train": 3}


def test_folder_of_parquet_files(tmp_path):
    make_split(4).to_parquet(tmp_path / "train.parquet")
    make_split(2).to_parquet(tmp_path / "test.parquet")
    splits = load_splits(str(tmp_path))
    assert sizes(splits) == {"train": 4, "test": 2}
    assert splits["train"].features["label"].names == CLASSES


def test_image_folder_with_a_subfolder_per_class(tmp_path):
    for split, count in (("train", 3), ("val", 1)):
        for shade, name in enumerate(CLASSES):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (8, 8), (shade, index, 0)).save(folder / f"{index}.png")
    splits = load_splits(str(tmp_path))
    assert sizes(splits) == {"train": 6, "validation": 2}
    for split in splits.values():
        assert split.features["label"].names == CLASSES
        assert all(row["image"].getpixel((0, 0))[0] == row["label"] for row in split)


def test_folders_of_save_to_disk(tmp_path):
    datasets.DatasetDict({"train": make_split(4), "test": make_split(2)}).save_to_disk(tmp_path / "both")
    make_split(3).save_to_disk(tmp_path / "one")
    assert sizes(load_splits(str(tmp_path / "both"))) == {"train": 4, "test": 2}
    assert sizes(load_splits(str(tmp_path / "one"))) == {"train": 3}


def test_digits_are_real_stratified_and_always_the_same():
    splits = digits()
    assert sizes(splits) == {"train": 1347, "test": 450}
    counts = np.bincount(splits["test"]["label"][:])
    assert counts.min() >= 43 and counts.max() <= 47
    image = splits["test"][0]["image"]
    assert image.size == (8, 8) and image.mode == "RGB"
    pixels = {name: [row["image"].tobytes() for row in split] for name, split in splits.items()}
    assert pixels["test"] == [row["image"].tobytes() for row in digits()["test"]]
    assert max(max(image) for image in pixels["test"]) == 255  # 16 of 16 is white
    assert not set(pixels["train"]) & set(pixels["test"])


@pytest.mark.parametrize("name", ["./gone", "gone.parquet", "/gone/folder"])
def test_missing_path_is_named(name):
    with pytest.raises(ValueError, match=f"there is no file or folder '{name}'"):
        load_splits(name)


def test_unreachable_hub_id_says_what_is_accepted():
    with pytest.raises(ValueError, match=r"'nobody/nothing' could not be loaded: .* Give 'digits', a parquet file"):
        load_splits("nobody/nothing")


def test_unreadable_files_and_empty_folders_are_named(tmp_path):
    (tmp_path / "table.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match=r"table\.csv' is not a parquet file"):
        load_splits(str(tmp_path / "table.csv"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match=r"broken\.parquet' could not be loaded"):
        load_splits(str(tmp_path / "broken.parquet"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty' could not be loaded"):
        load_splits(str(tmp_path / "empty"))


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


def test_plain_parquet_of_bytes_is_an_image_column(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(buffer, "PNG")
    features = datasets.Features({"image": datasets.Value("binary"), "label": INTEGER})
    path: Path = tmp_path / "train.parquet"
    datasets.Dataset.from_dict({"image": [buffer.getvalue()] * 2, "label": [0, 1]}, features=features).to_parquet(path)
    split = load_splits(str(path))["train"]
    column = find_image_column(split.features, None)
    assert split.cast_column(column, datasets.Image())[1][column].getpixel((0, 0)) == (1, 2, 3)
