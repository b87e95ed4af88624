"""Image and annotation stay together."""

import datasets
import numpy as np
import pytest
import torch
from conftest import shared
from made_data import encoded
from PIL import Image
from torch.utils.data import DataLoader
from transformers import DeiTImageProcessorPil, ViTImageProcessorPil

from hf_nose.crops import RandomResizedCrop
from hf_nose.sampling import Draw, EpochSampler
from hf_nose.segmentation import IGNORED, AnnotatedImages, SegmentationDataset
from hf_nose.sources import find_source
from hf_nose.specs import DatasetSpec, find_spec
from hf_nose.streams import ImageStream


pytestmark = pytest.mark.usefixtures("quick_streams")

ADE20K = find_spec("merve/scene_parse_150")
SIZE = (48, 32)
PROCESSOR = ViTImageProcessorPil(size={"height": SIZE[0], "width": SIZE[1]}, resample=2)
CROP = RandomResizedCrop.for_processor(PROCESSOR, 0, 0.2, 4 / 3)


def pair(number: int) -> tuple[dict, dict]:
    """White where the annotation is `number` + 1, black where it is void, parted at a random place."""
    random = np.random.default_rng(number)
    width, height = int(random.integers(60, 120)), int(random.integers(60, 120))
    mask = np.zeros((height, width), dtype=bool)
    mask[int(random.integers(10, height - 10)) :, int(random.integers(10, width - 10)) :] = True
    image = Image.fromarray(np.repeat(255 * mask[..., None].astype(np.uint8), 3, axis=2))
    return encoded(image), encoded(Image.fromarray(((number + 1) * mask).astype(np.uint8)))


def rows_of(pairs, split="validation") -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "annotation": datasets.Image()})
    columns = {"image": [image for image, _ in pairs], "annotation": [annotation for _, annotation in pairs]}
    return datasets.Dataset.from_dict(columns, features=features, split=datasets.Split(split))


# --- alignment -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", [None, CROP])
@pytest.mark.parametrize("streaming", [False, True])
def test_image_and_annotation_stay_aligned(crop, streaming):
    rows, read = rows_of([pair(number) for number in range(20)]), AnnotatedImages(PROCESSOR, ADE20K, crop)
    if streaming:
        data = ImageStream(rows.to_iterable_dataset(3), 20, read, seed=0, buffer_size=5)
        items = [item for epoch in (0, 1) for item in (data.set_epoch(epoch), list(data))[1]]
    else:
        data = SegmentationDataset(rows, read)
        items = [data[Draw(image, epoch)] for epoch in (0, 1) for image in range(20)]
    seen = []
    for item in items:
        assert item["pixel_values"].shape == (3, *SIZE) and item["labels"].shape == SIZE
        assert item["pixel_values"].dtype == torch.float32 and item["labels"].dtype == torch.int64
        is_white, has_class = item["pixel_values"][0] > 0, item["labels"] != IGNORED
        # But for pixels on the border, which nearest and bilinear see differently.
        assert (is_white != has_class).float().mean() < 0.06
        seen += item["labels"][has_class].unique().tolist()
    # A crop may miss the only object.
    assert set(seen) <= set(range(20)) and len(set(seen)) >= (20 if crop is None else 16)


def test_annotations_are_cut_by_the_images_box_and_by_the_nearest_pixel():
    pixels = np.random.default_rng(0).integers(0, 151, (90, 70), dtype=np.uint8)
    image = np.repeat(pixels[..., None], 3, axis=2)
    read = AnnotatedImages(PROCESSOR, ADE20K, CROP)
    rows = rows_of([(encoded(Image.fromarray(image)), encoded(Image.fromarray(pixels)))])
    draws = [Draw(0, epoch) for epoch in range(5)]
    cut = [SegmentationDataset(rows, read)[draw] for draw in draws]
    for draw, item in zip(draws, cut, strict=True):
        left, upper, right, lower = CROP.box(70, 90, draw)
        by_hand = Image.fromarray(pixels).crop((left, upper, right, lower)).resize((32, 48), Image.Resampling.NEAREST)
        expected = np.asarray(by_hand).astype(np.int64) - 1
        expected[expected < 0] = IGNORED
        assert np.array_equal(item["labels"].numpy(), expected)
        cut_image = CROP(Image.fromarray(image), draw)
        assert np.array_equal(item["pixel_values"].numpy(), PROCESSOR(cut_image, do_resize=False)["pixel_values"][0])
    assert len({item["labels"].numpy().tobytes() for item in cut}) == 5


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_draws_pairs_by_image_and_epoch(workers):
    rows, read = rows_of([pair(number) for number in range(7)]), AnnotatedImages(PROCESSOR, ADE20K, CROP)
    data, sampler = SegmentationDataset(rows, read), EpochSampler(7, 0)
    sampler.set_epoch(3)
    (batch,) = DataLoader(data, batch_size=7, sampler=sampler, num_workers=workers)
    for place, draw in enumerate(sampler):
        assert draw.epoch == 3
        assert all(torch.equal(batch[name][place], data[draw][name]) for name in ("pixel_values", "labels"))


