"""One process or several: whole batches are dealt to the ranks, and what they found is merged alike on all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.tensor import DTensor


Batch = Mapping[str, torch.Tensor]
Batches = Sequence[Batch] | Iterable[Batch]


class Mergeable(Protocol):
    """What a rank found, to be added up."""

    def merge(self, other: Any) -> Any:
        """Adds what `other` found."""


Found = TypeVar("Found", bound=Mergeable)


def place(rank: int | None = None, world_size: int | None = None) -> tuple[int, int]:
    """Which of how many processes this is: as given, otherwise as accelerate found it."""
    if rank is None or world_size is None:
        state = PartialState()
        return state.process_index, state.num_processes
    return rank, world_size


def deal(batches: Batches, rank: int, world_size: int, numbers: range | None = None) -> Iterator[tuple[int, Batch]]:
    """
    The batches of one rank with their numbers, or those in `numbers`: whole ones, dealt in turn, so none is padded and
    every forward sees the batch size it would in one process. Of a sequence a rank builds only its own.
    """
    if isinstance(batches, Sequence):
        own = range(rank, len(batches), world_size)
        return ((number, batches[number]) for number in own if numbers is None or number in numbers)
    dealt = islice(enumerate(batches), rank, None, world_size)
    return ((number, batch) for number, batch in dealt if numbers is None or number in numbers)


def merge_across_processes(
    found: dict[Any, Found], empty: Callable[[], Found], failure: FloatingPointError | None = None
) -> dict[Any, Found]:
    """
    Merges each entry over all processes, in the same order everywhere, so that every rank holds the same bits. What a
    rank failed with is raised by all of them: one alone would leave the others waiting.
    """
    merged = {key: empty() for key in found}
    parts = gather_object([(found, failure)])
    failures = [error for _, error in parts if error is not None]
    if failures:
        raise failures[0]
    for part, _ in parts:
        for key, value in part.items():
            merged[key].merge(value)
    return merged


def agree(found: Any) -> Any:
    """The first process's `found`, on all: what is decided in floating point may differ in the last bit elsewhere."""
    return gather_object([found])[0]


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """
    The weights of a model whose parameters are sharded over the ranks, which all have to ask for them, on the CPU;
    `None` where every rank has them whole.
    """
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return None
    state = model.state_dict()
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu() for name, tensor in state.items()
    }
