"""Criteria against their definitions, computed another way."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from hf_nose.criteria import CRITERIA, SIGNS, Evidence


GENERATOR = np.random.default_rng(3)
DENSE = GENERATOR.normal(0.5, 2.0, (60, 4))
MASKED = GENERATOR.normal(-0.2, 1.0, (60, 4)) * [1, 3, 0.5, 2]
LABELS = GENERATOR.integers(0, 4, 60)


def evidence(values: np.ndarray, cuts=()) -> Evidence:
    """As a pass over batches cut at `cuts` leaves it."""
    merged = Evidence()
    bounds = [0, *cuts, len(values)]
    for start, stop in pairwise(bounds):
        part = Evidence(num_images=stop - start)
        part.moments.update(torch.from_numpy(values[start:stop]))
        part.see_predictions(
            torch.from_numpy(values[start:stop]),
            torch.from_numpy(LABELS[start:stop]),
            torch.from_numpy(DENSE[start:stop]),
        )
        merged.merge(part)
    return merged


def log_softmax(values: np.ndarray) -> np.ndarray:
    return values - np.log(np.exp(values).sum(1, keepdims=True))


def by_hand(name: str) -> float:
    s, t = DENSE.std(0), MASKED.std(0)
    if name == "transfer_entropy":
        return np.log(s).sum() - np.log(t).sum()
    if name == "channelwise":
        return np.abs(np.log(s) - np.log(t)).sum()
    if name == "gaussian_kl":
        moved = DENSE.mean(0) - MASKED.mean(0)
        return sum(math.log(b / a) + (a**2 + m**2) / (2 * b**2) - 0.5 for a, b, m in zip(s, t, moved, strict=True))
    p, q = log_softmax(DENSE), log_softmax(MASKED)
    if name == "prediction_kl":
        return (np.exp(p) * (p - q)).sum(1).mean()
    if name == "loss":
        return -q[np.arange(60), LABELS].mean()
    return (MASKED.argmax(1) == LABELS).mean()


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("cuts", [(), (7, 8, 40)])
def test_values_are_those_of_the_formulas(name, cuts):
    value = CRITERIA[name].score(evidence(DENSE), evidence(MASKED, cuts))
    assert value == pytest.approx(by_hand(name), rel=1e-12)


def test_the_names_are_those_of_the_method():
    assert list(CRITERIA) == [
        "transfer_entropy",
        "channelwise",
        "gaussian_kl",
        "prediction_kl",
        "loss",
        "accuracy",
    ]
    assert all(criterion.name == name for name, criterion in CRITERIA.items())
    assert SIGNS == ("absolute", "signed")


def test_transfer_entropy_is_negative_where_masking_raises_entropy():
    wider = evidence(DENSE * 2)
    assert CRITERIA["transfer_entropy"].score(evidence(DENSE), wider) == pytest.approx(-4 * math.log(2))


def test_gains_and_losses_cancel_in_transfer_entropy_alone():
    stretched = evidence(DENSE * [2, 0.5, 1, 1])
    assert CRITERIA["transfer_entropy"].score(evidence(DENSE), stretched) == pytest.approx(0, abs=1e-12)
    assert CRITERIA["channelwise"].score(evidence(DENSE), stretched) == pytest.approx(2 * math.log(2))


def test_only_the_kls_see_a_shift_of_the_mean():
    moved = evidence(DENSE + [3, 0, 0, 0])
    assert CRITERIA["channelwise"].score(evidence(DENSE), moved) == pytest.approx(0, abs=1e-12)
    assert CRITERIA["gaussian_kl"].score(evidence(DENSE), moved) == pytest.approx(9 / (2 * DENSE[:, 0].var()))


@pytest.mark.parametrize("name", ["transfer_entropy", "channelwise", "gaussian_kl", "prediction_kl"])
def test_a_model_has_no_distance_from_itself(name):
    assert CRITERIA[name].score(evidence(DENSE), evidence(DENSE)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    "name, sign, value, cost",
    [
        ("transfer_entropy", "absolute", -58.0, 58.0),
        ("transfer_entropy", "absolute", 3.0, 3.0),
        ("transfer_entropy", "signed", -58.0, -58.0),
        ("transfer_entropy", "signed", 3.0, 3.0),
        *[
            (name, sign, 0.7, 0.7)
            for name in ("channelwise", "gaussian_kl", "prediction_kl", "loss")
            for sign in ("absolute", "signed")
        ],
        ("accuracy", "absolute", 0.7, -0.7),
        ("accuracy", "signed", 0.7, -0.7),
        # A KL between rounded distributions may be a hair below zero; it stays the least.
        ("prediction_kl", "absolute", -1e-17, -1e-17),
    ],
)
def test_costs(name, sign, value, cost):
    assert CRITERIA[name].cost(value, sign) == cost


def test_what_each_needs():
    assert {name for name, criterion in CRITERIA.items() if criterion.needs_labels} == {"loss", "accuracy"}
    assert {name for name, criterion in CRITERIA.items() if criterion.needs_logits} == {
        "prediction_kl",
        "loss",
        "accuracy",
    }


def test_evidence_merges_every_field():
    whole = evidence(MASKED)
    parts = evidence(MASKED, (1, 30))
    assert (parts.num_images, parts.correct, parts.moments.count) == (60, whole.correct, 60)
    assert parts.loss == pytest.approx(whole.loss) and parts.prediction_kl == pytest.approx(whole.prediction_kl)
