"""Random resized crops of training images with Pillow, drawn anew for every appearance of an image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from PIL import Image
from transformers.image_processing_backends import PilBackend

from .sampling import Draw


# Boxes drawn until one lies inside the image.
ATTEMPTS = 10

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class RandomResizedCrop:
    """
    A random part of the image, of random area and aspect ratio, resized to the model's input size ("Inception" crop).

    As in torchvision: area and ratio are drawn up to ten times until the box lies inside the image; otherwise the
    largest box in its middle with an allowed ratio is taken. There is no state: the draws depend on (seed, image,
    epoch, repeat) alone, whichever worker makes them and whatever was drawn before.

    Args:
        seed (`int`): Seed of the run.
        height (`int`), width (`int`): Size of the result in pixels.
        resample (`int`): Pillow's number of the interpolation.
        scale (`float`, *optional*, defaults to 0.08): Smallest share of the image's area; the largest is 1.
        ratio (`float`, *optional*, defaults to 4/3): Largest ratio of width to height; the smallest is 1 / ratio.
    """

    seed: int
    height: int
    width: int
    resample: int
    scale: float = 0.08
    ratio: float = 4 / 3

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 1:
            raise ValueError(f"`scale` must be in (0, 1], got {self.scale}: the smallest share of the image's area.")
        if not 1 <= self.ratio < math.inf:
            raise ValueError(f"`ratio` must be 1 or more, got {self.ratio}: the largest ratio of width to height.")

    @classmethod
    def for_processor(cls, processor: PilBackend, seed: int, scale: float, ratio: float) -> RandomResizedCrop:
        """The crop to the size that `processor` brings images to, with its interpolation."""
        return cls(seed, *input_size(processor), int(cast(Any, processor).resample), scale, ratio)

    def box(self, width: int, height: int, draw: Draw) -> Box:
        """The part (left, upper, right, lower) of an image of `width` x `height` pixels."""
        random = np.random.default_rng(np.random.SeedSequence((self.seed, *draw))).random
        for _ in range(ATTEMPTS):
            area = width * height * (self.scale + (1 - self.scale) * random())
            ratio = self.ratio ** (2 * random() - 1)
            part = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < part[0] <= width and 0 < part[1] <= height:
                left, upper = int(random() * (width - part[0] + 1)), int(random() * (height - part[1] + 1))
                return left, upper, left + part[0], upper + part[1]
        part = min(width, round(height * self.ratio)), min(height, round(width * self.ratio))
        left, upper = (width - part[0]) // 2, (height - part[1]) // 2
        return left, upper, left + part[0], upper + part[1]

    def cut(self, image: Image.Image, box: Box, resample: int | None = None) -> Image.Image:
        """That part of `image`, resized; pixels outside of it play no part."""
        size, resample = (self.width, self.height), self.resample if resample is None else resample
        return image.crop(box).resize(size, Image.Resampling(resample))

    def __call__(self, image: Image.Image, draw: Draw) -> Image.Image:
        """The crop for one appearance of `image`."""
        return self.cut(image, self.box(image.width, image.height, draw))


def input_size(processor: PilBackend) -> tuple[int, int]:
    """
    Height and width that `processor` brings every image to.

    Raises:
        `ValueError`: where its results have no one size.
    """
    found = cast(Any, processor)
    size = found.crop_size if found.do_center_crop else found.size if found.do_resize else None
    if size is None or not size.height or not size.width:
        raise ValueError(
            f"`processor` brings images to no one size (do_resize={found.do_resize}, size={found.size}), so "
            "there is none to resize a crop to. Take a processor with the model's height and width, or no crop."
        )
    return size.height, size.width
