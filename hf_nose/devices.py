"""Where models run: the device that was asked for, and how long something takes on it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


# Seconds of one call, from an idle device until it has finished.
Stopwatch = Callable[[Callable[[], object]], float]


def choose_device(name: str) -> torch.device:
    """The device of a run; `ValueError` for one that is not there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(device for device in ("cuda", "mps", "cpu") if there[device]))
    if not there.get(name, False):
        raise ValueError(f"device {name!r} is not there; found {[device for device in there if there[device]]}.")
    return torch.device(name)


def finish(device: torch.device) -> None:
    """Waits for a device that computes beside the process."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def stopwatch(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> Stopwatch:
    """
    A stopwatch for a device: events on the device itself for CUDA, `clock` for everything else.

    Args:
        device (`torch.device`): where the calls compute.
        clock (`Callable[[], float]`, *optional*): seconds, only ever growing; the process's by default.
    """
    if device.type == "cuda":
        return lambda call: _event_seconds(call, device)

    def seconds(call: Callable[[], object]) -> float:
        finish(device)
        start = clock()
        call()
        finish(device)
        return clock() - start

    return seconds


def _event_seconds(call: Callable[[], object], device: torch.device) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    stream = torch.cuda.current_stream(device)
    finish(device)
    start.record(stream)
    call()
    end.record(stream)
    finish(device)
    return start.elapsed_time(end) / 1000.0
