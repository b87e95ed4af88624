"""How much memory an inference takes, and how many images fit into a budget: every measurement in a fresh process."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from typing import Any

import psutil
import torch

from .contenders import DTYPES, Contender


UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
PROBE_SECONDS = 3600
# Images that the search in a budget begins with.
FIRST_GUESS = 8


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
    contender: Contender, batch_size: int, device: torch.device, dtype: str, attention: str, threads: int
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

    Returns:
        `dict`: `peak_bytes` (resident on a CPU, reserved on a GPU), `allocated_bytes` and `reserved_bytes` (`None` on
        a CPU); all `None` where a GPU ran out of memory.

    Raises:
        ValueError: where memory cannot be measured on this device.
        RuntimeError: with the end of what it said, where the process failed.
    """
    return answer(contender, batch_size, device, dtype, attention, threads, None)


def answer(
    contender: Contender,
    batch_size: int,
    device: torch.device,
    dtype: str,
    attention: str,
    threads: int,
    budget: int | None,
) -> dict[str, Any]:
    """What a fresh process measures, see [`~memory_probe.measured`]."""
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
    try:
        found = subprocess.run(
            [sys.executable, "-m", "hf_nose.memory_probe"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(
            f"Measuring the memory of {contender.name} took longer than {PROBE_SECONDS} seconds: give a smaller "
            "memory_budget or batch size."
        ) from error
    if found.returncode:
        # Killed by the system, it says nothing.
        reason = found.stderr.strip().splitlines()[-1:] or [f"exit code {found.returncode}"]
        raise RuntimeError(f"Measuring the memory of {contender.name} failed: {reason[0]}")
    return json.loads(found.stdout.splitlines()[-1])


def images_in_budget(
    contender: Contender, budget: int, device: torch.device, dtype: str, attention: str, threads: int
) -> dict[str, Any]:
    """
    The largest batch of a model within a budget of memory, weights and input counted, searched in one fresh process.
    On a GPU the allocator is held to the budget.

    Returns:
        `dict`: `images`; `peak_bytes`, `allocated_bytes` and `reserved_bytes` at that batch, see [`probe`];
        `weights_bytes`; and `bytes_per_image`, what lies above the weights there, divided by the images (all but
        `images` and `weights_bytes` are `None` where not even one image fits).

    Raises:
        ValueError: where the budget does not hold the weights, or the machine not the budget.
    """
    check_budget(budget, contender, dtype, device)
    found = answer(contender, FIRST_GUESS, device, dtype, attention, threads, budget)
    weights, images = contender.weights_bytes(DTYPES[dtype]), found["images"]
    above = None if found["peak_bytes"] is None else (found["peak_bytes"] - weights) / images
    return found | {"weights_bytes": weights, "bytes_per_image": above}
