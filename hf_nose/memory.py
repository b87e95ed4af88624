"""How much memory an inference takes, and how many images fit into a budget: every measurement in a fresh process."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import psutil
import torch

from .contenders import DTYPES, Contender


UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
# More images than any budget holds: where the search stops.
MOST_IMAGES = 2**20
PROBE_SECONDS = 3600


def parse_bytes(text: str) -> int:
    """Bytes of `"10GB"` (10^10) or `"1.5 GiB"` (1.5 x 2^30); `ValueError` for anything else."""
    found = re.fullmatch(rf"\s*(\d+(?:\.\d+)?)\s*({'|'.join(UNITS)})\s*", text)
    if found is None or float(found[1]) == 0:
        raise ValueError(
            f"memory_budget must be a positive size such as 10GB or 512MiB ({', '.join(UNITS)}), got {text!r}."
        )
    return int(float(found[1]) * UNITS[found[2]])


def check_budget(budget: int, contender: Contender, dtype: str, device: torch.device) -> None:
    """`ValueError` for a budget that does not hold the weights, or that the machine does not have."""
    weights = contender.weights_bytes(DTYPES[dtype])
    if budget <= weights:
        raise ValueError(
            f"memory_budget must be larger than the weights: {contender.name} in {dtype} has "
            f"{weights / 2**20:.1f} MiB of them, got {budget / 2**20:.1f} MiB."
        )
    there = (
        torch.cuda.get_device_properties(device).total_memory
        if device.type == "cuda"
        else psutil.virtual_memory().available
    )
    if budget > there:
        raise ValueError(
            f"memory_budget must be at most what {device.type} has free, {there / 2**30:.1f} GiB, got "
            f"{budget / 2**30:.1f} GiB."
        )


def probe(
    contender: Contender,
    batch_size: int,
    device: torch.device,
    dtype: str,
    attention: str,
    threads: int,
    budget: int | None = None,
) -> dict[str, Any]:
    """
    Peak memory of one forward at this batch size, measured in a process of its own.

    On a CPU it is the process's peak of resident memory above what it had before it built the model: weights, input,
    and whatever the allocator keeps, counted as the system counts. On a GPU it is what torch's caching allocator
    allocated and reserved at most; the context of the driver, some hundred MB, is in no figure.

    Args:
        contender (`Contender`): the model.
        batch_size (`int`): images of the forward.
        device (`torch.device`): CPU (Linux) or CUDA.
        dtype (`str`): of weights and images, see [`~contenders.DTYPES`].
        attention (`str`): see [`~contenders.ATTENTIONS`].
        threads (`int`): of torch on the CPU; more threads hold more scratch memory.
        budget (`int`, *optional*): bytes that the allocator of a GPU may reserve.

    Returns:
        `dict`: `peak_bytes` (resident on a CPU, reserved on a GPU), `allocated_bytes` and `reserved_bytes` (`None` on
        a CPU), or `{"out_of_memory": True}` where a GPU's allocator refused.

    Raises:
        ValueError: where memory cannot be measured on this device.
        RuntimeError: with the end of what it said, where the process failed.
    """
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and platform.system() != "Linux"):
        raise ValueError(f"Peak memory is measured on cuda, and on cpu under Linux, not on {device.type} here.")
    request = {
        "contender": contender.to_dict(),
        "batch_size": batch_size,
        "device": str(device),
        "dtype": dtype,
        "attention": attention,
        "threads": threads,
        "budget": budget,
    }
    found = subprocess.run(
        [sys.executable, "-m", "hf_nose.memory_probe"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=PROBE_SECONDS,
    )
    if found.returncode:
        raise RuntimeError(
            f"Measuring the memory of {contender.name} at batch {batch_size} failed: {found.stderr.strip()[-500:]}"
        )
    return json.loads(found.stdout.splitlines()[-1])


def largest_batch(peak_at: Callable[[int], int | None], budget: int, first: int = 8) -> tuple[int, int]:
    """
    The most images whose peak stays within a budget: bisection between what fits and what does not, its next guess
    from the line through the last two peaks, which is nearly exact because memory grows linearly.

    Args:
        peak_at (`Callable[[int], int | None]`): bytes at a number of images, `None` where memory ran out.
        budget (`int`): bytes.
        first (`int`, *optional*, defaults to 8): images of the first guess.

    Returns:
        `tuple[int, int]`: images (0 where not even one fits) and the bytes of their peak (0 there).
    """
    fits, too_many = 0, MOST_IMAGES
    peaks: dict[int, int] = {}
    guess, steps = first, 0
    while too_many - fits > 1:
        guess = min(max(guess, fits + 1), too_many - 1)
        peak = peak_at(guess)
        if peak is not None:
            peaks[guess] = peak
        if peak is not None and peak <= budget:
            fits = guess
        else:
            too_many = guess
        steps += 1
        guess = next_guess(peaks, budget, fits, too_many, steps)
    return fits, peaks.get(fits, 0)


def next_guess(peaks: dict[int, int], budget: int, fits: int, too_many: int, steps: int) -> int:
    """Where the line through the two peaks nearest to the budget meets it; every fourth guess halves the bracket."""
    nearest = sorted(peaks, key=lambda images: abs(peaks[images] - budget))[:2]
    if steps % 4 and len(nearest) == 2:
        small, large = sorted(nearest)
        slope = (peaks[large] - peaks[small]) / (large - small)
        if slope > 0:
            return small + int((budget - peaks[small]) // slope)
    return 2 * fits if too_many == MOST_IMAGES and fits else (fits + too_many) // 2 if fits else max(too_many // 2, 1)


def images_in_budget(
    contender: Contender, budget: int, device: torch.device, dtype: str, attention: str, threads: int
) -> dict[str, Any]:
    """
    The largest batch of a model within a budget of memory, weights and input counted.

    Returns:
        `dict`: `images`, `peak_bytes` at that batch, `weights_bytes`, and `bytes_per_image`: what lies above the
        weights there, divided by the images (`None` where none fits).

    Raises:
        ValueError: where the budget does not hold the weights, or the machine not the budget.
    """
    check_budget(budget, contender, dtype, device)

    def peak_at(images: int) -> int | None:
        found = probe(contender, images, device, dtype, attention, threads, budget)
        return None if "out_of_memory" in found else found["peak_bytes"]

    images, peak = largest_batch(peak_at, budget)
    weights = contender.weights_bytes(DTYPES[dtype])
    return {
        "images": images,
        "peak_bytes": peak,
        "weights_bytes": weights,
        "bytes_per_image": (peak - weights) / images if images else None,
    }
