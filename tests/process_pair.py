"""Runs a function on two processes joined by gloo."""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState, debug_launcher
from accelerate.state import AcceleratorState


def on_rank(work: Callable[[int, int], Any], folder: str) -> None:
    torch.set_num_threads(1)
    # A fork inherits the one-process state of the tests before.
    AcceleratorState._reset_state(True)
    state = PartialState(cpu=True)
    try:
        assert state.num_processes == 2
        answer = work(state.process_index, state.num_processes)
    except BaseException:
        traceback.print_exc()
        raise
    torch.save(answer, Path(folder) / f"{state.process_index}.pt")
    state.wait_for_everyone()
    state.destroy_process_group()


def run_on_two(work: Callable[[int, int], Any], folder: Path) -> list[Any]:
    """What `work(rank, world_size)` returned on either rank."""
    debug_launcher(on_rank, (work, str(folder)), num_processes=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]
