"""Decoding and processing, and the row named where it fails."""

import io
import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessorPil

from hf_nose.images import ImageBatches, ImageDataset, decode_image, digits_processor, load_processor


PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def encoded(image: Image.Image, file_format: str = "PNG", **options) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def split_of(cells: list, labels: list, name: str = "train", label=None) -> datasets.Dataset:
    label = label or datasets.ClassLabel(names=["cat", "dog", "owl"])
    features = datasets.Features({"image": datasets.Image(decode=False), "label": label})
    return datasets.Dataset.from_dict({"image": cells, "label": labels}, features=features, split=datasets.Split(name))


def cells_of(count: int, size=(8, 8)) -> list[dict]:
    generator = np.random.default_rng(1)
    return [encoded(Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8))) for _ in range(count)]


def test_rgb_is_decoded_as_stored():
    assert np.array_equal(np.asarray(decode_image(encoded(Image.fromarray(PIXELS)))), PIXELS)


def test_grey_fills_three_channels():
    image = decode_image(encoded(Image.fromarray(PIXELS[..., 0])))
    assert image.mode == "RGB"
    assert all(np.array_equal(np.asarray(image)[..., c], PIXELS[..., 0]) for c in range(3))


def test_alpha_is_dropped():
    rgba = np.concatenate([PIXELS, np.full((6, 8, 1), 7, dtype=np.uint8)], axis=2)
    assert np.array_equal(np.asarray(decode_image(encoded(Image.fromarray(rgba)))), PIXELS)


@pytest.mark.parametrize("transparency", [None, 1, bytes([0, 128])])
def test_palette_is_looked_up(transparency):
    image = Image.fromarray(np.array([[0, 1], [2, 1]], dtype=np.uint8), mode=None).convert("P")
    image.putdata([0, 1, 2, 1])
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    options = {} if transparency is None else {"transparency": transparency}
    decoded = np.asarray(decode_image(encoded(image, **options)))
    assert decoded.tolist() == [[[10, 20, 30], [40, 50, 60]], [[70, 80, 90], [40, 50, 60]]]


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    image = decode_image(encoded(Image.fromarray(PIXELS), exif=exif))
    assert np.array_equal(np.asarray(image), np.rot90(PIXELS, k=-1))


def test_sixteen_bit_grey_keeps_its_upper_bits():
    grey = np.array([[0, 255, 256], [4660, 32768, 65535]], dtype=np.uint16)
    assert np.asarray(decode_image(encoded(Image.fromarray(grey))))[..., 0].tolist() == (grey >> 8).tolist()


def test_pixels_without_a_range_are_refused():
    with pytest.raises(ValueError, match="mode 'F' have no fixed range"):
        decode_image(encoded(Image.fromarray(np.ones((2, 2), dtype=np.float32)), "TIFF"))


def test_items_are_what_the_processor_makes():
    split = split_of(cells_of(3), [0, 2, 1])
    processor = digits_processor()
    dataset = ImageDataset(split, processor, "image", "label")
    assert len(dataset) == 3
    for index, label in enumerate([0, 2, 1]):
        pixels = np.asarray(decode_image(split[index]["image"]), dtype=np.float64)
        item = dataset[index]
        assert item["labels"] == label
        assert item["pixel_values"].dtype == torch.float32
        expected = torch.from_numpy((pixels / 255 - 0.5) / 0.5).permute(2, 0, 1).float()
        torch.testing.assert_close(item["pixel_values"], expected)


def test_kept_in_memory_or_not_gives_the_same_and_memory_is_read_once(monkeypatch):
    split = split_of(cells_of(5), [0, 1, 2, 1, 0])
    kept = ImageDataset(split, digits_processor(), "image", "label")
    streamed = ImageDataset(split, digits_processor(), "image", "label", max_bytes=5 * 3 * 8 * 8 * 4 - 1)
    assert kept.pixel_values is not None and streamed.pixel_values is None
    for index in range(5):
        assert torch.equal(kept[index]["pixel_values"], streamed[index]["pixel_values"])
    monkeypatch.setattr(ImageDataset, "decode", lambda self, index: pytest.fail("decoded again"))
    kept[3]


@pytest.mark.parametrize("max_bytes", [0, 2**20])
def test_items_collate_in_a_loader_with_workers(max_bytes):
    dataset = ImageDataset(split_of(cells_of(5), [0, 1, 2, 1, 0]), digits_processor(), "image", "label", 3, max_bytes)
    batches = list(torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=1))
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == [0, 1, 2, 1, 0]
    expected = torch.stack([dataset[index]["pixel_values"] for index in range(5)])
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in batches]), expected)


