"""What a launcher promised against what runs: as many processes, and as many threads, as were asked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

import psutil
import torch


_TWO_PROCESSES = "`torchrun --standalone --nproc_per_node 2 scripts/run_nose.py --device cpu ...`"


class LaunchError(RuntimeError):
    """Fewer processes run than were asked for."""


def check_launch(num_processes: int, environ: Mapping[str, str] = os.environ) -> None:
    """
    Stop where fewer processes run than the launcher was asked for: each would otherwise do the whole work alone, and
    nobody would say so.

    Args:
        num_processes (`int`):
            How many processes found each other: `accelerate.PartialState().num_processes`, after the start.
        environ (`Mapping[str, str]`, *optional*, defaults to `os.environ`): the environment of this process.

    Raises:
        LaunchError: saying what to type instead, in two cases that were seen with accelerate 1.15:

            - without a GPU, `accelerate launch --cpu --num_processes 2` and a config file with
              `distributed_type: MULTI_CPU` start one process. What they leave: `MASTER_ADDR`, which accelerate's
              launcher sets only where more than one process was asked for, without the `WORLD_SIZE` that a launcher of
              several processes sets;
            - under torchrun on a machine without a GPU, the processes join only where accelerate was told to use the
              CPU. What shows it: a `WORLD_SIZE` above the number of processes that found each other.
    """
    world_size = environ.get("WORLD_SIZE")
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in environ
    if num_processes == 1 and world_size is None and by_accelerate and "MASTER_ADDR" in environ:
        raise LaunchError(
            "accelerate launch was asked for several processes and started one: without GPUs it does so for "
            "`--cpu --num_processes N` and for a config file with `distributed_type: MULTI_CPU`. "
            f"For two processes on CPUs type {_TWO_PROCESSES}; for one, `accelerate launch --num_processes 1 ...` "
            "with MASTER_ADDR unset."
        )
    if world_size is not None and int(world_size) > num_processes:
        raise LaunchError(
            f"{world_size} processes were started (WORLD_SIZE) but only {num_processes} found each other, so each "
            "would do the whole work alone. Where there is no GPU, the processes join only when told to use the CPU: "
            f"type {_TWO_PROCESSES}, or in code TrainingArguments(use_cpu=True) or PartialState(cpu=True)."
        )


def check_sharding(is_sharded: bool, environ: Mapping[str, str] = os.environ) -> None:
    """
    Stop where weights were to be sharded and are not: on CPUs accelerate 1.15 takes FSDP for DDP, and nobody says so.

    Args:
        is_sharded (`bool`): whether the trainer found FSDP.
        environ (`Mapping[str, str]`, *optional*, defaults to `os.environ`): the environment of this process.

    Raises:
        LaunchError: saying what to type instead.
    """
    if environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and not is_sharded:
        raise LaunchError(
            "FSDP was asked for, but accelerate shards on GPUs alone: here every process would hold all weights. "
            f"Start with scripts/accelerate/ddp.yaml, or on CPUs {_TWO_PROCESSES}."
        )


def own_the_machine() -> None:
    """
    Give the one process of a run all physical cores where accelerate's launcher took them away.

    `accelerate launch` sets `OMP_NUM_THREADS=1` for its child unless told otherwise, which on a CPU halves two cores.
    A number that the user chose must stand (another one gives other bits), and both look the same from inside. So the
    launcher, the parent process, is asked what it was given: where neither its own environment has `OMP_NUM_THREADS`
    nor its command line `--num_cpu_threads_per_process` (accelerate's config file sets neither), the launcher chose.
    Where that cannot be told, the number stands as if the user had chosen it: the parent cannot be read, or is another
    program, say a shell between the two, whose environment has the variable.

    With several processes, and without accelerate's launcher, nothing is changed. One thread for each of several
    processes is right on a CPU: OpenMP's threads of two of them slow each other down many times.
    """
    launched_alone = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("WORLD_SIZE", "1") == "1"
    if launched_alone and not _user_chose_threads():
        torch.set_num_threads(_available_cores())


def _user_chose_threads() -> bool:
    try:
        launcher = psutil.Process(os.getppid())
        options = [argument.replace("-", "_") for argument in launcher.cmdline()]
        given = launcher.environ()
    except psutil.Error:  # the parent has ended, or belongs to someone else: undecidable, so the number stands
        return True
    return "OMP_NUM_THREADS" in given or any(option.startswith("__num_cpu") for option in options)


def _available_cores() -> int:
    """Physical cores, or fewer where this process may not use them all (a container, `taskset`)."""
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else psutil.cpu_count()
    return min(psutil.cpu_count(logical=False) or allowed, allowed)
