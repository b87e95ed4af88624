"""Augmentation of whole batches on their own device, repeatable after a resume."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F


class BatchAugmentation:
    """
    Random shift and, where asked for, random horizontal flip of every image of a batch on its own.

    There is no state: the draws of a call depend on (seed, step, micro_step, rank) only, so training that is stopped
    and resumed at a step sees the same pixels as training that never stopped, whatever the loader read ahead. They are
    drawn on the CPU and moved, so every device draws the same.

    Args:
        seed (`int`, *optional*, defaults to 0):
            Seed of the run, 0 or more.
        shift (`int`, *optional*, defaults to 0):
            Largest shift in pixels, up, down, left and right. Must be smaller than the images' sides.
        flip (`bool`, *optional*, defaults to `False`):
            Whether to mirror half of the images left to right. Leave off where the mirrored image is another class or
            none, as with digits.
        fill (`float`, *optional*):
            Value of the pixels that are shifted in, in the units of the processed images. By default the image is
            reflected at its border.
    """

    def __init__(self, seed: int = 0, shift: int = 0, flip: bool = False, fill: float | None = None) -> None:
        for name, value in (("seed", seed), ("shift", shift)):
            if value < 0:
                raise ValueError(f"`{name}` must be 0 or more, got {value}.")
        self.seed = seed
        self.shift = shift
        self.flip = flip
        self.fill = fill

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
        # All is drawn whether used or not, so that the shifts stay the same when the flip is switched off.
        generator = torch.Generator().manual_seed(self._stream(step, micro_step, rank))
        mirrored = torch.rand(batch, generator=generator) < 0.5
        offsets = torch.randint(0, 2 * self.shift + 1, (2, batch), generator=generator)

        device = pixel_values.device
        if self.flip:
            pixel_values = torch.where(mirrored.to(device)[:, None, None, None], pixel_values.flip(-1), pixel_values)
        if self.shift == 0:
            return pixel_values
        border = (self.shift,) * 4
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

    def _stream(self, step: int, micro_step: int, rank: int) -> int:
        # SeedSequence mixes the four so that neighbouring steps and ranks are unrelated, alike in every numpy.
        sequence = np.random.SeedSequence((self.seed, step, micro_step, rank))
        return int(sequence.generate_state(1, np.uint64)[0])
