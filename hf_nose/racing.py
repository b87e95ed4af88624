"""The greedy search as a race: a candidate that is surely worse than another drops out on part of the images.

The calibration images are gone through in growing parts; after each of them every pair of candidates left is compared.
What is estimated is what the search would find on all images, so those yet to come count as unseen (a sample without
replacement), and a race that nobody leaves ends as the greedy search does. From the second round on, what the images
gave in the round before, where all were seen, tells part of what they will give now.
"""

from collections.abc import Sequence
from typing import Any

import torch

from .contributions import Contributions
from .criteria import Criterion
from .prefixes import extend
from .processes import agree
from .scoring import Score, SetScorer


# Looks: shares of the batches after which candidates are compared.
SHARES = tuple(eighth / 8 for eighth in range(1, 9))
# With fewer images the tails of Student's distribution are not to be trusted.
MIN_IMAGES = 32
# By this the error allowed is divided: what images add has heavier tails than Student's. On DeiT-T his quantiles of
# 1e-2 to 3e-4 are exceeded up to one and a half times as often.
RESERVE = 2


class Race:
    """
    Rounds of Algorithm 1 in which candidates drop out early.

    Args:
        scorer ([`SetScorer`]): its batches are a sequence, their images in random order, as
            [`~hf_nose.calibration.calibration_batches`] draws them: a part stands for the whole.
        confidence (`float`): in (0, 1); with at least this probability no round loses the candidate that is best on
            all images. The rest is shared out equally over rounds, looks and rivals (Bonferroni).
        num_layers (`int`): rounds.

    Raises:
        `ValueError`: for a confidence out of range, a criterion without known intervals, or batches without a length.
    """

    def __init__(self, scorer: SetScorer, confidence: float, num_layers: int):
        check_race(scorer.criterion, confidence)
        if not isinstance(scorer.batches, Sequence):
            raise ValueError("batches must be a sequence for search='racing', which takes them in parts.")
        if not len(scorer.batches):
            raise ValueError("batches is empty: give calibration images.")
        self.scorer, self.confidence, self.num_layers = scorer, confidence, num_layers
        self.stops = stops(len(scorer.batches), scorer.world_size)
        self.dense: list[Contributions] = []
        # Of the candidates of the round before that were seen on all images: what each image added.
        self.before: dict[int, torch.Tensor] = {}

    def round(self, picked: list[int], candidates: list[int]) -> dict[str, Any]:
        """
        One round, as an entry of the trace: beside `picked` and `scores`, on how many `images` each candidate was
        scored, and by how many standard errors (`margins`) those were beaten that dropped out.
        """
        found = {layer: self._nothing() for layer in candidates}
        scores: dict[int, Score] = {}
        margins: dict[int, float] = {}
        shares: dict[int, torch.Tensor] = {}
        racing, start = candidates, 0
        for look, stop in enumerate(self.stops):
            self._see(picked, {layer: found[layer] for layer in racing}, look, range(start, stop))
            start, dense = stop, self.dense_until(look)
            evidence = dense.evidence()
            scores |= {layer: self.scorer.score_of(found[layer].evidence(), evidence) for layer in racing}
            if dense.num_images < MIN_IMAGES:
                continue
            shares = self._shares({layer: found[layer] for layer in racing}, dense)
            if look < len(self.stops) - 1:
                beaten = agree(self._beaten(picked, scores, shares, stop / self.stops[-1], len(candidates) - 1))
                margins |= beaten
                racing = [layer for layer in racing if layer not in beaten]
            if len(racing) == 1:
                break
        self.before = shares if start == self.stops[-1] else {}
        step = {
            "picked": min(racing, key=lambda layer: (scores[layer].cost, layer)),
            "scores": {layer: scores[layer].value for layer in candidates},
            "images": {layer: found[layer].num_images for layer in candidates},
            "margins": margins,
        }
        return agree(step)

    def _nothing(self) -> Contributions:
        return Contributions(self.scorer.criterion.image_sum)

    def _see(self, picked: list[int], found: dict[int, Contributions], look: int, numbers: range) -> None:
        """Adds one part of the images to what is known of the candidates in `found`, and of the dense model."""
        if picked and look == len(self.dense):
            self.dense.append(self.scorer.contributions([], [], numbers)[()])
        parts = self.scorer.contributions(picked, list(found), numbers)
        if not picked:
            self.dense.append(parts[()])
        for layer, contributions in found.items():
            contributions.merge(parts[extend(tuple(picked), layer)])

    def dense_until(self, look: int) -> Contributions:
        """The dense model on the images of all parts up to `look`."""
        merged = self._nothing()
        for part in self.dense[: look + 1]:
            merged.merge(part)
        return merged

    def _shares(self, found: dict[int, Contributions], dense: Contributions) -> dict[int, torch.Tensor]:
        """What each image adds to the candidates' values, each (images,)."""
        shares = {layer: contributions.pseudovalues() for layer, contributions in found.items()}
        if self.scorer.criterion.image_sum is not None:
            return shares
        entropy = dense.pseudovalues()
        return {layer: entropy - masked for layer, masked in shares.items()}

    def _beaten(
        self, picked: list[int], scores: dict[int, Score], shares: dict[int, torch.Tensor], seen: float, rivals: int
    ) -> dict[int, float]:
        """Who drops out with this share of the images `seen`, and by how many standard errors."""
        criterion = self.scorer.criterion
        estimates, adjusted = [], []
        for layer, own in shares.items():
            controls = [self.before[other] for other in dict.fromkeys((layer, *picked[-1:])) if other in self.before]
            adjusted.append(controlled(own, controls))
            # Freed from its bias as far as images are yet to come: on all of them the search would have that of all.
            value = seen * scores[layer].value + (1 - seen) * float(own.mean())
            estimates.append(value + float(adjusted[-1].mean() - own.mean()))
        direction = -1.0 if criterion.higher_is_better else 1.0
        is_absolute = criterion.is_signed and self.scorer.sign == "absolute"
        margins = compare(
            direction * torch.tensor(estimates, dtype=torch.float64),
            direction * torch.stack(adjusted, 1),
            1 - seen,
            is_absolute,
        )
        probability = (1 - self.confidence) / RESERVE / (self.num_layers * (len(self.stops) - 1) * rivals)
        # Two controls at most, and the mean.
        limit = quantile(probability / 2 if is_absolute else probability, len(adjusted[0]) - 3)
        worst = margins.max(1).values.tolist()
        return {layer: margin for layer, margin in zip(shares, worst, strict=True) if margin > limit}


