"""RandAugment and colour jitter: the operations are Pillow's, the draws are the recipe's, image by image."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from hf_nose.image_operations import OPERATIONS, color_jitter, eight_bit, rand_augment


MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
LEVEL = 0.9
FILL = tuple(round(255 * float(value)) for value in MEAN)


@pytest.fixture(scope="module")
def picture():
    pixels = np.random.default_rng(0).integers(20, 240, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((32, 24), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def images(picture):
    """The picture as training has it: normalised by the processor, and back."""
    pixels = tensor(picture)
    shift, scale = MEAN[:, None, None], STD[:, None, None]
    return (((pixels - shift) / scale) * scale + shift).clamp(0, 1)


def tensor(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


def batch(count, size=16, seed=0):
    return eight_bit(torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)))


def transformed(picture, *matrix):
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=FILL)


def solarized_add(picture, addition):
    pixels = np.array(picture).astype(int)
    return Image.fromarray(np.where(pixels < 128, pixels + addition, pixels).clip(0, 255).astype(np.uint8))


def by_pillow(name, picture, sign):
    """What the published code does at magnitude 9, with its ranges: Cubuk et al.'s, "increasing"."""
    width, height = picture.size
    factor = max(0.1, 1 + sign * LEVEL * 0.9)
    # Pillow's matrices lead from the new place to the old one.
    shear, move = -sign * LEVEL * 0.3, -sign * LEVEL * 0.45
    return {
        "auto_contrast": lambda: ImageOps.autocontrast(picture),
        "equalize": lambda: ImageOps.equalize(picture),
        "invert": lambda: ImageOps.invert(picture),
        "rotate": lambda: picture.rotate(-sign * LEVEL * 30, Image.Resampling.BILINEAR, fillcolor=FILL),
        "posterize": lambda: ImageOps.posterize(picture, 4 - int(LEVEL * 4)),
        "solarize": lambda: ImageOps.solarize(picture, 256 - int(LEVEL * 256)),
        "solarize_add": lambda: solarized_add(picture, int(LEVEL * 110)),
        "color": lambda: ImageEnhance.Color(picture).enhance(factor),
        "contrast": lambda: ImageEnhance.Contrast(picture).enhance(factor),
        "brightness": lambda: ImageEnhance.Brightness(picture).enhance(factor),
        "sharpness": lambda: ImageEnhance.Sharpness(picture).enhance(factor),
        "shear_x": lambda: transformed(picture, 1, shear, 0, 0, 1, 0),
        "shear_y": lambda: transformed(picture, 1, 0, 0, shear, 1, 0),
        "translate_x": lambda: transformed(picture, 1, 0, move * width, 0, 1, 0),
        "translate_y": lambda: transformed(picture, 1, 0, 0, 0, 1, move * height),
    }[name]()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_those_of_pillow(picture, images, name, sign):
    found = OPERATIONS[name](images, torch.tensor([LEVEL]), torch.tensor([sign]), MEAN).clamp(0, 1)
    levels = 255 * (found - tensor(by_pillow(name, picture, sign))).abs()
    if name.startswith(("rotate", "shear", "translate")):
        # At the edge of what is moved in, Pillow does not mix the fill with the picture.
        assert levels.median() <= 1 and (levels > 4).float().mean() < 0.06
    else:
        assert levels.max() < 1.5


def test_fifteen_operations_at_the_published_magnitudes():
    assert len(OPERATIONS) == 15


def test_equalizing_and_posterizing_need_whole_eight_bit_values(images, picture):
    """Undoing the normalisation leaves errors that a cut-off turns into whole levels: why they are rounded first."""
    exact = tensor(picture)
    assert ((255 * images).long() != (255 * exact).long()).float().mean() > 0.05
    assert torch.equal((255 * eight_bit(images)).long(), (255 * exact).round().long())


@pytest.mark.parametrize("name", ["equalize", "posterize"])
def test_no_eight_bit_value_falls_on_the_wrong_side_of_a_cut(name):
    levels = np.random.default_rng(1).permutation(256).astype(np.uint8)
    ramp = Image.fromarray(np.stack([levels, levels[::-1], np.roll(levels, 7)], -1).reshape(16, 16, 3))
    shift, scale = MEAN[:, None, None], STD[:, None, None]
    images = ((tensor(ramp) - shift) / scale) * scale + shift
    found = OPERATIONS[name](images.clamp(0, 1), torch.tensor([0.4]), torch.ones(1), MEAN)
    expected = ImageOps.equalize(ramp) if name == "equalize" else ImageOps.posterize(ramp, 4 - int(0.4 * 4))
    torch.testing.assert_close(found, tensor(expected), rtol=0, atol=1e-6)


