"""Random crops: their distribution, and that a resume draws them again."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from transformers import DeiTImageProcessorPil, ViTImageProcessorPil

from hf_nose.crops import RandomResizedCrop, input_size
from hf_nose.images import prepare_images
from hf_nose.sampling import Draw


PIXELS = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)


def crop(seed=0, scale=0.08, ratio=4 / 3, size=(16, 16), resample=3):
    return RandomResizedCrop(seed, *size, resample, scale, ratio)


def boxes(found, count=400, size=(500, 500)):
    return np.array([found.box(*size, Draw(image, 0)) for image in range(count)])


# --- what a box depends on -------------------------------------------------------------------------------------------


def test_a_box_depends_on_seed_image_epoch_and_repeat_and_on_nothing_else():
    draw = Draw(5, 2, 1)
    first = crop(3).box(300, 200, draw)
    np.random.seed(1)
    assert crop(3).box(300, 200, draw) == first
    others = [crop(4).box(300, 200, draw)]
    others += [crop(3).box(300, 200, draw._replace(**{name: 7})) for name in Draw._fields]
    assert len({first, *others}) == 5


@given(st.integers(1, 700), st.integers(1, 700), st.integers(0, 1000), st.floats(0.01, 1), st.floats(1, 3))
def test_a_box_lies_inside_the_image(width, height, image, scale, ratio):
    left, upper, right, lower = crop(0, scale, ratio).box(width, height, Draw(image, 0))
    assert 0 <= left < right <= width and 0 <= upper < lower <= height


@given(st.integers(200, 700), st.integers(200, 700), st.integers(0, 1000), st.floats(0.05, 1), st.floats(1, 2))
def test_area_and_ratio_of_a_box_are_those_allowed(width, height, image, scale, ratio):
    # In longer images the box may be smaller than allowed: the largest in the middle.
    assume(max(width / height, height / width) <= ratio)
    left, upper, right, lower = crop(0, scale, ratio).box(width, height, Draw(image, 0))
    share = (right - left) * (lower - upper) / (width * height)
    assert scale - 0.02 <= share <= 1
    assert 0.97 / ratio <= (right - left) / (lower - upper) <= ratio / 0.97


def test_areas_and_ratios_are_spread_as_in_the_recipe():
    left, upper, right, lower = boxes(crop(ratio=1.0)).T
    share = (right - left) * (lower - upper) / 500**2
    assert (share < 0.1).mean() == pytest.approx(0.02 / 0.92, abs=0.03)
    assert [np.quantile(share, q) for q in (0.25, 0.5, 0.75)] == pytest.approx([0.31, 0.54, 0.77], abs=0.06)
    left, upper, right, lower = boxes(crop(scale=0.08)).T
    ratio = np.log((right - left) / (lower - upper)) / math.log(4 / 3)
    assert abs(ratio.mean()) < 0.1 and ratio.min() < -0.9 and ratio.max() > 0.9
    # Everywhere in the image: where the box does not fill it, it lies left and right alike.
    room = 500 - (right - left)
    assert (left / np.maximum(room, 1)).mean() == pytest.approx(0.5, abs=0.06)
    assert (upper / np.maximum(500 - (lower - upper), 1)).mean() == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize(
    "size, box", [((100, 10), (43, 0, 56, 10)), ((10, 100), (0, 43, 10, 56)), ((12, 10), (0, 0, 12, 10))]
)
def test_where_no_box_fits_the_largest_in_the_middle_is_taken(size, box):
    assert crop(scale=1.0).box(*size, Draw(0, 0)) == box


# --- what comes out --------------------------------------------------------------------------------------------------


def test_the_whole_image_comes_out_as_the_processor_would_resize_it():
    image, processor = Image.fromarray(PIXELS), ViTImageProcessorPil(size={"height": 24, "width": 24}, resample=3)
    whole = RandomResizedCrop.for_processor(processor, 0, scale=1.0, ratio=1.0)
    cut = whole(image, Draw(0, 0))
    assert cut.size == (24, 24)
    expected = processor(image)["pixel_values"][0]
    assert np.array_equal(processor(cut, do_resize=False)["pixel_values"][0], expected)


def test_a_crop_is_neither_resized_nor_cut_again():
    processor = DeiTImageProcessorPil(size={"height": 24, "width": 24}, crop_size={"height": 16, "width": 16})
    found = RandomResizedCrop.for_processor(processor, 0, 0.2, 4 / 3)
    (prepared,) = prepare_images([Image.fromarray(PIXELS)], processor, found, [Draw(0, 0)])
    cut = np.asarray(found(Image.fromarray(PIXELS), Draw(0, 0))).transpose(2, 0, 1) / 255
    mean, std = (np.array(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    assert prepared.shape == (3, 16, 16)
    np.testing.assert_allclose(prepared, (cut - mean) / std, atol=1e-5)


@pytest.mark.parametrize("resample", [0, 2, 3])
def test_pixels_outside_of_the_box_play_no_part(resample):
    found = crop(size=(20, 30), resample=resample)
    box = found.box(40, 40, Draw(1, 1))
    part = PIXELS[box[1] : box[3], box[0] : box[2]]
    expected = Image.fromarray(part).resize((30, 20), Image.Resampling(resample))
    assert np.array_equal(np.asarray(found(Image.fromarray(PIXELS), Draw(1, 1))), np.asarray(expected))


def test_size_and_interpolation_are_the_processors():
    plain = ViTImageProcessorPil(size={"height": 32, "width": 48}, resample=2)
    found = RandomResizedCrop.for_processor(plain, 5, 0.2, 1.5)
    assert found == RandomResizedCrop(seed=5, height=32, width=48, resample=2, scale=0.2, ratio=1.5)
    # Resized to 256 and cut to 224: the model sees 224.
    cut = DeiTImageProcessorPil(size={"height": 256, "width": 256}, crop_size={"height": 224, "width": 224})
    assert input_size(cut) == (224, 224)


@pytest.mark.parametrize("options", [{"size": {"shortest_edge": 32}}, {"do_resize": False}])
def test_a_processor_without_one_size_is_refused(options):
    with pytest.raises(ValueError, match="`processor` brings images to no one size"):
        input_size(ViTImageProcessorPil(**options))


@pytest.mark.parametrize("scale", [0.0, -0.1, 1.1, math.nan])
def test_scales_out_of_range_are_named(scale):
    with pytest.raises(ValueError, match=r"`scale` must be in \(0, 1\], got"):
        crop(scale=scale)


@pytest.mark.parametrize("ratio", [0.9, math.inf, math.nan])
def test_ratios_out_of_range_are_named(ratio):
    with pytest.raises(ValueError, match="`ratio` must be 1 or more, got"):
        crop(ratio=ratio)