def race(scorer: SetScorer, kept: list[int], num_layers: int, options: dict[str, Any]) -> tuple[list[int], list[dict]]:
    """Algorithm 1 by races, see [`Race`]: the layers of the greedy search at the confidence asked for."""
    contest = Race(scorer, options["confidence"], num_layers)
    picked: list[int] = []
    trace = []
    for _ in range(num_layers):
        trace.append(contest.round(picked, [layer for layer in kept if layer not in picked]))
        picked.append(trace[-1]["picked"])
    scorer.dense = contest.dense_until(len(contest.dense)).evidence()
    scorer.num_images = scorer.dense.num_images
    return picked, trace


def check_race(criterion: Criterion, confidence: float) -> None:
    """Refuses, by name, a criterion without known intervals, and a confidence out of range."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}.")
    if criterion.image_sum is None and criterion.name != "transfer_entropy":
        raise ValueError(
            f"criterion {criterion.name!r} cannot be raced: it is no entropy and no mean over images, so no interval "
            "is known. Use transfer_entropy, prediction_kl, loss or accuracy, or search='greedy'."
        )


def stops(num_batches: int, world_size: int) -> list[int]:
    """How many batches have been seen at each look, a multiple of the processes but for the last."""
    found = {min(num_batches, -(-round(share * num_batches) // world_size) * world_size) for share in SHARES}
    return sorted(found - {0})


def controlled(shares: torch.Tensor, controls: list[torch.Tensor]) -> torch.Tensor:
    """
    `shares` (images,) less what `controls`, each (all images,), explain of them: the mean of the seen images moves to
    where it would be if their controls had the mean of all images, and varies less (the regression estimator).
    """
    if not controls:
        return shares
    known = torch.stack(controls, 1)
    known = known - known.mean(0)
    seen = known[: len(shares)]
    # By its singular values: `lstsq` pivots, and may begin with a control that is constant.
    slopes = torch.linalg.pinv(seen - seen.mean(0)) @ (shares - shares.mean())[:, None]
    return shares - (seen @ slopes)[:, 0]


def compare(estimates: torch.Tensor, shares: torch.Tensor, unseen: float, is_absolute: bool) -> torch.Tensor:
    """
    By how many standard errors one cost is above another, (candidates, candidates): the row's above the column's.

    The same images are in all of them, so their differences vary less than they do themselves. Where the cost is the
    absolute value, `|a| > |b|` means that `a - b` and `a + b` have the same sign: the less certain of the two counts,
    and the margin is 0 where they do not.

    Args:
        estimates (`torch.Tensor` of shape `(candidates,)`): costs, before any absolute value.
        shares (`torch.Tensor` of shape `(images, candidates)`): what each image adds to them, as pseudo-values.
        unseen (`float`): share of the images, in [0, 1], that is yet to come: the factor of a sample's variance that
            was drawn without replacement.
        is_absolute (`bool`): whether the absolute value is the cost.
    """
    covariance = torch.cov(shares.T) * (unseen / len(shares))
    variance = covariance.diag()
    # Identical candidates differ by nothing, and not by rounding.
    errors = (variance[:, None] + variance - 2 * covariance).clamp_min(0).sqrt().clamp_min(1e-12)
    apart = (estimates[:, None] - estimates) / errors
    if not is_absolute:
        return apart.clamp_min(0)
    errors = (variance[:, None] + variance + 2 * covariance).clamp_min(0).sqrt().clamp_min(1e-12)
    together = (estimates[:, None] + estimates) / errors
    return torch.where(apart * together > 0, torch.minimum(apart.abs(), together.abs()), 0.0)


def quantile(probability: float, degrees: int) -> float:
    """What Student's t exceeds with `probability`."""
    from scipy import stats

    return float(stats.t.isf(probability, degrees))
