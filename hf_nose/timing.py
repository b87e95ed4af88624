"""How long models take side by side: runs in turn, medians, and ratios taken pair by pair."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .devices import Stopwatch, stopwatch


CONFIDENCE = 0.95
# With fewer, no interval of a median has that confidence.
LEAST_ROUNDS = 6


def interleaved(
    calls: Mapping[str, Callable[[], object]], rounds: int, warmup: int, watch: Stopwatch
) -> dict[str, list[float]]:
    """
    Seconds of several calls taken in turn: every round runs each once, in the order given (A B A B ...), so that a
    machine that slows down slows them all, and what is left of its drift is what happens within one round.

    Args:
        calls (`dict[str, Callable]`): what to time, by name.
        rounds (`int`): timed runs of each, at least 2.
        warmup (`int`): rounds before those, not timed.
        watch (`Stopwatch`): seconds of one call, see [`~devices.stopwatch`].

    Returns:
        `dict[str, list[float]]`: seconds by name, a number a round.

    Raises:
        ValueError: for nothing to time, fewer than 2 rounds or a negative number of warm-up rounds.
    """
    if not calls:
        raise ValueError("models must hold at least one model, got none. Give {'dense': model, ...}.")
    if rounds < 2:
        raise ValueError(f"rounds must be at least 2 for quartiles, got {rounds}.")
    if warmup < 0:
        raise ValueError(f"warmup must be 0 or more, got {warmup}.")
    for _ in range(warmup):
        for call in calls.values():
            watch(call)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(watch(call))
    return seconds


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """
    The interval that holds the true median with at least this confidence, whatever the distribution: between the k-th
    smallest and the k-th largest value, k from the binomial distribution. Fewer than `LEAST_ROUNDS` values cannot give
    95 %: then it is their whole range, which holds it less often.
    """
    ordered, count = sorted(values), len(values)
    missed, rank = 0.0, 0
    # Outside the k-th from either end with probability 2 P(Bin(n, 1/2) < k).
    while rank < count // 2 and missed + 2 * math.comb(count, rank) / 2**count <= 1 - confidence:
        missed += 2 * math.comb(count, rank) / 2**count
        rank += 1
    rank = max(rank, 1)
    return ordered[rank - 1], ordered[-rank]


def summarised(seconds: Mapping[str, Sequence[float]], num_images: int) -> dict[str, dict[str, Any]]:
    """
    What [`interleaved`] found, in figures.

    Returns:
        `dict`: for every name `images_per_s` (the median over rounds) with its `quartiles` (the lower and the upper),
        `latency_s` with `latency_quartiles`, and `ratio_to_first`, the median over rounds of its images per second
        divided by the first one's in the same round (above 1 is faster), with `ratio_quartiles` and `ratio_interval`,
        see [`median_interval`]; and the `seconds` of every round themselves.
    """
    first = seconds[next(iter(seconds))]
    results = {}
    for name, values in seconds.items():
        rates, latencies = quartiles([num_images / value for value in values]), quartiles(values)
        pairs = paired_ratios(values, first)
        ratios = quartiles(pairs)
        results[name] = {
            "images_per_s": rates[1],
            "quartiles": [rates[0], rates[2]],
            "latency_s": latencies[1],
            "latency_quartiles": [latencies[0], latencies[2]],
            "ratio_to_first": ratios[1],
            "ratio_quartiles": [ratios[0], ratios[2]],
            "ratio_interval": list(median_interval(pairs)),
            "seconds": list(values),
        }
    return results


def paired_ratios(seconds: Sequence[float], reference: Sequence[float]) -> list[float]:
    """How many times as fast as the reference, round by round; above 1 is faster."""
    return [theirs / ours for ours, theirs in zip(seconds, reference, strict=True)]


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive")


def verdict(ratio_interval: Sequence[float]) -> str:
    """In words: faster only where the whole interval of the ratio lies above 1."""
    lower, upper = ratio_interval
    if lower > 1:
        return "faster"
    return "not faster: slower" if upper < 1 else "not faster: no difference shown"


def compare_throughput(
    models: Mapping[str, nn.Module],
    batch: torch.Tensor,
    rounds: int = 20,
    warmup: int = 3,
    watch: Stopwatch | None = None,
) -> dict[str, dict[str, Any]]:
    """
    Images per second of several models side by side in one process, in turn (see [`interleaved`]). Inference as it is
    used: `eval`, no gradients, the whole forward from pixels to logits. Each model's mode is put back.

    Args:
        models (`dict[str, nn.Module]`):
            The models by name, on the device of `batch`; the first is the one that the others are compared with.
        batch (`torch.Tensor` of shape `(batch, channels, height, width)`):
            The images, in the models' dtype.
        rounds (`int`, *optional*, defaults to 20):
            Timed forwards of each model, at least 2.
        warmup (`int`, *optional*, defaults to 3):
            Rounds before those, not timed.
        watch (`Stopwatch`, *optional*):
            Seconds of one call; by default that of the batch's device.

    Returns:
        `dict`: see [`summarised`].

    Raises:
        ValueError: for no models, fewer than 2 rounds or a negative number of warm-up rounds.
    """
    watch = stopwatch(batch.device) if watch is None else watch
    modes = {name: model.training for name, model in models.items()}
    # The name is bound now, not when the call is made.
    calls = {name: lambda model=model: model(batch) for name, model in models.items()}
    try:
        for model in models.values():
            model.eval()
        with torch.inference_mode():
            seconds = interleaved(calls, rounds, warmup, watch)
    finally:
        for name, model in models.items():
            model.train(modes[name])
    return summarised(seconds, len(batch))
