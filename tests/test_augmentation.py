"""Augmentation repeats after a resume and moves images as it says."""

import pytest
import torch

from hf_nose.augmentation import BatchAugmentation


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_same_seed_step_micro_step_and_rank_repeat_the_batch(images):
    first = BatchAugmentation(seed=3, shift=2, flip=True)(images, step=7, micro_step=1, rank=1)
    torch.rand(5)  # the global generator plays no part
    second = BatchAugmentation(seed=3, shift=2, flip=True)(images, step=7, micro_step=1, rank=1)
    assert torch.equal(first, second)
    assert first.shape == images.shape and first.dtype == images.dtype


@pytest.mark.parametrize("other", [(4, 7, 1, 1), (3, 8, 1, 1), (3, 7, 2, 1), (3, 7, 1, 0), (3, 1, 7, 1), (7, 3, 1, 1)])
def test_any_other_seed_step_micro_step_or_rank_gives_another_batch(images, other):
    first = BatchAugmentation(seed=3, shift=2)(images, step=7, micro_step=1, rank=1)
    seed, step, micro_step, rank = other
    assert not torch.equal(first, BatchAugmentation(seed=seed, shift=2)(images, step, micro_step, rank))


def test_shift_moves_whole_images_by_every_offset_and_fills_the_border():
    images = torch.ones(400, 1, 5, 5) * torch.arange(1.0, 26.0).reshape(5, 5)
    shifted = BatchAugmentation(shift=1, fill=-1.0)(images, step=0)
    padded = torch.nn.functional.pad(images[0], (1, 1, 1, 1), value=-1.0)
    windows = {(y, x): padded[:, y : y + 5, x : x + 5] for y in range(3) for x in range(3)}
    seen = [[offset for offset, window in windows.items() if torch.equal(image, window)] for image in shifted]
    assert all(len(offsets) == 1 for offsets in seen)
    assert {offsets[0] for offsets in seen} == set(windows)


def test_shift_reflects_at_the_border_by_default():
    images = torch.ones(64, 1, 5, 5) * torch.arange(1.0, 26.0).reshape(5, 5)
    shifted = BatchAugmentation(shift=2)(images, step=0)
    padded = torch.nn.functional.pad(images[:1], (2, 2, 2, 2), mode="reflect")[0]
    windows = [padded[:, y : y + 5, x : x + 5] for y in range(5) for x in range(5)]
    assert all(any(torch.equal(image, window) for window in windows) for image in shifted)


def test_channels_move_together(images):
    grey = images[:, :1].expand(-1, 3, -1, -1)
    shifted = BatchAugmentation(shift=2, flip=True)(grey, step=5)
    assert torch.equal(shifted[:, 0], shifted[:, 1]) and torch.equal(shifted[:, 0], shifted[:, 2])


def test_flip_mirrors_some_images_and_is_off_by_default(images):
    assert torch.equal(BatchAugmentation()(images, step=0), images)
    flipped = BatchAugmentation(flip=True)(images, step=0)
    kept = [torch.equal(a, b) for a, b in zip(flipped, images, strict=True)]
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(flipped, images, strict=True)]
    assert any(kept) and any(mirrored)
    assert all(a != b for a, b in zip(kept, mirrored, strict=True))


def test_input_is_not_changed(images):
    before = images.clone()
    BatchAugmentation(shift=2, flip=True)(images, step=0)
    assert torch.equal(images, before)


@pytest.mark.parametrize("arguments", [{"shift": -1}, {"seed": -1}])
def test_negative_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}` must be 0 or more, got -1"):
        BatchAugmentation(**arguments)


def test_shift_as_large_as_the_image_is_refused(images):
    with pytest.raises(ValueError, match="`shift` must be smaller than the images' sides, 8x8, got 8"):
        BatchAugmentation(shift=8)(images, step=0)
