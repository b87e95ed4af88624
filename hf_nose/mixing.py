"""Mixup and cutmix: two images become one, and their labels a soft target."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from .augmentation import MIXING, stream


# How often a batch is cut where both are on, as published.
SWITCH_PROBABILITY = 0.5


class Mixing:
    """
    Mixup (Zhang et al., arXiv 1710.09412) or cutmix (Yun et al., arXiv 1905.04899) of every batch, in the published
    DeiT recipe's way: an image is mixed with its mirror place in the batch, the first with the last, in a proportion
    lambda drawn once for the batch; where both are on, one of them is drawn for the batch.

    Own code, for kornia's `RandomMixUpV2` draws lambda uniformly and not from Beta(mixup, mixup), its
    `RandomCutMixV2` never lets a box reach over the border, both draw from torch's global generator, and cutting
    takes some thirty times as long (32 images of 224 px on a CPU).

    As with [`BatchAugmentation`], draws depend on (seed, step, micro_step, rank) only.

    Args:
        num_labels (`int`): Number of classes.
        mixup (`float`, *optional*, defaults to 0): Parameter of mixup's Beta distribution, published as 0.8; 0 is off.
        cutmix (`float`, *optional*, defaults to 0): That of cutmix, published as 1.0; 0 is off.
        seed (`int`, *optional*, defaults to 0): Seed of the run, 0 or more.

    Raises:
        `ValueError`: for a negative number, or where both are off.
    """

    def __init__(self, num_labels: int, mixup: float = 0.0, cutmix: float = 0.0, seed: int = 0) -> None:
        for name, value in (("mixup", mixup), ("cutmix", cutmix), ("seed", seed)):
            if value < 0:
                raise ValueError(f"`{name}` must be 0 or more, got {value}.")
        if not mixup and not cutmix:
            raise ValueError("`mixup` and `cutmix` are both 0: leave the mixing out.")
        self.num_labels = num_labels
        self.mixup = mixup
        self.cutmix = cutmix
        self.seed = seed

    def __call__(
        self, pixel_values: torch.Tensor, labels: torch.Tensor, step: int, micro_step: int = 0, rank: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`): Processed images, not changed.
            labels (`torch.Tensor` of shape `(batch,)`): Their classes.
            step, micro_step, rank (`int`): As for [`BatchAugmentation`].

        Returns:
            `tuple`: the mixed images, and the targets, float32 of shape `(batch, num_labels)`, rows summing to 1.
        """
        generator = np.random.default_rng(stream(self.seed, step, micro_step, rank, MIXING))
        is_cut = bool(self.cutmix) and (not self.mixup or generator.random() < SWITCH_PROBABILITY)
        alpha = self.cutmix if is_cut else self.mixup
        kept = float(generator.beta(alpha, alpha))
        partners = pixel_values.flip(0)
        if is_cut:
            height, width = pixel_values.shape[-2:]
            top, bottom, left, right = cut_box(height, width, kept, generator)
            pixel_values = pixel_values.clone()
            pixel_values[:, :, top:bottom, left:right] = partners[:, :, top:bottom, left:right]
            kept = 1 - (bottom - top) * (right - left) / (height * width)
        else:
            pixel_values = kept * pixel_values + (1 - kept) * partners
        targets = F.one_hot(labels, self.num_labels).to(torch.float32)
        return pixel_values, kept * targets + (1 - kept) * targets.flip(0)


def cut_box(height: int, width: int, kept: float, generator: np.random.Generator) -> tuple[int, int, int, int]:
    """
    Rows and columns of a box with the image's aspect and a share of `1 - kept` of its area, around a pixel drawn
    anywhere; what reaches over the border is cut off, so the share may come out smaller.
    """
    share = (1 - kept) ** 0.5
    y, x = int(generator.integers(height)), int(generator.integers(width))
    half_height, half_width = int(height * share) // 2, int(width * share) // 2
    top, bottom = max(0, y - half_height), min(height, y + half_height)
    left, right = max(0, x - half_width), min(width, x + half_width)
    return top, bottom, left, right
