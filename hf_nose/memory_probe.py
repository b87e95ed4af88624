"""
Peak memory of one forward, in a process that does nothing else: `python -m hf_nose.memory_probe` reads what to run as
JSON from its input and answers with JSON on its output. [`~memory.probe`] starts it.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from .contenders import ATTENTIONS, DTYPES, Contender, release
from .devices import finish
from .shapes import sides


# More images than any budget holds: where the search stops.
MOST_IMAGES = 2**20
NOTHING: dict[str, Any] = {"peak_bytes": None, "allocated_bytes": None, "reserved_bytes": None}


def main() -> int:
    """Reads, measures, answers."""
    request = json.load(sys.stdin)
    sys.stdout.write(json.dumps(measured(**request)) + "\n")
    return 0


def measured(
    contender: dict[str, Any],
    batch_size: int,
    device: str,
    dtype: str,
    attention: str,
    threads: int,
    budget: int | None,
) -> dict[str, Any]:
    """
    Bytes at the peak of an inference, weights and input included, see [`~memory.probe`]; with a budget those of the
    largest batch in it, and its `images`, see [`~memory.images_in_budget`]: then the search begins at the batch size.
    """
    torch.set_num_threads(threads)
    where = torch.device(device)
    if where.type == "cuda" and budget is not None:
        total = torch.cuda.get_device_properties(where).total_memory
        torch.cuda.set_per_process_memory_fraction(min(budget / total, 1.0), where)
    described = Contender(**contender)
    weights = described.weights_bytes(DTYPES[dtype])
    warm_up(where, DTYPES[dtype], attention)
    release()
    before = resident_bytes() if where.type == "cpu" else 0
    model = described.build(where, DTYPES[dtype], attention)
    found: dict[int, dict[str, Any]] = {0: NOTHING}

    def peak_at(images: int) -> int | None:
        found[images] = peak_of(model, images, where, before)
        return found[images]["peak_bytes"]

    if budget is None:
        peak_at(batch_size)
        return found[batch_size]
    images = largest_batch(peak_at, budget, batch_size, weights)
    return {"images": images, **found[images]}


def peak_of(model: PreTrainedModel, num_images: int, device: torch.device, before: int) -> dict[str, Any]:
    """The peak of one forward; what an earlier one left behind is given back first. Nothing where memory runs out."""
    is_cuda = device.type == "cuda"
    release()
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        reset_peak()
    shape = (num_images, model.config.num_channels, *sides(model.config.image_size))
    try:
        with torch.inference_mode():
            # Not zeros: those take no memory before something is written.
            model(torch.ones(shape, device=device, dtype=model.dtype))
    except torch.OutOfMemoryError:
        return NOTHING
    if is_cuda:
        finish(device)
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return {"peak_bytes": reserved, "allocated_bytes": allocated, "reserved_bytes": reserved}
    return NOTHING | {"peak_bytes": peak_bytes() - before}


def largest_batch(peak_at: Callable[[int], int | None], budget: int, first: int, weights: int) -> int:
    """
    The most images whose peak stays within a budget, 0 where not even one does: larger and larger batches until one is
    too many, see [`larger`], then bisection between what fits and what does not, its next guess from the line through
    two peaks, because memory grows nearly linearly.

    Args:
        peak_at (`Callable[[int], int | None]`): bytes at a number of images, `None` where memory ran out.
        budget (`int`): bytes.
        first (`int`): images of the first guess, at least 1.
        weights (`int`): bytes that the weights take, whatever the images.
    """
    fits, too_many, guess = 0, MOST_IMAGES, first
    peaks = {0: weights}
    for step in itertools.count(1):
        peak = peak_at(guess)
        if peak is not None:
            peaks[guess] = peak
        if peak is not None and peak <= budget:
            fits = guess
        else:
            too_many = guess
        if too_many - fits <= 1:
            break
        if too_many == MOST_IMAGES:
            guess = larger(fits, peaks[fits] - weights, budget - weights, step)
        else:
            # Every fourth guess halves, should memory not grow along a line.
            halves = step % 4 == 0
            guess = (fits + too_many) // 2 if halves else along_the_line(peaks, budget, fits, too_many)
        guess = max(fits + 1, min(guess, too_many - 1))
    return fits


def larger(fits: int, taken: int, room: int, step: int) -> int:
    """
    The guess after a number of images that fits: as many as there would be room for if each took as much above the
    weights as these do on average. What a forward takes whatever its images makes that fall short of the budget rather
    than pass it, so the guess also grows a little more with every step. It is never more than four times what fits: a
    peak measured wrongly must not fill the machine.
    """
    by_memory = fits * room // taken if taken > 0 else 4 * fits
    return min(max(by_memory, fits + 2 ** (step - 1)), 4 * fits)


def along_the_line(peaks: dict[int, int], budget: int, fits: int, too_many: int) -> int:
    """Where the line through the two peaks nearest to the budget meets it."""
    nearest = sorted(sorted(peaks, key=lambda images: abs(peaks[images] - budget))[:2])
    if len(nearest) < 2 or peaks[nearest[1]] <= peaks[nearest[0]]:
        return (fits + too_many) // 2
    slope = (peaks[nearest[1]] - peaks[nearest[0]]) / (nearest[1] - nearest[0])
    return nearest[0] + int((budget - peaks[nearest[0]]) // slope)


def warm_up(device: torch.device, dtype: torch.dtype, attention: str) -> None:
    """A tiny model first, so that what the libraries load once counts for none of those compared."""
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, image_size=32)
    model = ViTForImageClassification(config).eval().to(device=device, dtype=dtype)
    model.set_attn_implementation(ATTENTIONS[attention])
    with torch.inference_mode():
        model(torch.zeros(1, 3, 32, 32, device=device, dtype=dtype))


def resident_bytes() -> int:
    """Memory of this process that is in RAM now."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most it ever was, since [`reset_peak`]. `getrusage` would also count the process that started this one."""
    return _status("VmHWM")


def reset_peak() -> None:
    """From now on [`peak_bytes`] counts anew: what building the model took is over."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status does not tell {key}: peak memory on a CPU needs Linux.")


if __name__ == "__main__":
    sys.exit(main())
