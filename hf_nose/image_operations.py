"""RandAugment and colour jitter on batches in [0, 1], image by image, made of kornia's functions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from kornia.enhance import (
    adjust_brightness_accumulative,
    adjust_contrast_with_mean_subtraction,
    adjust_saturation_with_gray_subtraction,
    equalize,
    invert,
    posterize,
    sharpness,
    solarize,
)
from kornia.geometry.transform import warp_affine


# DeiT's "rand-m9-mstd0.5-inc1": two operations an image, each done with probability 0.5, at a magnitude of 9 +- 0.5.
NUM_OPERATIONS = 2
PROBABILITY = 0.5
MAGNITUDE_STD = 0.5
MAX_MAGNITUDE = 10
# (images (n, 3, height, width), level (n,) in [0, 1], sign (n,) of -1 and 1, fill (3,)) -> images. Levels stay on the
# CPU, where they are drawn; kornia moves them.
Operation = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def rand_augment(
    images: torch.Tensor, magnitude: float, fill: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """
    RandAugment (Cubuk et al., arXiv 1909.13719) with the fifteen operations and ranges of the published DeiT recipe.

    kornia's own `RandAugment` falls short of that recipe, so only its functions are used: it draws its operations once
    for a whole batch; its magnitude 9 counts on a scale of 30, where the recipe's is of 10; its shear of 0.27 is 49
    degrees instead of 15; it only ever brightens or only ever darkens at a magnitude; it moves by a tenth of the image
    instead of 45 %; and it adds to every pixel before solarizing. What differs from the recipe here: pixels are not
    rounded to 8 bits between two operations, and rotated images are interpolated bilinearly, not bicubically.

    Args:
        images (`torch.Tensor` of shape `(batch, 3, height, width)`): In [0, 1], not changed.
        magnitude (`float`): Mean magnitude, in (0, 10].
        fill (`torch.Tensor` of shape `(3,)`): Colour of what is moved in from outside the image.
        generator (`torch.Generator`): On the CPU; draws operations, magnitudes and signs of every image.

    Returns:
        `torch.Tensor`: a batch of the same shape, in [0, 1].
    """
    images, batch = images.clone(), len(images)
    for _ in range(NUM_OPERATIONS):
        drawn = torch.randint(len(OPERATIONS), (batch,), generator=generator)
        is_done = torch.rand(batch, generator=generator) < PROBABILITY
        noise = MAGNITUDE_STD * torch.randn(batch, generator=generator)
        levels = ((magnitude + noise) / MAX_MAGNITUDE).clamp(0, 1)
        signs = torch.where(torch.rand(batch, generator=generator) < 0.5, -1.0, 1.0)
        for number, operation in enumerate(OPERATIONS.values()):
            chosen = ((drawn == number) & is_done).nonzero().flatten()
            if len(chosen):
                places = chosen.to(images.device)
                images[places] = operation(images[places], levels[chosen], signs[chosen], fill).clamp(0, 1)
    return images


def color_jitter(images: torch.Tensor, strength: float, generator: torch.Generator) -> torch.Tensor:
    """
    Brightness, contrast and saturation of every image of a batch (batch, 3, height, width) in [0, 1], each times a
    factor of its own from [1 - strength, 1 + strength]. Their order is drawn once for the batch.
    """
    factors = 1 + strength * (2 * torch.rand(3, len(images), generator=generator) - 1)
    for number in torch.randperm(3, generator=generator).tolist():
        images = ENHANCEMENTS[number](images, factors[number])
    return images


ENHANCEMENTS = (
    adjust_brightness_accumulative,
    adjust_contrast_with_mean_subtraction,
    adjust_saturation_with_gray_subtraction,
)


def enhancement(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Operation:
    """An operation with a factor of 1 +- 0.9 x level, 1 being the image as it is."""
    return lambda images, level, sign, fill: function(images, (1 + 0.9 * sign * level).clamp(min=0.1))


def affine(entries: Callable[[torch.Tensor, int, int], tuple]) -> Operation:
    """
    A geometric operation. `entries` makes of the signed level (n,), the height and the width the six entries, (n,) or
    numbers, of the matrix that takes a pixel's place (x, y) to its new one.
    """

    def operation(images: torch.Tensor, level: torch.Tensor, sign: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[-2:]
        values = [torch.as_tensor(entry).expand(len(level)) for entry in entries(sign * level, height, width)]
        matrices = torch.stack(values, dim=-1).view(-1, 2, 3).to(images)
        return warp_affine(images, matrices, (height, width), padding_mode="fill", fill_value=fill.to(images))

    return operation


def rotation(level: torch.Tensor, height: int, width: int) -> tuple:
    """About the centre, by up to 30 degrees."""
    angle = torch.deg2rad(30 * level)
    cos, sin, x, y = angle.cos(), angle.sin(), (width - 1) / 2, (height - 1) / 2
    return cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y


def eight_bit(images: torch.Tensor) -> torch.Tensor:
    """
    The nearest of the 256 values that an image file holds. Undoing the processor's normalisation leaves rounding
    errors, by which the functions that cut off after eight bits would put one pixel in four a level too low.
    """
    return (255 * images).round() / 255


def auto_contrast(images: torch.Tensor) -> torch.Tensor:
    """Stretches every channel to [0, 1]; a constant one stays, which kornia's `normalize_min_max` turns black."""
    low, high = images.amin((-2, -1), keepdim=True), images.amax((-2, -1), keepdim=True)
    return torch.where(high > low, (images - low) / (high - low).clamp(min=1e-6), images)


def solarize_add(images: torch.Tensor, addition: torch.Tensor) -> torch.Tensor:
    """Adds (n,) to the dark half of the pixels alone."""
    return torch.where(images < 0.5, images + addition.to(images)[:, None, None, None], images)


# In the order of the published code. Of its "increasing" variants, where a higher level always distorts more. Shears
# hold the image's upper left corner, which is half a pixel outside the centre of its first pixel.
OPERATIONS: dict[str, Operation] = {
    "auto_contrast": lambda images, level, sign, fill: auto_contrast(images),
    "equalize": lambda images, level, sign, fill: equalize(eight_bit(images)),
    "invert": lambda images, level, sign, fill: invert(images),
    "rotate": affine(rotation),
    "posterize": lambda images, level, sign, fill: posterize(eight_bit(images), 4 - (4 * level).int()),
    "solarize": lambda images, level, sign, fill: solarize(images, 1 - level),
    "solarize_add": lambda images, level, sign, fill: solarize_add(images, 110 / 255 * level),
    "color": enhancement(adjust_saturation_with_gray_subtraction),
    "contrast": enhancement(adjust_contrast_with_mean_subtraction),
    "brightness": enhancement(adjust_brightness_accumulative),
    "sharpness": enhancement(sharpness),
    "shear_x": affine(lambda level, height, width: (1, 0.3 * level, 0.15 * level, 0, 1, 0)),
    "shear_y": affine(lambda level, height, width: (1, 0, 0, 0.3 * level, 1, 0.15 * level)),
    "translate_x": affine(lambda level, height, width: (1, 0, 0.45 * width * level, 0, 1, 0)),
    "translate_y": affine(lambda level, height, width: (1, 0, 0, 0, 1, 0.45 * height * level)),
}
