"""Which training image comes when, and in which epoch: what every random draw for an image depends on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch


class Draw(NamedTuple):
    """
    One appearance of an image in training.

    Args:
        image (`int`): Which image: its row in the data set, or its place in the epoch's stream.
        epoch (`int`): In which epoch, from 0.
        repeat (`int`, *optional*, defaults to 0): Which of the image's appearances in the epoch.
    """

    image: int
    epoch: int
    repeat: int = 0


class DrawnDataset(torch.utils.data.Dataset):
    """
    Map-style training data that are asked for by [`Draw`]s, and so can draw anew for every appearance of an image.

    Attributes:
        repeats (`int`): How often each image drawn for an epoch appears in it (see [`EpochSampler`]).
    """

    repeats: int = 1

    def __len__(self) -> int:
        raise NotImplementedError


class EpochSampler(torch.utils.data.Sampler):
    """
    Every image of a data set once an epoch, in an order that depends on (seed, epoch) alone.

    It hands out [`Draw`]s, so that a data set need not be told the epoch: loader workers that live on never hear of
    it, and accelerate does not pass it on to a resumed loader under several processes. The order is that of
    accelerate's `SeedableRandomSampler`.

    With `repeats` above 1 it is repeated augmentation (Hoffer et al., "Augment your batch", CVPR 2020): every image
    drawn stands `repeats` times in a row, each with draws of its own, and an epoch keeps its length, so it
    holds a share of 1 / repeats of the images. DeiT's sampler differs in two things: it deals the copies to the
    processes, and leaves out what does not fill 256 images.

    Args:
        length (`int`): Number of images, and of draws an epoch.
        seed (`int`): Seed of the run.
        repeats (`int`, *optional*, defaults to 1): How often an image appears.
    """

    def __init__(self, length: int, seed: int, repeats: int = 1) -> None:
        if repeats < 1:
            raise ValueError(f"`repeats` must be 1 or more, got {repeats}: 1 is every image once.")
        self.length = length
        self.seed = seed
        self.repeats = repeats
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch the next pass is."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Draw]:
        epoch = self.epoch
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed + epoch)).tolist()
        for place in range(self.length):
            yield Draw(order[place // self.repeats], epoch, place % self.repeats)
