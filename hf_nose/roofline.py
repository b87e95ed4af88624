"""What the machine could do: its measured rate of matrix products, and the share of it that a model reaches."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from .devices import Stopwatch, stopwatch


# Rows, inputs and outputs of a product: the two of DeiT-B's MLP at 4,096 tokens, and squares.
CPU_SIZES = ((4096, 768, 3072), (4096, 3072, 768), (1024, 1024, 1024), (2048, 2048, 2048))
GPU_SIZES = ((65536, 768, 3072), (65536, 3072, 768), (4096, 4096, 4096), (8192, 8192, 8192))


def gemm_rate(
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sequence[tuple[int, int, int]] | None = None,
    repeats: int = 7,
    watch: Stopwatch | None = None,
) -> dict[str, Any]:
    """
    Multiply-accumulates per second of dense matrix products, as linear layers do them: the best of several sizes, of
    each the median over repeats after one to warm up.

    Args:
        device (`torch.device`): where to compute.
        dtype (`torch.dtype`): of both matrices.
        sizes (`Sequence[tuple[int, int, int]]`, *optional*): rows, inputs and outputs; by default the products of
            DeiT-B's MLP and squares, larger ones on a GPU.
        repeats (`int`, *optional*, defaults to 7): timed products of a size.
        watch (`Stopwatch`, *optional*): seconds of one call; by default that of the device.

    Returns:
        `dict`: `macs_per_s` and the `size` that reached it.
    """
    watch = stopwatch(device) if watch is None else watch
    if sizes is None:
        sizes = GPU_SIZES if device.type == "cuda" else CPU_SIZES
    rates = []
    for rows, inputs, outputs in sizes:
        # Random numbers: a GPU multiplies constants faster, because fewer bits change.
        tokens = torch.randn(rows, inputs, device=device, dtype=dtype)
        weight = torch.randn(outputs, inputs, device=device, dtype=dtype)
        multiply = partial(functional.linear, tokens, weight)
        with torch.inference_mode():
            seconds = [watch(multiply) for _ in range(repeats + 1)][1:]
        macs = rows * inputs * outputs
        rates.append({"macs_per_s": macs / statistics.median(seconds), "size": [rows, inputs, outputs]})
    return best(rates)


def best(rates: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The highest of several rates: whatever disturbs a measurement makes it lower."""
    return max(rates, key=lambda rate: rate["macs_per_s"])


def update_shares(groups: Sequence[dict[str, Any]]) -> None:
    """
    Gives every model that was timed its `gemm_share`: the share, from 0, of the machine's rate of matrix products that
    the model's own MACs reach. The rate is the best one found beside any group of the same data type.
    """
    for dtype in {group["dtype"] for group in groups if "gemm" in group}:
        timed = [group for group in groups if group["dtype"] == dtype and "gemm" in group]
        rate = best([group["gemm"] for group in timed])["macs_per_s"]
        for model in (model for group in timed for model in group["models"]):
            model["gemm_share"] = model["images_per_s"] * model["macs_computed"] / rate
