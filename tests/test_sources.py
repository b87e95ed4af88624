"""Where a data set comes from, and that only the wanted split is loaded."""

import io
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from made_data import numbered, write_numbered, write_shards
from PIL import Image

from hf_nose.sources import digits, find_source
from hf_nose.splits import find_image_column


CLASSES = ["cat", "dog"]
IMAGE, LABEL = datasets.Image(), datasets.ClassLabel(names=CLASSES)
INTEGER = datasets.Value("int64")


def make_split(count: int, seed: int = 0) -> datasets.Dataset:
    generator = np.random.default_rng(seed)
    images = [Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(count)]
    labels = [index % 2 for index in range(count)]
    features = datasets.Features({"image": IMAGE, "label": LABEL})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def sizes(splits: dict[str, datasets.Dataset]) -> dict[str, int]:
    return {name: len(split) for name, split in splits.items()}


def load_splits(dataset: str) -> dict[str, datasets.Dataset]:
    source = find_source(dataset)
    return {name: source.load(name) for name in source.splits}


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


def test_plain_parquet_of_bytes_is_an_image_column(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(buffer, "PNG")
    features = datasets.Features({"image": datasets.Value("binary"), "label": INTEGER})
    path: Path = tmp_path / "train.parquet"
    datasets.Dataset.from_dict({"image": [buffer.getvalue()] * 2, "label": [0, 1]}, features=features).to_parquet(path)
    split = load_splits(str(path))["train"]
    column = find_image_column(split.features, None)
    assert split.cast_column(column, datasets.Image())[1][column].getpixel((0, 0)) == (1, 2, 3)


# --- one split at a time ---------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path):
    return write_numbered(tmp_path / "shards" / "data", train=23, evaluation=5, shards=3).parent


def test_shards_of_a_split_are_joined_in_their_order(shards):
    source = find_source(str(shards))
    assert sorted(source.splits) == ["train", "validation"]
    train = source.load("train")
    assert str(train.split) == "train"
    assert [row["image"].getpixel((0, 0))[0] for row in train] == list(range(23))


def test_no_file_of_another_split_is_opened(shards):
    for path in shards.glob("data/train-*"):
        path.write_bytes(b"PAR1 and then nothing")
    source = find_source(str(shards))
    assert len(source.load("validation")) == 5
    stream, length = source.stream("validation")
    assert length == 5 == len(list(stream))
    for read in (source.load, source.stream):
        with pytest.raises(ValueError, match="could not be loaded"):
            read("train")


def test_a_stream_of_shards_knows_its_length(shards):
    stream, length = find_source(str(shards)).stream("train")
    assert isinstance(stream, datasets.IterableDataset) and stream.num_shards == 3
    assert length == 23 == len(list(stream))
    assert stream.features["label"].names == [f"label {number}" for number in range(3)]


def test_a_card_tells_the_length_and_the_names_of_the_classes(tmp_path):
    features = datasets.Features({"image": IMAGE, "label": INTEGER})
    rows = {"image": [numbered(number) for number in range(4)], "label": [0, 1, 1, 0]}
    (tmp_path / "card").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "card" / "train.parquet")
    splits = [{"name": "train", "num_examples": 1234, "num_bytes": 1}]
    label = {"name": "label", "dtype": {"class_label": {"names": {"0": "cat", "1": "dog"}}}}
    info = {"features": [{"name": "image", "dtype": "image"}, label], "splits": splits}
    # JSON is YAML.
    card = f"---\n{json.dumps({'dataset_info': info})}\n---\n"
    (tmp_path / "card" / "README.md").write_text(card)
    stream, length = find_source(str(tmp_path / "card")).stream("train")
    assert length == 1234
    assert (
        stream.features["label"].names
        == CLASSES
        == find_source(str(tmp_path / "card")).load("train").features["label"].names
    )
    assert [row["label"] for row in stream] == [0, 1, 1, 0]


def test_saved_and_embedded_data_stream_in_shards(tmp_path):
    make_split(40).save_to_disk(tmp_path / "saved")
    stream, length = find_source(str(tmp_path / "saved")).stream("train")
    assert (length, stream.num_shards) == (40, 16)
    assert [row["label"] for row in stream] == [number % 2 for number in range(40)]
    stream, length = find_source("digits").stream("test")
    assert length == 450 == len(list(stream))
    make_split(3).save_to_disk(tmp_path / "small")
    assert find_source(str(tmp_path / "small")).stream("train")[0].num_shards == 3


def test_an_image_folder_streams_with_all_its_classes_and_no_length(tmp_path):
    for split, names in (("train", CLASSES), ("test", CLASSES[:1])):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / name / "0.png")
    source = find_source(str(tmp_path))
    assert sorted(source.splits) == ["test", "train"]
    stream, length = source.stream("train")
    assert length is None and sorted(row["label"] for row in stream) == [0, 1]
    assert source.load("test").features["label"].names == CLASSES


def test_an_id_of_the_hub_is_looked_up_as_a_folder_first(tmp_path, monkeypatch):
    labels = {"fine_label": ([0, 1], 100), "coarse_label": ([0, 0], 20)}
    write_shards(tmp_path / "uoft-cs" / "cifar100", "train", [numbered(0), numbered(1)], labels, 2, "img")
    monkeypatch.chdir(tmp_path)
    assert len(find_source("uoft-cs/cifar100").load("train")) == 2
