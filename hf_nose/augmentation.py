"""Augmentation of whole batches on their own device, repeatable after a resume."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F


# DeiT's random erasing: the box's share of the image, its height over its width, and how often a box that does not
# fit is drawn anew.
ERASED_AREA = (0.02, 1 / 3)
ERASED_ASPECT = (0.3, 1 / 0.3)
ERASING_ATTEMPTS = 10
# Besides seed, step, micro-step and rank: so that no setting changes what another one draws.
COLOUR, ERASING, NOISE, MIXING = 1, 2, 3, 4


class BatchAugmentation:
    """
    What training images go through on their way into the model, every image of a batch on its own, in this order:
    flip, shift, colour jitter, RandAugment, random erasing.

    There is no state: the draws of a call depend on (seed, step, micro_step, rank) only, so training that is stopped
    and resumed at a step sees the same pixels as training that never stopped, whatever the loader read ahead. Nothing
    is drawn from torch's global generator, nor does it play a part. Draws are made on the CPU and moved, so every
    device draws the same; but the noise of random erasing is drawn on the images' device.

    Args:
        seed (`int`, *optional*, defaults to 0):
            Seed of the run, 0 or more.
        shift (`int`, *optional*, defaults to 0):
            Largest shift in pixels, up, down, left and right; with 4 it is the padding and cropping that images of 32
            pixels are trained with. Must be smaller than the images' sides.
        flip (`bool`, *optional*, defaults to `False`):
            Whether to mirror half of the images left to right. Leave off where the mirrored image is another class or
            none, as with digits.
        fill (`float`, *optional*):
            Value of the pixels that are shifted in, in the units of the processed images. By default the image is
            reflected at its border.
        rand_augment (`float`, *optional*, defaults to 0):
            Magnitude of RandAugment in [0, 10], published as 9; 0 is off. See
            [`~image_operations.rand_augment`]; needs kornia.
        random_erasing (`float`, *optional*, defaults to 0):
            Probability in [0, 1] that a box of an image is replaced by normal noise, pixel by pixel, as DeiT does;
            kornia's `RandomErasing` knows one constant value only.
        color_jitter (`float`, *optional*, defaults to 0):
            Strength in [0, 1] by which brightness, contrast and saturation change. Needs kornia.
        mean, std (`Sequence[float]`, *optional*):
            What the image processor normalised with, per channel: RandAugment and colour jitter work on images in
            [0, 1], so it is undone before and done again after them. See [`normalisation`].

    Raises:
        `ValueError`: for a value out of range, or RandAugment or colour jitter without mean and std.
        `ImportError`: where kornia is needed and not installed.
    """

    def __init__(
        self,
        seed: int = 0,
        shift: int = 0,
        flip: bool = False,
        fill: float | None = None,
        rand_augment: float = 0.0,
        random_erasing: float = 0.0,
        color_jitter: float = 0.0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        for name, value in (("seed", seed), ("shift", shift)):
            if value < 0:
                raise ValueError(f"`{name}` must be 0 or more, got {value}.")
        strengths = (("rand_augment", rand_augment, 10), ("random_erasing", random_erasing, 1))
        for name, strength, highest in (*strengths, ("color_jitter", color_jitter, 1)):
            if not 0 <= strength <= highest:
                raise ValueError(f"`{name}` must be in [0, {highest}], got {strength}; 0 switches it off.")
        self.seed = seed
        self.shift = shift
        self.flip = flip
        self.fill = fill
        self.rand_augment = rand_augment
        self.random_erasing = random_erasing
        self.color_jitter = color_jitter
        self.mean = self.std = None
        if rand_augment or color_jitter:
            check_kornia()
            if mean is None or std is None:
                raise ValueError("`rand_augment` and `color_jitter` need the image processor's `mean` and `std`.")
            self.mean, self.std = torch.tensor(mean), torch.tensor(std)

    def __call__(self, pixel_values: torch.Tensor, step: int, micro_step: int = 0, rank: int = 0) -> torch.Tensor:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`): Processed images, not changed.
            step (`int`): The optimizer step that the batch belongs to.
            micro_step (`int`, *optional*, defaults to 0): Place of the batch among those accumulated in the step.
            rank (`int`, *optional*, defaults to 0): Rank of the process.

        Returns:
            `torch.Tensor`: the augmented batch, of the same shape, dtype and device.
        """
        batch, _, height, width = pixel_values.shape
        if self.shift >= min(height, width):
            raise ValueError(
                f"`shift` must be smaller than the images' sides, {height}x{width}, got {self.shift}. Lower it."
            )
        place = (self.seed, step, micro_step, rank)
        # All is drawn whether used or not, so that the shifts stay the same when the flip is switched off.
        generator = torch.Generator().manual_seed(stream(*place))
        mirrored = torch.rand(batch, generator=generator) < 0.5
        offsets = torch.randint(0, 2 * self.shift + 1, (2, batch), generator=generator)

        if self.flip:
            mirrored = mirrored.to(pixel_values.device)
            pixel_values = torch.where(mirrored[:, None, None, None], pixel_values.flip(-1), pixel_values)
        if self.shift:
            pixel_values = self.shifted(pixel_values, offsets)
        if self.mean is not None and self.std is not None:
            pixel_values = self.recoloured(pixel_values, self.mean, self.std, stream(*place, COLOUR))
        if self.random_erasing:
            boxes = erased_boxes(batch, height, width, self.random_erasing, stream(*place, ERASING))
            pixel_values = erased(pixel_values, boxes, stream(*place, NOISE))
        return pixel_values

    def shifted(self, pixel_values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Images moved by `offsets - shift`, (2, batch): down and right by so many pixels."""
        batch, _, height, width = pixel_values.shape
        device, border = pixel_values.device, (self.shift,) * 4
        if self.fill is None:
            padded = F.pad(pixel_values, border, mode="reflect")
        else:
            padded = F.pad(pixel_values, border, value=self.fill)
        top, left = offsets.to(device)
        rows = (top[:, None] + torch.arange(height, device=device))[:, None, :, None]
        columns = (left[:, None] + torch.arange(width, device=device))[:, None, None, :]
        images = torch.arange(batch, device=device)[:, None, None, None]
        channels = torch.arange(padded.shape[1], device=device)[None, :, None, None]
        return padded[images, channels, rows, columns]

    def recoloured(self, pixel_values: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, seed: int) -> torch.Tensor:
        """Colour jitter and RandAugment, with the processor's normalisation undone around them."""
        from .image_operations import color_jitter, rand_augment

        generator = torch.Generator().manual_seed(seed)
        shift, scale = (values.to(pixel_values)[:, None, None] for values in (mean, std))
        images = (pixel_values * scale + shift).clamp(0, 1)
        if self.color_jitter:
            images = color_jitter(images, self.color_jitter, generator)
        if self.rand_augment:
            images = rand_augment(images, self.rand_augment, mean, generator)
        return (images - shift) / scale


def erased_boxes(batch: int, height: int, width: int, probability: float, seed: int) -> torch.Tensor:
    """The box of every image, (4, batch): first row, row behind the last, first and last column alike; or all 0."""
    generator = torch.Generator().manual_seed(seed)
    is_erased = torch.rand(batch, generator=generator) < probability
    shares, ratios, down, right = torch.rand(4, ERASING_ATTEMPTS, batch, generator=generator)
    area = height * width * (ERASED_AREA[0] + (ERASED_AREA[1] - ERASED_AREA[0]) * shares)
    low, high = map(math.log, ERASED_ASPECT)
    aspect = torch.exp(low + (high - low) * ratios)
    rows, columns = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (rows < height) & (columns < width)
    # The first attempt that fits; an image without one is left alone.
    first = fits.int().argmax(0, keepdim=True)
    rows, columns, down, right = (values.gather(0, first)[0] for values in (rows, columns, down, right))
    top, left = (down * (height - rows + 1)).floor(), (right * (width - columns + 1)).floor()
    return torch.stack([top, top + rows, left, left + columns]) * (is_erased & fits.any(0))


def erased(pixel_values: torch.Tensor, boxes: torch.Tensor, seed: int) -> torch.Tensor:
    """The images with standard normal noise, drawn on their device, in the boxes of [`erased_boxes`]."""
    device, chosen = pixel_values.device, boxes.any(0).nonzero().flatten()
    if not len(chosen):
        return pixel_values
    places = chosen.to(device)
    top, bottom, left, right = boxes[:, chosen].to(device)[:, :, None, None, None]
    images = pixel_values[places]
    rows = torch.arange(images.shape[-2], device=device)[:, None]
    columns = torch.arange(images.shape[-1], device=device)
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    generator = torch.Generator(device).manual_seed(seed)
    noise = torch.randn(images.shape, generator=generator, device=device, dtype=images.dtype)
    return pixel_values.index_copy(0, places, torch.where(inside, noise, images))


def stream(*place: int) -> int:
    """The seed of what is drawn at (seed, step, micro_step, rank), and for what purpose."""
    # SeedSequence mixes them so that neighbouring steps and ranks are unrelated, alike in every numpy.
    return int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0])


def check_kornia() -> None:
    """`ImportError` saying what to install where kornia is missing."""
    try:
        from . import image_operations  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "kornia":
            raise
        raise ImportError(
            "rand_augment and color_jitter need kornia, which is not installed: install the extra, "
            "`pip install -e '.[augment]'`, or switch them off."
        ) from error


def normalisation(processor: Any) -> dict[str, Sequence[float]]:
    """
    Mean and standard deviation that take images in [0, 1] to what an image processor gives the model.

    Raises:
        `ValueError`: where the processor does not bring 8-bit values to [0, 1] first.
    """
    if not processor.do_rescale or not math.isclose(processor.rescale_factor, 1 / 255):
        raise ValueError(
            "rand_augment and color_jitter need images in [0, 1], but the image processor has "
            f"do_rescale={processor.do_rescale}, rescale_factor={processor.rescale_factor}; 1/255 is known. "
            "Switch them off, or use another processor."
        )
    if not processor.do_normalize:
        return {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    return {"mean": processor.image_mean, "std": processor.image_std}
