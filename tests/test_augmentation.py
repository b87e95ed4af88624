"""Augmentation repeats after a resume and moves images as it says."""

import sys

import pytest
import torch
from transformers import ViTImageProcessorPil

from hf_nose.augmentation import BatchAugmentation, normalisation


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


# Random erasing


def boxes(images: torch.Tensor, **options) -> torch.Tensor:
    """Where random erasing changed the images, (batch, height, width)."""
    changed = BatchAugmentation(random_erasing=1.0, **options)(images, step=0) != images
    assert torch.equal(changed.all(1), changed.any(1))
    return changed.all(1)


def test_erasing_replaces_one_box_by_normal_noise():
    images = torch.full((400, 3, 32, 24), 7.0)
    erased = boxes(images)
    noise = BatchAugmentation(random_erasing=1.0)(images, step=0).movedim(1, -1)[erased]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    shares, ratios = [], []
    for mask in erased:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        assert mask.sum() == height * width
        shares.append(float(mask.float().mean()))
        ratios.append(float(height / width))
    # Uniform shares of the area in [0.02, 1/3], aspects log-uniform in [0.3, 1/0.3], but for rounding to pixels and
    # for those that do not fit.
    assert 0.01 < min(shares) < 0.04 and 0.28 < max(shares) < 0.35
    assert 0.2 < min(ratios) < 0.4 and 2.5 < max(ratios) < 4.5
    # Boxes touch every side.
    assert erased[:, 0].any() and erased[:, -1].any() and erased[:, :, 0].any() and erased[:, :, -1].any()


def test_erasing_touches_the_share_of_images_that_is_asked_for(images):
    many = images.repeat(100, 1, 1, 1)
    for probability in (0.0, 0.25, 1.0):
        found = BatchAugmentation(random_erasing=probability)(many, step=3)
        assert abs((found != many).flatten(1).any(1).float().mean() - probability) < 0.04


def test_erasing_keeps_dtype_and_input(images):
    before = images.clone()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert BatchAugmentation(random_erasing=1.0)(images.to(dtype), step=0).dtype == dtype
    assert torch.equal(images, before)


def test_an_image_that_no_box_fits_is_left_alone(images, monkeypatch):
    monkeypatch.setattr("hf_nose.augmentation.ERASED_AREA", (1.0, 1.0))
    assert torch.equal(BatchAugmentation(random_erasing=1.0)(images, step=0), images)


@pytest.mark.parametrize("shape", [(32, 4), (4, 32)])
def test_a_box_never_reaches_from_side_to_side(shape):
    found = boxes(torch.full((400, 3, *shape), 7.0))
    assert found.any((1, 2)).float().mean() > 0.9
    assert not found.any(1).all(1).any() and not found.any(2).all(1).any()


@pytest.mark.parametrize("other", [(4, 7, 1, 1), (3, 8, 1, 1), (3, 7, 2, 1), (3, 7, 1, 0)])
def test_the_noise_is_another_one_too(images, other):
    noises = []
    for seed, *place in ((3, 7, 1, 1), other):
        found = BatchAugmentation(seed=seed, random_erasing=1.0)(images, *place)
        noises.append(set(found[found != images].tolist()))
    assert len(noises[0]) > 100 and len(noises[0] & noises[1]) < 3


# All of it


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ALL = {"shift": 2, "flip": True, "rand_augment": 9.0, "random_erasing": 0.25, "color_jitter": 0.4}


def augmentation(seed=3, **options) -> BatchAugmentation:
    return BatchAugmentation(seed=seed, mean=MEAN, std=STD, **{**ALL, **options})


