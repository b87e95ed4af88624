"""Mixup and cutmix: what is mixed with what, how much, and that the targets say so."""

import pytest
import torch
from scipy import stats

from hf_nose.mixing import Mixing


CLASSES = 500


@pytest.fixture
def images() -> torch.Tensor:
    """Every image one value, its number, so that a mixed pixel shows what it is made of."""
    return torch.arange(8.0)[:, None, None, None].expand(8, 3, 20, 12).clone()


LABELS = torch.arange(8) * 60


def shares(targets):
    """What the first four images kept of their own class."""
    return targets[torch.arange(4), LABELS[:4]]


def draws(mixing, images, count):
    return [mixing(images, LABELS, step=step) for step in range(count)]


def test_mixup_mixes_first_with_last_and_says_how_much(images):
    for mixed, targets in draws(Mixing(CLASSES, mixup=0.8), images, 20):
        kept = float(targets[0, 0])
        assert targets.shape == (8, CLASSES) and targets.dtype == torch.float32
        expected = kept * images + (1 - kept) * images.flip(0)
        torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-5)
        for row in range(8):
            assert float(targets[row, LABELS[row]]) == pytest.approx(kept, abs=1e-6)
            assert float(targets[row, LABELS[7 - row]]) == pytest.approx(1 - kept, abs=1e-6)
            assert int((targets[row] > 0).sum()) == 2


def test_cutmix_puts_one_box_of_the_partner_into_every_image(images):
    sizes = set()
    for mixed, targets in draws(Mixing(CLASSES, cutmix=1.0), images, 60):
        cut = mixed[0, 0] == 7
        assert torch.equal(mixed, torch.where(cut, images.flip(0), images))
        rows, columns = cut.any(1).nonzero().flatten(), cut.any(0).nonzero().flatten()
        if len(rows):
            height, width = int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
            assert int(cut.sum()) == height * width
            sizes.add((height, width))
        torch.testing.assert_close(shares(targets), torch.full((4,), 1 - float(cut.float().mean())))
    assert len(sizes) > 20


def test_cutmix_boxes_lie_anywhere_and_are_cut_off_at_the_border(images):
    cuts = torch.stack([mixed[0, 0] == 7 for mixed, _ in draws(Mixing(CLASSES, cutmix=1.0), images, 300)])
    often = cuts.float().mean(0)
    # A box that had to fit would reach a corner far more rarely than this.
    assert often[0, 0] > 0.05 and often[-1, -1] > 0.05 and often[10, 6] > often[0, 0]


@pytest.mark.parametrize("alpha", [0.8, 1.0, 4.0])
def test_the_proportion_is_beta_distributed(images, alpha):
    kept = [float(shares(targets)[0]) for _, targets in draws(Mixing(CLASSES, mixup=alpha), images, 800)]
    assert stats.kstest(kept, stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_a_box_takes_its_share_of_the_area(images):
    """At a parameter so large that lambda is 0.5: the root of it of either side, in whole pairs of pixels."""
    kept = [round(float(shares(targets)[0]), 6) for _, targets in draws(Mixing(CLASSES, cutmix=1e6), images, 100)]
    assert min(kept) == round(1 - 14 * 8 / 240, 6)


def test_each_has_its_own_parameter(images):
    mixed, cut = [], []
    for found, targets in draws(Mixing(CLASSES, mixup=1e6, cutmix=1.0), images, 200):
        (cut if set(found[0].unique().tolist()) <= {0.0, 7.0} else mixed).append(float(shares(targets)[0]))
    assert all(abs(kept - 0.5) < 0.01 for kept in mixed)
    assert min(cut) < 0.4 and max(cut) > 0.95


def test_beside_each_other_either_is_drawn_half_of_the_time(images):
    cut = [set(mixed[0].unique().tolist()) <= {0.0, 7.0} for mixed, _ in draws(Mixing(CLASSES, 0.8, 1.0), images, 300)]
    assert 0.42 < sum(cut) / 300 < 0.58


@pytest.mark.parametrize("options", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_draws_follow_from_seed_step_micro_step_and_rank_alone(images, options):
    before = images.clone()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, targets = Mixing(CLASSES, **options, seed=3)(images, LABELS, 7, 1, 1)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(images, before)
    torch.manual_seed(99)
    again, same = Mixing(CLASSES, **options, seed=3)(images, LABELS, 7, 1, 1)
    assert torch.equal(first, again) and torch.equal(targets, same)
    for seed, *place in ((4, 7, 1, 1), (3, 8, 1, 1), (3, 7, 2, 1), (3, 7, 1, 0)):
        other, _ = Mixing(CLASSES, **options, seed=seed)(images, LABELS, *place)
        assert not torch.equal(first, other)


def test_an_image_alone_in_its_batch_stays_itself(images):
    for step in range(5):
        mixed, targets = Mixing(CLASSES, 0.8, 1.0)(images[3:4], LABELS[3:4], step)
        torch.testing.assert_close(mixed, images[3:4])
        assert float(targets[0, LABELS[3]]) == pytest.approx(1.0)


def test_dtype_is_kept(images):
    for dtype in (torch.float64, torch.bfloat16):
        mixed, targets = Mixing(CLASSES, 0.8, 1.0)(images.to(dtype), LABELS, 0)
        assert mixed.dtype == dtype and targets.dtype == torch.float32


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "`mixup` and `cutmix` are both 0"),
        ({"mixup": -0.1}, "`mixup` must be 0 or more, got -0.1"),
        ({"cutmix": -1}, "`cutmix` must be 0 or more, got -1"),
        ({"mixup": 1, "seed": -1}, "`seed` must be 0 or more"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Mixing(CLASSES, **options)