@pytest.mark.parametrize("broken", [b"not an image", b""])
@pytest.mark.parametrize("max_bytes", [0, 2**20])
def test_unreadable_image_names_split_and_row(broken, max_bytes):
    cells = [*cells_of(4), {"bytes": broken, "path": None}]
    split = split_of(cells, [0] * 5, name="validation")
    with pytest.raises(ValueError, match="Row 4 of split 'validation': the image in column 'image' cannot be read"):
        ImageDataset(split, digits_processor(), "image", "label", max_bytes=max_bytes)[4]


@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_truncated_image_names_split_and_row(file_format):
    whole = encoded(
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), file_format
    )
    cells = [whole, {"bytes": whole["bytes"][: len(whole["bytes"]) // 2], "path": None}]
    with pytest.raises(ValueError, match="Row 1 of split 'train'.*cannot be read"):
        ImageDataset(split_of(cells, [0, 0]), digits_processor(), "image", "label")


def test_missing_file_and_missing_cell_name_the_row(tmp_path):
    cells = [*cells_of(1), {"bytes": None, "path": str(tmp_path / "gone.png")}]
    with pytest.raises(ValueError, match=r"Row 1 of split 'train'.*gone\.png\) cannot be read"):
        ImageDataset(split_of(cells, [0, 0]), digits_processor(), "image", "label")
    with pytest.raises(ValueError, match="Row 1 of split 'train' has no image in column 'image'"):
        ImageDataset(split_of([*cells_of(1), None], [0, 0]), digits_processor(), "image", "label")


@pytest.mark.parametrize("label", [-1, 3, None])
def test_label_outside_the_classes_names_the_row(label):
    split = split_of(cells_of(3), [0, label, 2], name="test", label=datasets.Value("int64"))
    with pytest.raises(ValueError, match=rf"Row 1 of split 'test' has label {label} .* between 0 and 2"):
        ImageDataset(split, digits_processor(), "image", "label", num_labels=3)


def test_more_class_names_than_the_model_has_are_fine_as_long_as_labels_fit():
    split = split_of(cells_of(2), [0, 2])
    assert len(ImageDataset(split, digits_processor(), "image", "label", num_labels=3)) == 2
    with pytest.raises(ValueError, match="has label 2 .* between 0 and 1"):
        ImageDataset(split, digits_processor(), "image", "label", num_labels=2)


@pytest.mark.parametrize("max_bytes", [0, 2**20])
def test_images_of_unequal_shape_are_refused_where_the_processor_keeps_them(max_bytes):
    split = split_of([*cells_of(2), *cells_of(1, (8, 9))], [0, 0, 0])
    with pytest.raises(ValueError, match=r"Row 2 of split 'train' has shape \(3, 8, 9\)"):
        ImageDataset(split, ViTImageProcessorPil(do_resize=False), "image", "label", max_bytes=max_bytes)[2]


def test_batches_repeat_and_the_last_may_be_smaller():
    dataset = ImageDataset(split_of(cells_of(5), [0, 1, 2, 1, 0]), digits_processor(), "image", "label")
    batches = ImageBatches(dataset, 2)
    assert len(batches) == 3
    for _ in range(2):
        assert [batch["labels"].tolist() for batch in batches] == [[0, 1], [2, 1], [0]]
    assert batches[0]["labels"].dtype == torch.int64
    stacked = torch.cat([batch["pixel_values"] for batch in batches])
    assert torch.equal(stacked, torch.stack([dataset[index]["pixel_values"] for index in range(5)]))
    with pytest.raises(IndexError):
        batches[3]
    with pytest.raises(ValueError, match="`batch_size` must be 1 or more, got 0"):
        ImageBatches(dataset, 0)


def test_processor_of_a_folder_is_the_pillow_one(tmp_path):
    digits_processor().save_pretrained(tmp_path)
    processor = load_processor(tmp_path)
    assert processor.backend == "pil"
    assert processor.to_dict() == digits_processor().to_dict()
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"holds no preprocessor_config\.json"):
        load_processor(tmp_path)


def test_processor_keeps_size_mean_std_and_interpolation(tmp_path):
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    record = {"image_processor_type": "ViTImageProcessor", "size": {"height": 224, "width": 224}, "resample": 3}
    record |= {"do_resize": True, "do_rescale": True, "do_normalize": True, "image_mean": mean, "image_std": std}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(record))
    processor = load_processor(str(tmp_path))
    assert (processor.size["height"], processor.size["width"], int(processor.resample)) == (224, 224, 3)
    image = processor(Image.fromarray(PIXELS), return_tensors="pt")["pixel_values"]
    by_hand = np.asarray(Image.fromarray(PIXELS).resize((224, 224), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    by_hand = (by_hand - np.array(mean)) / np.array(std)
    torch.testing.assert_close(image[0], torch.from_numpy(by_hand).permute(2, 0, 1).float(), atol=1e-5, rtol=1e-5)