@pytest.fixture
def processed(images) -> torch.Tensor:
    return (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def test_all_of_it_repeats_whatever_the_global_generator_does(processed):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = augmentation()(processed, step=7, micro_step=1, rank=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(augmentation()(processed, step=7, micro_step=1, rank=1), first)
    assert first.shape == processed.shape and first.isfinite().all()


@pytest.mark.parametrize("name", ["rand_augment", "random_erasing", "color_jitter"])
@pytest.mark.parametrize("other", [(4, 7, 1, 1), (3, 8, 1, 1), (3, 7, 2, 1), (3, 7, 1, 0)])
def test_each_is_drawn_by_seed_step_micro_step_and_rank(processed, name, other):
    alone = {"shift": 0, "flip": False, **dict.fromkeys(("rand_augment", "random_erasing", "color_jitter"), 0.0)}
    options = {**alone, name: 1.0 if name != "rand_augment" else 9.0}
    first = augmentation(**options)(processed, step=7, micro_step=1, rank=1)
    seed, step, micro_step, rank = other
    assert not torch.equal(first, processed)
    assert not torch.equal(first, augmentation(seed=seed, **options)(processed, step, micro_step, rank))


def test_switching_one_off_changes_no_draw_of_the_others(processed):
    plain = BatchAugmentation(seed=3, shift=2, flip=True)(processed, step=5)
    erased = augmentation(rand_augment=0, color_jitter=0)(processed, step=5)
    same = (erased == plain).all(1)
    assert 0.7 < same.float().mean() < 1
    both = augmentation(rand_augment=0)(processed, step=5)
    # The same boxes with the same noise, over other colours.
    assert torch.equal(both.movedim(1, -1)[~same], erased.movedim(1, -1)[~same])


def test_colours_are_changed_between_0_and_1(processed, images):
    found = augmentation(random_erasing=0.0)(processed, step=0)
    colours = found * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    assert -1e-6 < colours.min() and colours.max() < 1 + 1e-6
    # The magnitude that changes nothing: what is left is the way to [0, 1] and back.
    idle = BatchAugmentation(color_jitter=1e-9, mean=MEAN, std=STD)(processed, step=0)
    torch.testing.assert_close(idle, processed, rtol=0, atol=1e-5)


def test_pixels_out_of_range_are_cut_off_before_colours_are_changed(processed):
    found = BatchAugmentation(rand_augment=9, mean=MEAN, std=STD)(3 * processed, step=0)
    colours = found * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    assert -1e-6 < colours.min() and colours.max() < 1 + 1e-6


def test_what_is_moved_in_has_the_mean_colour(processed, monkeypatch):
    fills = []
    monkeypatch.setattr(
        "hf_nose.image_operations.rand_augment", lambda images, *rest: fills.append(rest[:2]) or images
    )
    BatchAugmentation(rand_augment=7, mean=MEAN, std=STD)(processed, step=0)
    ((magnitude, fill),) = fills
    assert magnitude == 7 and fill.tolist() == pytest.approx(MEAN)


def test_mean_and_std_are_those_of_each_channel(processed):
    """A solarized or inverted image shows a wrong mean; colour jitter of a white image a wrong deviation."""
    white = (torch.ones(8, 3, 4, 4) - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    found = augmentation(shift=0, rand_augment=0, random_erasing=0)(white, step=0)
    # Jitter of white gives grey: equal channels, once the normalisation is undone.
    colours = found * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    torch.testing.assert_close(colours[:, 0], colours[:, 1], rtol=0, atol=1e-5)
    torch.testing.assert_close(colours[:, 0], colours[:, 2], rtol=0, atol=1e-5)
    assert colours.amin() < 0.95


def test_colours_need_mean_and_std():
    with pytest.raises(ValueError, match="need the image processor's `mean` and `std`"):
        BatchAugmentation(rand_augment=9)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rand_augment": 11}, r"`rand_augment` must be in \[0, 10\], got 11"),
        ({"rand_augment": -1}, r"`rand_augment` must be in \[0, 10\], got -1"),
        ({"random_erasing": 1.5}, r"`random_erasing` must be in \[0, 1\], got 1.5"),
        ({"color_jitter": float("nan")}, r"`color_jitter` must be in \[0, 1\], got nan"),
    ],
)
def test_strengths_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BatchAugmentation(**options, mean=MEAN, std=STD)


def test_without_kornia_the_message_says_what_to_install(monkeypatch):
    class Nowhere:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "kornia":
                raise ModuleNotFoundError("No module named 'kornia'", name=name)

    monkeypatch.setattr(sys, "meta_path", [Nowhere, *sys.meta_path])
    for name in [name for name in sys.modules if name.split(".")[0] == "kornia"] + ["hf_nose.image_operations"]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr("hf_nose.image_operations", raising=False)
    for name in ("rand_augment", "color_jitter"):
        with pytest.raises(ImportError, match=r"need kornia, which is not installed: install .*\[augment\]"):
            BatchAugmentation(**{name: 0.5}, mean=MEAN, std=STD)
    BatchAugmentation(shift=1, flip=True, random_erasing=0.25)


def test_normalisation_is_the_processors():
    processor = ViTImageProcessorPil(image_mean=list(MEAN), image_std=list(STD))
    assert normalisation(processor) == {"mean": MEAN, "std": STD}
    plain = ViTImageProcessorPil(do_normalize=False, image_mean=list(MEAN), image_std=list(STD))
    assert normalisation(plain) == {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    for options in ({"do_rescale": False}, {"rescale_factor": 1 / 127.5}):
        with pytest.raises(ValueError, match=r"need images in \[0, 1\], but the image processor has do_rescale="):
            normalisation(ViTImageProcessorPil(**options))