def test_three_real_pairs_of_ade20k_stream_aligned():
    source = find_source(str(shared("ade20k-sample")))
    assert source.splits == ["validation"]
    processor = ViTImageProcessorPil(size={"height": 128, "width": 128}, resample=2)
    crop = RandomResizedCrop.for_processor(processor, 0, 0.2, 4 / 3)
    rows, length = source.stream("validation")
    stored = {}
    for row in source.load("validation"):
        image, annotation = row["image"].convert("RGB"), row["annotation"]
        assert image.size == annotation.size
        stored[image.size] = np.asarray(image), np.asarray(annotation)
    assert length == len(stored) == 3
    for cut in (None, crop):
        data = ImageStream(rows, length, AnnotatedImages(processor, ADE20K, cut), seed=0, buffer_size=3)
        for epoch in (0, 1):
            data.set_epoch(epoch)
            items, found = list(DataLoader(data, batch_size=3))[0], set()
            for place in range(3):
                pixel_values, labels = items["pixel_values"][place].numpy(), items["labels"][place].numpy()
                matching = [
                    size
                    for size, (image, annotation) in stored.items()
                    if is_made_of(pixel_values, labels, image, annotation, processor, cut, Draw(place, epoch))
                ]
                assert len(matching) == 1
                found.update(matching)
                classes = labels[labels != IGNORED]
                assert len(np.unique(classes)) > 1 and classes.min() >= 0 and classes.max() < 150
            assert found == set(stored)


def is_made_of(pixel_values, labels, image, annotation, processor, crop, draw) -> bool:
    """Whether both come from the same place of a stored pair, worked out by hand."""
    height, width = annotation.shape
    box = (0, 0, width, height) if crop is None else crop.box(width, height, draw)
    part = [Image.fromarray(pixels).crop(box) for pixels in (image, annotation)]
    expected = np.asarray(part[1].resize((128, 128), Image.Resampling.NEAREST)).astype(np.int64) - 1
    return np.array_equal(pixel_values, processor(part[0])["pixel_values"][0].astype(np.float32)) and np.array_equal(
        labels, np.where(expected < 0, IGNORED, expected)
    )


# --- what is refused -------------------------------------------------------------------------------------------------


def test_another_numbering_of_classes():
    spec = DatasetSpec("image", annotation_column="annotation", num_classes=11, void=11)
    annotation = np.array([[0, 10], [11, 3]], dtype=np.uint8)
    rows = rows_of([(encoded(Image.new("RGB", (2, 2))), encoded(Image.fromarray(annotation)))])
    processor = ViTImageProcessorPil(size={"height": 2, "width": 2})
    assert SegmentationDataset(rows, AnnotatedImages(processor, spec))[0]["labels"].tolist() == [[0, 10], [255, 3]]


@pytest.mark.parametrize(
    "annotation, message",
    [
        (Image.new("L", (60, 60), 151), "has the value 151 in its annotation, which is no class of DatasetSpec"),
        (Image.new("L", (59, 60)), "has an image of 60x60 pixels and an annotation of 59x60"),
        (Image.new("RGB", (60, 60)), "the image in column 'annotation' cannot be read: pixels of mode 'RGB' are no"),
        (None, "has no image in column 'annotation'"),
    ],
)
def test_pairs_that_cannot_be_used_are_named(annotation, message):
    cell = None if annotation is None else encoded(annotation)
    rows = rows_of([pair(0), (encoded(Image.new("RGB", (60, 60))), cell)])
    read = AnnotatedImages(PROCESSOR, ADE20K)
    with pytest.raises(ValueError, match=f"Row 1 of split 'validation':? {message}"):
        SegmentationDataset(rows, read)[1]
    # A stream of a data set in memory does not know the split's name.
    with pytest.raises(ValueError, match=f"Row 1:? {message}"):
        list(ImageStream(rows.to_iterable_dataset(), 2, read, seed=0, buffer_size=2))


def test_what_has_no_annotations_or_no_one_size_is_refused():
    with pytest.raises(ValueError, match="`spec` must name the column and number of classes of annotations"):
        AnnotatedImages(PROCESSOR, find_spec("uoft-cs/cifar10"))
    with pytest.raises(ValueError, match="`processor` crops in the middle after its resize"):
        AnnotatedImages(DeiTImageProcessorPil(), ADE20K)
    with pytest.raises(ValueError, match="`processor` brings images to no one size"):
        AnnotatedImages(ViTImageProcessorPil(size={"shortest_edge": 32}), ADE20K)
    with pytest.raises(ValueError, match="`index` must be a Draw, got 0"):
        SegmentationDataset(rows_of([pair(0)]), AnnotatedImages(PROCESSOR, ADE20K, CROP))[0]