def test_auto_contrast_leaves_a_constant_channel_alone():
    grey = torch.full((1, 3, 4, 4), 0.4)
    grey[0, 1, 0, 0] = 0.8
    found = OPERATIONS["auto_contrast"](grey, torch.ones(1), torch.ones(1), MEAN)
    assert torch.equal(found[0, 0], grey[0, 0]) and found[0, 1, 0, 0] == 1 and found[0, 1, 1, 1] == 0


def test_rand_augment_draws_for_every_image():
    """kornia's own class would do the same operations to the whole batch."""
    one = batch(1).expand(64, -1, -1, -1)
    found = rand_augment(one, 9.0, MEAN, torch.Generator().manual_seed(0))
    different = {image.numpy().tobytes() for image in found}
    # A quarter of the images gets neither of the two operations.
    untouched = sum(torch.equal(image, one[0]) for image in found) / 64
    assert len(different) > 30
    assert 0.1 < untouched < 0.45


def test_rand_augment_draws_all_operations_alike_often(monkeypatch):
    counts = dict.fromkeys(OPERATIONS, 0)
    levels, signs = [], []

    def counted(name):
        def operation(images, level, sign, fill):
            counts[name] += len(images)
            levels.append(level)
            signs.append(sign)
            assert len(images) == len(level) == len(sign)
            return images

        return operation

    for name in OPERATIONS:
        monkeypatch.setitem(OPERATIONS, name, counted(name))
    rand_augment(torch.zeros(6000, 3, 1, 1), 9.0, MEAN, torch.Generator().manual_seed(1))
    # Two operations an image, each done half of the time, by fifteen: 400 each.
    assert all(300 < count < 500 for count in counts.values())
    level, sign = torch.cat(levels), torch.cat(signs)
    # Normal around 9 of 10 with a deviation of 0.5, cut off at 10: 0.8 of the deviations are left.
    assert level.max() == 1 and 0.89 < level.mean() < 0.91 and 0.03 < level.std() < 0.05
    assert set(sign.tolist()) == {-1.0, 1.0} and abs(sign.mean()) < 0.05


@pytest.mark.parametrize("magnitude", [1.0, 9.0, 10.0])
def test_rand_augment_stays_in_range_and_changes_no_input(magnitude):
    images = batch(48)
    before = images.clone()
    found = rand_augment(images, magnitude, MEAN, torch.Generator().manual_seed(2))
    assert torch.equal(images, before)
    assert found.shape == images.shape and found.min() >= 0 and found.max() <= 1 and found.isfinite().all()


def test_a_small_magnitude_rotates_and_moves_less():
    images = batch(4)
    distances = []
    for magnitude in (0.1, 0.5, 1.0):
        level = torch.full((4,), magnitude)
        found = OPERATIONS["translate_x"](images, level, torch.ones(4), MEAN)
        distances.append(int((found[0, 0, 5] - float(MEAN[0])).abs().gt(1e-5).float().argmax()))
    assert distances == [math.floor(0.45 * 16 * magnitude) for magnitude in (0.1, 0.5, 1.0)]


def test_color_jitter_draws_factors_for_every_image():
    one = batch(1).expand(200, -1, -1, -1) * 0.5
    found = color_jitter(one, 0.4, torch.Generator().manual_seed(3))
    assert len({image.numpy().tobytes() for image in found}) == 200
    ratios = found.mean((1, 2, 3)) / one.mean((1, 2, 3))
    assert 0.55 < ratios.min() < 0.7 and 1.3 < ratios.max() < 1.45
    assert found.min() >= 0 and found.max() <= 1


def test_color_jitter_changes_brightness_contrast_and_saturation():
    """A grey image has no saturation, a constant one no contrast: what is left there is told apart."""
    colourful = torch.tensor([0.2, 0.5, 0.3])[:, None, None].expand(50, 3, 4, 4)
    found = color_jitter(colourful, 0.4, torch.Generator().manual_seed(4))
    spread = (found.amax(1) - found.amin(1)) / found.mean(1)
    assert spread[:, 0, 0].std() > 0.05
    grey = torch.linspace(0.3, 0.5, 16).view(1, 1, 4, 4).expand(50, 3, 4, 4)
    found = color_jitter(grey, 0.4, torch.Generator().manual_seed(5))
    assert torch.allclose(found[:, 0], found[:, 2], atol=1e-6)
    contrast = found[:, 0].flatten(1).std(1) / found[:, 0].flatten(1).mean(1)
    assert contrast.std() > 0.02


@pytest.mark.parametrize("draw", [lambda x, g: rand_augment(x, 9.0, MEAN, g), lambda x, g: color_jitter(x, 0.4, g)])
def test_nothing_is_drawn_from_the_global_generator(draw):
    images = batch(32)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = draw(images, torch.Generator().manual_seed(7))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    second = draw(images, torch.Generator().manual_seed(7))
    assert torch.equal(first, second)
    assert not torch.equal(first, draw(images, torch.Generator().manual_seed(8)))
