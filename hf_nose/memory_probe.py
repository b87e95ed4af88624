"""
Peak memory of one forward, in a process that does nothing else: `python -m hf_nose.memory_probe` reads what to run as
JSON from its input and answers with JSON on its output. [`~memory.probe`] starts it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import ViTConfig, ViTForImageClassification

from .contenders import ATTENTIONS, DTYPES, Contender, release


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
    Bytes at the peak of an inference, weights and input included; see [`~memory.probe`]. On a GPU the caching
    allocator is held to `budget`, and what does not fit gives `{"out_of_memory": True}`.
    """
    torch.set_num_threads(threads)
    where = torch.device(device)
    if where.type == "cuda" and budget is not None:
        total = torch.cuda.get_device_properties(where).total_memory
        torch.cuda.set_per_process_memory_fraction(min(budget / total, 1.0), where)
    warm_up(where, DTYPES[dtype], attention)
    release()
    before = resident_bytes() if where.type == "cpu" else 0
    try:
        model = Contender(**contender).build(where, DTYPES[dtype], attention)
        if where.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(where)
        else:
            reset_peak()
        with torch.inference_mode():
            size = model.config.image_size
            height, width = size if isinstance(size, list | tuple) else (size, size)
            shape = (batch_size, model.config.num_channels, height, width)
            # Not zeros: those take no memory before something is written.
            images = torch.ones(shape, device=where, dtype=model.dtype)
            model(images)
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    if where.type == "cuda":
        torch.cuda.synchronize(where)
        allocated, reserved = torch.cuda.max_memory_allocated(where), torch.cuda.max_memory_reserved(where)
        return {"peak_bytes": reserved, "allocated_bytes": allocated, "reserved_bytes": reserved}
    return {"peak_bytes": peak_bytes() - before, "allocated_bytes": None, "reserved_bytes": None}


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
