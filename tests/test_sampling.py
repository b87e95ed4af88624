"""The order of images by seed and epoch, and repeated ones."""

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from hypothesis import given
from hypothesis import strategies as st

from hf_nose.sampling import Draw, EpochSampler


def draws(length, seed=0, epoch=0, repeats=1):
    sampler = EpochSampler(length, seed, repeats)
    sampler.set_epoch(epoch)
    found = list(sampler)
    assert len(found) == len(sampler) == length
    return found


@given(st.integers(1, 40), st.integers(0, 2**31), st.integers(0, 300))
def test_every_image_comes_once_an_epoch_and_knows_it(length, seed, epoch):
    found = draws(length, seed, epoch)
    assert sorted(found) == [Draw(image, epoch, 0) for image in range(length)]
    assert found == draws(length, seed, epoch)


def test_the_order_is_another_one_in_every_epoch_and_of_every_seed():
    orders = [tuple(draw.image for draw in draws(20, seed, epoch)) for seed in (0, 7) for epoch in range(3)]
    assert len(set(orders)) == 6


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_the_order_is_that_of_the_trainers_own_sampler(epoch):
    own = SeedableRandomSampler(range(50), generator=torch.Generator(), data_seed=3)
    own.set_epoch(epoch)
    assert [draw.image for draw in draws(50, 3, epoch)] == list(own)


def test_an_epoch_that_has_begun_is_not_changed():
    sampler = EpochSampler(10, 0)
    begun = iter(sampler)
    first = next(begun)
    sampler.set_epoch(1)
    assert [first, *begun] == draws(10)


@given(st.integers(1, 60), st.integers(1, 5), st.integers(0, 4))
def test_repeated_augmentation_keeps_the_length_and_repeats_images_side_by_side(length, repeats, epoch):
    found, once = draws(length, 1, epoch, repeats), draws(length, 1, epoch)
    groups = [found[start : start + repeats] for start in range(0, length, repeats)]
    for number, group in enumerate(groups):
        assert group == [Draw(once[number].image, epoch, repeat) for repeat in range(len(group))]
    # Only the last image of the epoch may appear less often.
    assert all(len(group) == repeats for group in groups[:-1])
    assert len(set(found)) == length


def test_repeats_out_of_range_are_named():
    with pytest.raises(ValueError, match="`repeats` must be 1 or more, got 0"):
        EpochSampler(10, 0, repeats=0)
