"""Streams with a length: order, workers, rows that cannot be used."""

import datasets
import numpy as np
import pytest
import torch
from made_data import encoded, numbered, numbers, odd, write_numbered, write_shards
from PIL import Image
from torch.utils.data import DataLoader
from transformers import ViTImageProcessorPil

from hf_nose.crops import RandomResizedCrop
from hf_nose.data import load_image_data
from hf_nose.images import ImageDataset, decode_image, digits_processor
from hf_nose.sampling import Draw
from hf_nose.streams import ImageStream, LabelledImages


pytestmark = pytest.mark.usefixtures("quick_streams")

COUNT = 23
PROCESSOR = ViTImageProcessorPil(size={"height": 12, "width": 12}, resample=2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_numbered(tmp_path_factory.mktemp("data"), train=COUNT, evaluation=4, shards=3)


def stream_of(folder, seed=0, buffer_size=8, crop=None, processor=None, num_labels=3, **options):
    data = load_image_data(str(folder), streaming=True, **options)
    columns = data.image_column, data.label_column
    read = LabelledImages(processor or digits_processor(), *columns, num_labels, crop)
    return ImageStream(data.train, data.num_train, read, seed, buffer_size)


def epoch_of(stream, epoch=0, workers=0, batch_size=4):
    """The batches of an epoch as a loader makes them."""
    stream.batch_size = batch_size
    stream.set_epoch(epoch)
    return list(DataLoader(stream, batch_size=batch_size, num_workers=workers))


def numbers_of(batches):
    return [number for batch in batches for number in numbers(batch["pixel_values"])]


# --- what comes when -------------------------------------------------------------------------------------------------


def test_every_image_comes_once_an_epoch_with_its_label(shards):
    stream = stream_of(shards)
    batches = epoch_of(stream)
    assert len(stream) == COUNT and len(DataLoader(stream, batch_size=4)) == len(batches) == 6
    found = numbers_of(batches)
    assert sorted(found) == list(range(COUNT)) and found != sorted(found)
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == [number % 3 for number in found]
    assert batches[0]["pixel_values"].dtype == torch.float32 and batches[0]["pixel_values"].shape == (4, 3, 8, 8)


def test_the_order_depends_on_seed_and_epoch_alone(shards):
    stream = stream_of(shards)
    orders = [numbers_of(epoch_of(stream, epoch)) for epoch in (0, 1, 2, 0)]
    assert orders[0] == orders[3]
    assert len({tuple(order) for order in orders}) == 3
    assert numbers_of(epoch_of(stream_of(shards), 1)) == orders[1]
    assert numbers_of(epoch_of(stream_of(shards, seed=1), 1)) != orders[1]


def test_shards_are_mixed_even_by_a_small_buffer(shards):
    first = [numbers_of(epoch_of(stream_of(shards, buffer_size=6), epoch))[:6] for epoch in range(4)]
    # Shards hold 8, 8 and 7 images.
    assert all(len({number // 8 for number in found}) > 1 for found in first)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing_whatever_the_number_of_shards(shards, workers):
    stream = stream_of(shards, crop=RandomResizedCrop(0, 8, 8, 2))
    for epoch in (0, 1):
        alone, several = epoch_of(stream, epoch), epoch_of(stream, epoch, workers)
        assert [len(batch["labels"]) for batch in several] == [4, 4, 4, 4, 4, 3]
        for one, other in zip(alone, several, strict=True):
            assert torch.equal(one["pixel_values"], other["pixel_values"])
            assert torch.equal(one["labels"], other["labels"])


@pytest.mark.parametrize("length, found", [(COUNT - 1, "more"), (COUNT + 1, f"only {COUNT}"), (20, "more")])
def test_a_stream_of_another_length_is_found_out(shards, length, found):
    stream = stream_of(shards)
    stream.length, items = length, []
    with pytest.raises(ValueError, match=f"said to have {length} images and has {found}. Set train_images"):
        for item in stream:
            items.append(item)
    # What is too much is not trained on.
    assert len(items) == min(length, COUNT)


@pytest.mark.parametrize("name", ["length", "buffer_size", "batch_size"])
def test_numbers_out_of_range_are_named(shards, name):
    stream = stream_of(shards)
    values = {"length": 1, "buffer_size": 1, "batch_size": 1, name: 0}
    with pytest.raises(ValueError, match=f"`{name}` must be 1 or more, got 0"):
        ImageStream(stream.source, read=stream.read, seed=0, **values)


# --- crops -----------------------------------------------------------------------------------------------------------


def test_crops_are_drawn_for_the_place_in_the_epoch(tmp_path):
    folder = write_shards(tmp_path, "train", [odd(0)] * 6, {"label": ([0] * 6, 3)}, 2)
    write_shards(folder, "test", [odd(0)], {"label": ([0], 3)}, 1)
    crop = RandomResizedCrop.for_processor(PROCESSOR, 3, 0.2, 4 / 3)
    stream = stream_of(folder, crop=crop, processor=PROCESSOR)
    pixels = decode_image(odd(0))
    for epoch in (0, 1):
        (batch,) = epoch_of(stream, epoch, batch_size=6)
        for place in range(6):
            cut = crop(pixels, Draw(place, epoch))
            expected = PROCESSOR(cut, do_resize=False)["pixel_values"][0]
            assert np.array_equal(batch["pixel_values"][place].numpy(), expected.astype(np.float32))
        assert len({image.numpy().tobytes() for image in batch["pixel_values"]}) == 6


# --- layouts of the Hub ----------------------------------------------------------------------------------------------


LAYOUTS = {
    "ILSVRC/imagenet-1k": ("image", {"label": 1000}, "validation"),
    "uoft-cs/cifar10": ("img", {"label": 10}, "test"),
    "uoft-cs/cifar100": ("img", {"fine_label": 100, "coarse_label": 20}, "test"),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def copy(request, tmp_path_factory):
    """A copy of a data set of the Hub, in three shards, with grey, CMYK and turned images; its id and its root."""
    image_column, columns, evaluation = LAYOUTS[request.param]
    root = tmp_path_factory.mktemp("hub")
    for split, count, parts in (("train", 20, 3), (evaluation, 7, 1)):
        labels = {name: ([n % classes for n in range(count)], classes) for name, classes in columns.items()}
        cells = [odd(number) for number in range(count)]
        write_shards(root / request.param / "data", split, cells, labels, parts, image_column)
    return request.param, root


@pytest.mark.parametrize("by_id", [True, False])
def test_a_data_set_of_the_hub_and_its_copy_stream_through_one_spec(copy, by_id, monkeypatch):
    dataset_id, root = copy
    # Relative to here the id is a folder, which is what the Hub's own loader takes first.
    monkeypatch.chdir(root)
    options = {} if by_id else {"dataset_id": dataset_id}
    dataset = dataset_id if by_id else str(root / dataset_id)
    data = load_image_data(dataset, **options)
    image_column, columns, _ = LAYOUTS[dataset_id]
    assert (data.image_column, data.label_column) == (image_column, next(iter(columns)))
    assert len(data.class_names) == next(iter(columns.values()))
    assert (data.num_train, len(data.evaluation)) == (20, 7)

    stream = stream_of(dataset, processor=PROCESSOR, num_labels=1000, **options)
    assert len(stream) == 20
    (batch,) = epoch_of(stream, batch_size=20)
    loaded = ImageDataset(data.train, PROCESSOR, data.image_column, data.label_column)
    expected = {item["labels"]: item["pixel_values"] for item in (loaded[row] for row in range(20))}
    if dataset_id == "uoft-cs/cifar10":
        assert sorted(batch["labels"].tolist()) == sorted([*range(10)] * 2)
        return
    assert sorted(batch["labels"].tolist()) == list(range(20))
    for label, pixel_values in zip(batch["labels"].tolist(), batch["pixel_values"], strict=True):
        assert torch.equal(pixel_values, expected[label])
        # Made by hand: grey in three channels, CMYK as RGB, turned as the camera was held.
        by_hand = decode_image(odd(label))
        assert by_hand.size == ((16, 20) if label % 6 == 5 else (20, 16)) and by_hand.mode == "RGB"
        assert torch.equal(pixel_values, torch.from_numpy(PROCESSOR(by_hand)["pixel_values"][0]).float())


# --- rows that cannot be used ----------------------------------------------------------------------------------------


def spoiled(folder, row, cell=None, label=0):
    cells = [numbered(number) for number in range(COUNT)]
    labels = [number % 3 for number in range(COUNT)]
    cells[row], labels[row] = cell, label
    write_shards(folder, "train", cells, {"label": (labels, 9)}, 3)
    return write_shards(folder, "test", cells[:2], {"label": (labels[:2], 9)}, 1)


@pytest.mark.parametrize(
    "cell, label, message",
    [
        ({"bytes": b"broken", "path": None}, 0, "Row 17 of split 'train': the image in column 'image' cannot be read"),
        ({"bytes": b"broken", "path": "n01_7.JPEG"}, 0, r"Row 17 of split 'train': .* \(n01_7.JPEG\) cannot be read"),
        (None, 0, "Row 17 of split 'train' has no image in column 'image'"),
        (numbered(17), 5, "Row 17 of split 'train' has label 5 in column 'label'; labels must be between 0 and 2"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_as_in_the_files(tmp_path, caplog, cell, label, message):
    stream = stream_of(spoiled(tmp_path, 17, cell, label))
    with pytest.raises(ValueError, match=message):
        epoch_of(stream)
    assert "Its number is being looked for from the beginning" in caplog.text


def test_a_worker_finds_the_row_too(tmp_path):
    stream = stream_of(spoiled(tmp_path, 17))
    with pytest.raises(ValueError, match="Row 17 of split 'train' has no image in column 'image'"):
        epoch_of(stream, workers=2)


def test_an_image_of_another_shape_is_named(tmp_path):
    cell = encoded(Image.new("RGB", (9, 8)))
    stream = stream_of(spoiled(tmp_path, 17, cell), processor=ViTImageProcessorPil(do_resize=False))
    with pytest.raises(ValueError, match=r"Row 17 of split 'train' has shape \(3, 8, 9\) after processing, others"):
        epoch_of(stream)


def test_data_that_change_while_they_are_read_are_found_out(tmp_path):
    stream = stream_of(spoiled(tmp_path, 17, {"bytes": b"broken", "path": None}))
    whole = datasets.Dataset.from_dict({"image": [numbered(1)], "label": [0]}).to_iterable_dataset()
    rows, stream.source = stream.source, whole
    stream.source.shuffle = rows.shuffle
    with pytest.raises(RuntimeError, match="have changed while they were read"):
        epoch_of(stream)
