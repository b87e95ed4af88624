"""Which images train, evaluate and calibrate."""

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from made_data import write_shards
from PIL import Image

from hf_nose.calibration import calibration_batches
from hf_nose.data import ImageData, load_image_data
from hf_nose.images import ROW_COLUMN, ImageDataset, digits_processor, load_processor


pytestmark = pytest.mark.usefixtures("quick_streams")

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
CLASSES = ["cat", "dog", "owl"]


def png(number: int) -> dict:
    """An image that carries its number in its red pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 255 - number, 7)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def make_split(numbers, names=CLASSES) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    columns = {"image": [png(number) for number in numbers], "label": [number % len(names) for number in numbers]}
    return datasets.Dataset.from_dict(columns, features=features)


def numbers_in(split: datasets.Dataset, column: str = "image") -> list[int]:
    return [Image.open(io.BytesIO(row[column]["bytes"])).getpixel((0, 0))[0] for row in split]


def calibration_numbers(calibration) -> list[int]:
    red = torch.cat([batch["pixel_values"][:, 0, 0, 0] for batch in calibration])
    return ((red * 0.5 + 0.5) * 255).round().long().tolist()


@pytest.fixture
def two_splits(tmp_path) -> str:
    folder = tmp_path / "two"
    folder.mkdir()
    make_split(range(40)).to_parquet(folder / "train.parquet")
    make_split(range(40, 60)).to_parquet(folder / "test.parquet")
    return str(folder)


@pytest.fixture
def one_split(tmp_path) -> str:
    make_split(range(41)).to_parquet(tmp_path / "validation.parquet")
    return str(tmp_path / "validation.parquet")


def test_two_splits_are_taken_as_they_are_undecoded(two_splits):
    data = load_image_data(two_splits)
    assert numbers_in(data.train) == list(range(40))
    assert numbers_in(data.evaluation) == list(range(40, 60))
    assert (data.image_column, data.label_column, data.class_names, data.notes) == ("image", "label", CLASSES, [])
    assert data.train.features["image"].decode is False


def test_one_split_is_divided_in_two_and_says_so(one_split):
    data = load_image_data(one_split, seed=3)
    train, evaluation = numbers_in(data.train), numbers_in(data.evaluation)
    assert (len(train), len(evaluation)) == (21, 20)
    assert sorted(train + evaluation) == list(range(41))
    assert train == sorted(train) and train != list(range(21))
    assert data.notes == [
        "one split only: 'validation' was divided at random with seed 3 into 21 training and 20 evaluation images"
    ]
    assert numbers_in(load_image_data(one_split, seed=3).train) == train
    assert numbers_in(load_image_data(one_split, seed=4).train) != train


def test_evaluation_only_takes_the_whole_split(one_split, two_splits):
    data = load_image_data(one_split, evaluation_only=True)
    assert data.train is None and numbers_in(data.evaluation) == list(range(41)) and data.notes == []
    data = load_image_data(two_splits, evaluation_only=True, eval_split="train")
    assert numbers_in(data.evaluation) == list(range(40))
    assert data.notes == ["evaluated on all images of 'train', the training split"]


def test_samples_are_seeded_and_mixed(two_splits):
    data = load_image_data(two_splits, seed=1, max_train_samples=10, max_eval_samples=5)
    train, evaluation = numbers_in(data.train), numbers_in(data.evaluation)
    assert len(train) == 10 and len(evaluation) == 5
    assert set(train) <= set(range(40)) and set(evaluation) <= set(range(40, 60))
    assert train != list(range(10))
    assert numbers_in(load_image_data(two_splits, seed=1, max_train_samples=10).train) == train
    assert numbers_in(load_image_data(two_splits, seed=2, max_train_samples=10).train) != train
    assert len(load_image_data(two_splits, max_train_samples=1000).train) == 40
    with pytest.raises(ValueError, match="`max_train_samples` must be 1 or more, got 0"):
        load_image_data(two_splits, max_train_samples=0)


def test_unreadable_image_is_named_by_its_row_in_the_file(tmp_path):
    split = make_split(range(20)).cast_column("image", datasets.Image(decode=False)).to_dict()
    split["image"][13] = {"bytes": b"broken", "path": None}
    path = str(tmp_path / "train.parquet")
    datasets.Dataset.from_dict(split, features=make_split([0]).features).to_parquet(path)
    data = load_image_data(path)
    half = data.train if 13 in data.train[ROW_COLUMN][:] else data.evaluation
    with pytest.raises(ValueError, match="Row 13 of split 'train': the image in column 'image' cannot be read"):
        ImageDataset(half, digits_processor(), "image", "label")


def test_missing_columns_list_those_found(tmp_path):
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    table.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"no column of images. Columns found: \['text', 'label'\]"):
        load_image_data(str(tmp_path / "train.parquet"))


def test_column_missing_in_one_split_is_named(tmp_path):
    splits = {"train": make_split(range(4)).rename_column("label", "kind"), "test": make_split(range(4))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"Split 'train' has no column 'label'. Columns found: \['image', 'kind'\]"):
        load_image_data(str(tmp_path / "saved"))


def test_splits_that_number_the_classes_differently_are_refused(tmp_path):
    splits = {"train": make_split(range(4)), "test": make_split(range(4), names=CLASSES[::-1])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="'train' and 'test' number the classes of column 'label' differently"):
        load_image_data(str(tmp_path / "saved"))


def test_single_image_cannot_be_divided(tmp_path):
    make_split([5]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"Split 'train' has 1 image\(s\), too few"):
        load_image_data(str(tmp_path / "train.parquet"))


def test_calibration_is_a_seeded_mixed_sample_of_the_training_images(two_splits):
    data = load_image_data(two_splits)

    def draw(num_images, seed):
        return calibration_batches(data, digits_processor(), num_images, 4, seed, num_labels=3)

    calibration = draw(10, 0)
    numbers = calibration_numbers(calibration)
    assert calibration.num_images == 10 and calibration.notes == []
    assert [len(batch["labels"]) for batch in calibration] == [4, 4, 2]
    assert len(set(numbers)) == 10 and set(numbers) <= set(range(40)) and numbers != sorted(numbers)
    assert torch.cat([batch["labels"] for batch in calibration]).tolist() == [number % 3 for number in numbers]
    assert calibration_numbers(calibration) == numbers  # again
    assert draw(10, 0).sha256 == calibration.sha256
    assert calibration_numbers(draw(10, 1)) != numbers
    assert calibration_numbers(draw(6, 0)) == numbers[:6]


def test_calibration_is_apart_from_evaluation_where_there_is_one_split(one_split):
    data = load_image_data(one_split)
    calibration = calibration_batches(data, digits_processor(), 1000, 8, 0, num_labels=3)
    assert sorted(calibration_numbers(calibration)) == sorted(numbers_in(data.train))
    assert not set(calibration_numbers(calibration)) & set(numbers_in(data.evaluation))
    assert calibration.num_images == 21
    assert calibration.notes == ["1000 calibration images were asked for; all 21 training images were taken"]


def test_calibration_hash_sees_pixels_sizes_labels_and_order():
    def hash_of(images, labels):
        features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})
        split = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        data = ImageData(split, split, "image", "label", None, [])
        return calibration_batches(data, digits_processor(), 2, 2, 0, num_labels=9).sha256

    def image(size, seed=0, file_format="PNG"):
        buffer = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, file_format)
        return {"bytes": buffer.getvalue(), "path": None}

    first, second = image((4, 8)), image((8, 4), seed=1)
    hashes = [
        hash_of([first, second], [0, 1]),
        hash_of([second, first], [1, 0]),  # order
        hash_of([first, second], [0, 2]),  # label
        hash_of([first, image((8, 4), seed=2)], [0, 1]),  # pixels
        hash_of([image((8, 4)), second], [0, 1]),  # the same bytes in another shape
    ]
    assert len(set(hashes)) == len(hashes)
    assert hash_of([image((4, 8), file_format="BMP"), second], [0, 1]) == hashes[0]  # only pixels count


def test_empty_calibration_set_is_refused(two_splits):
    data = load_image_data(two_splits)
    with pytest.raises(ValueError, match="`num_images` must be 1 or more, got 0"):
        calibration_batches(data, digits_processor(), 0, 4, 0, 3)
    for train in (None, data.train.select([])):
        empty = ImageData(train, data.evaluation, "image", "label", CLASSES, [])
        with pytest.raises(ValueError, match="no training images, so the calibration set would be empty"):
            calibration_batches(empty, digits_processor(), 5, 4, 0, 3)


def test_calibration_labels_outside_the_model_are_refused(two_splits):
    with pytest.raises(ValueError, match="of split 'train' has label 2 .* between 0 and 1"):
        calibration_batches(load_image_data(two_splits), digits_processor(), 40, 4, 0, num_labels=2)


def test_stream_goes_through_a_seeded_shuffle_buffer(two_splits):
    def draw(seed, num_images=8):
        stream = datasets.load_dataset("parquet", data_files=f"{two_splits}/train.parquet", streaming=True)["train"]
        data = ImageData(stream, load_image_data(two_splits).evaluation, "image", "label", CLASSES, [])
        return calibration_batches(data, digits_processor(), num_images, 4, seed, num_labels=3)

    numbers = calibration_numbers(draw(0))
    assert len(set(numbers)) == 8 and max(numbers) < 40 and numbers != list(range(8))
    assert calibration_numbers(draw(0)) == numbers
    assert calibration_numbers(draw(1)) != numbers
    assert draw(0).sha256 != draw(1).sha256
    assert draw(0, 100).num_images == 40
    # Sorted by class, the first ones alone would be of one class.
    assert max(number for seed in range(5) for number in calibration_numbers(draw(seed))) >= 32


# --- layouts known by their id ---------------------------------------------------------------------------------------


def test_the_columns_of_a_copy_are_those_of_its_hub_id_unless_named(tmp_path):
    columns = {"fine_label": ([0, 1, 2, 3], 4), "coarse_label": ([0, 0, 1, 1], 2)}
    folder = str(write_shards(tmp_path, "train", [png(number) for number in range(4)], columns, 2, "img"))
    data = load_image_data(folder, dataset_id="uoft-cs/cifar100")
    assert (data.image_column, data.label_column, len(data.class_names)) == ("img", "fine_label", 4)
    data = load_image_data(folder, dataset_id="uoft-cs/cifar100", label_column="coarse_label")
    assert (data.label_column, len(data.class_names)) == ("coarse_label", 2)
    with pytest.raises(ValueError, match="`label_column`: there is no column 'label'. Columns found: .*'fine_label'"):
        load_image_data(folder, dataset_id="uoft-cs/cifar10")


# --- streams ---------------------------------------------------------------------------------------------------------


def test_training_images_stream_and_evaluation_images_are_loaded(two_splits):
    data = load_image_data(two_splits, streaming=True)
    assert isinstance(data.train, datasets.IterableDataset) and data.num_train == 40
    assert numbers_in(data.train) == list(range(40)) and data.train.features["image"].decode is False
    assert numbers_in(data.evaluation) == list(range(40, 60))
    assert data.class_names == CLASSES
    loaded = load_image_data(two_splits)
    assert loaded.num_train == 40 and load_image_data(two_splits, evaluation_only=True).num_train == 0


def test_a_stream_is_checked_like_a_split(tmp_path):
    (tmp_path / "data").mkdir()
    make_split(range(4), names=CLASSES[::-1]).to_parquet(tmp_path / "data" / "train.parquet")
    make_split(range(4)).to_parquet(tmp_path / "data" / "test.parquet")
    with pytest.raises(ValueError, match="number the classes of column 'label' differently"):
        load_image_data(str(tmp_path / "data"), streaming=True)
    splits = {"train": make_split(range(4)).rename_column("label", "kind"), "test": make_split(range(4))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="Split 'train' has no column 'label'"):
        load_image_data(str(tmp_path / "saved"), streaming=True)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"streaming": True, "max_train_samples": 5}, "`max_train_samples` takes images from all over a split"),
        ({"train_images": 5}, "`train_images` tells the length of a stream"),
        ({"streaming": True, "train_images": 39}, "`train_images`: split 'train' of .* has 40 images, got 39"),
        ({"streaming": True, "train_images": 0}, "`train_images` must be 1 or more, got 0"),
        ({"streaming": True, "eval_split": "train"}, "Split 'train' would train and evaluate, but a stream cannot be"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(two_splits, options, message):
    with pytest.raises(ValueError, match=message):
        load_image_data(two_splits, **options)
    assert load_image_data(two_splits, streaming=True, train_images=40).num_train == 40


def test_where_nothing_tells_the_length_of_a_stream_it_must_be_given(tmp_path):
    for split in ("train", "test"):
        for shade, name in enumerate(CLASSES):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (8, 8), (shade, number, 0)).save(tmp_path / split / name / f"{number}.png")
    with pytest.raises(ValueError, match="`train_images`: nothing tells how many images split 'train' of .* has"):
        load_image_data(str(tmp_path), streaming=True)
    data = load_image_data(str(tmp_path), streaming=True, train_images=6)
    assert data.num_train == 6 and len(list(data.train)) == 6


def test_an_image_of_a_streamed_calibration_set_is_named_by_its_row(tmp_path):
    split = make_split(range(20)).cast_column("image", datasets.Image(decode=False)).to_dict()
    split["image"][13] = {"bytes": b"broken", "path": None}
    datasets.Dataset.from_dict(split, features=make_split([0]).features).to_parquet(tmp_path / "train.parquet")
    make_split(range(4)).to_parquet(tmp_path / "test.parquet")
    data = load_image_data(str(tmp_path), streaming=True)
    with pytest.raises(ValueError, match="Row 13 of split 'train': the image in column 'image' cannot be read"):
        calibration_batches(data, digits_processor(), 20, 4, 0, num_labels=3)


def test_digits_are_ready_for_training():
    data = load_image_data("digits", seed=5)
    assert len(data.train) == 1347 and len(data.evaluation) == 450
    assert data.class_names == [str(digit) for digit in range(10)]
    dataset = ImageDataset(data.evaluation, digits_processor(), data.image_column, data.label_column, 10)
    assert dataset.pixel_values.shape == (450, 3, 8, 8)
    assert dataset.pixel_values.min() == -1 and dataset.pixel_values.max() == 1
    assert torch.equal(dataset.pixel_values[:, 0], dataset.pixel_values[:, 2])
    # The evaluation images do not depend on the seed: no seed's model may have seen them.
    assert load_image_data("digits", seed=6).evaluation[ROW_COLUMN][:] == data.evaluation[ROW_COLUMN][:]
    assert load_image_data("digits", evaluation_only=True).evaluation[:]["image"] == data.evaluation[:]["image"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real images beside the repository are not there")
def test_real_images_and_real_processor():
    data = load_image_data(str(SHARED / "imagenet-val-1000"), max_train_samples=20)
    assert len(data.train) == 20 and len(data.evaluation) == 500 and len(data.class_names) == 1000
    processor = load_processor(SHARED / "deit-tiny-patch16-224")
    calibration = calibration_batches(data, processor, 8, 4, 0, num_labels=1000)
    batch = next(iter(calibration))
    assert batch["pixel_values"].shape == (4, 3, 224, 224)
    assert abs(float(batch["pixel_values"].mean())) < 1 < float(batch["pixel_values"].std()) * 2
