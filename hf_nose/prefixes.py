"""Forwards under sets of masked attention layers, each from the first block at which it differs from one already run.

Masking layer i changes nothing before block i. So the block inputs of one set serve every larger one up to the first
layer that it adds: within a round of the search (the prefix cache) and, where they are kept, from round to round.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .modeling_nose_vit import NoseViTModel


LayerSet = tuple[int, ...]
# The input of every block, in order, each (batch, tokens, hidden).
Path = Sequence[torch.Tensor]
Paths = dict[LayerSet, Path]
See = Callable[[LayerSet, Any], None]


class MaskedForwards:
    """
    Runs a model under a set of masked layers, and under the set with one more layer, for each of several.

    Args:
        vit ([`NoseViTModel`]): the ViT within the model.
        forward (`Callable`): pixel values (batch, channels, height, width) -> the outputs that are looked at.
        mask (`str`): `"skip"` (f = x) or `"double"` (f = 2x).
        stacks (`bool`): run what candidates compute after their own masked block as one growing batch instead of one
            after another: fewer and larger kernels, the same arithmetic. Rounding differs in the last bits.
        cache_bytes (`int`): block inputs are kept for the next round up to so many bytes, on the model's device.

    Attributes:
        block_forwards (`int`): blocks that were run, times the batches that each of them was run on.
    """

    def __init__(
        self,
        vit: NoseViTModel,
        forward: Callable[[torch.Tensor], Any],
        mask: str = "skip",
        stacks: bool = False,
        cache_bytes: int = 0,
    ):
        self.vit, self.forward, self.mask, self.stacks = vit, forward, mask, stacks
        self.cache_bytes = cache_bytes
        self.block_forwards = 0
        self._paths: dict[int, Paths] = {}
        self._bytes: dict[int, int] = {}

    def run(
        self,
        number: int,
        pixel_values: torch.Tensor,
        base: LayerSet,
        candidates: Sequence[int],
        see: See,
        sees_base: bool = True,
    ) -> None:
        """
        Calls `see` with every set and its outputs on one batch: `base`, unless `sees_base` is false, and `base` with
        each of `candidates` added.

        Args:
            number (`int`): the batch's number, by which a later round knows its block inputs again.
        """
        known = self._paths.get(number, {})
        with self.vit.masked_attention(base, self.mask):
            paths: Paths = {}
            if base in known:
                paths[base] = known[base]
            if sees_base or base not in known:
                start, path = nearest(base, known)
                outputs, inputs = self._run_from(start, path[start] if path else None, pixel_values)
                self.block_forwards += len(self.vit.layers) - start
                paths[base] = [*path[:start], *inputs]
                if sees_base:
                    see(base, outputs)
            is_kept = self._make_room(number, paths[base], candidates)
            known = {**known, **paths}
            run = self._stacked if self.stacks else self._one_by_one
            if candidates:
                paths |= run(pixel_values, base, candidates, known, see, is_kept)
        self._paths[number] = paths if is_kept else {}

    def _one_by_one(
        self,
        pixel_values: torch.Tensor,
        base: LayerSet,
        candidates: Sequence[int],
        known: Paths,
        see: See,
        is_kept: bool,
    ) -> Paths:
        paths: Paths = {}
        for layer in candidates:
            layers = extend(base, layer)
            start, path = nearest(layers, known)
            with self.vit.masked_attention([layer], self.mask):
                outputs, inputs = self._run_from(start, path[start], pixel_values, is_recorded=is_kept)
            self.block_forwards += len(self.vit.layers) - start
            see(layers, outputs)
            if is_kept:
                paths[layers] = [*path[:start], *inputs]
        return paths

    def _stacked(
        self,
        pixel_values: torch.Tensor,
        base: LayerSet,
        candidates: Sequence[int],
        known: Paths,
        see: See,
        is_kept: bool,
    ) -> Paths:
        """One forward whose batch grows: each candidate joins behind its own masked block, or where it was kept."""
        images, blocks = len(pixel_values), len(self.vit.layers)
        arrivals = []
        for layer in candidates:
            layers = extend(base, layer)
            start, path = nearest(layers, known)
            state, station = path[start], start
            if start == layer:
                with self.vit.masked_attention([layer], self.mask):
                    state, station = self.vit.layers[layer](state), layer + 1
            self.block_forwards += blocks - start
            arrivals.append((station, layers, path[: start + 1], state))
        arrivals.sort(key=lambda arrival: arrival[:2])
        first = arrivals[0][0]
        states = {station: [state for at, *_, state in arrivals if at == station] for station, *_ in arrivals}
        later = {station: torch.cat(joined) for station, joined in states.items() if station > first}
        with joining([*self.vit.blocks, self.vit.layernorm], later):
            outputs, inputs = self._run_from(first, torch.cat(states[first]), pixel_values, is_kept)
        paths: Paths = {}
        for place, (_, layers, prefix, _) in enumerate(arrivals):
            rows = slice(place * images, (place + 1) * images)
            see(layers, type(outputs)(**{name: value[rows] for name, value in outputs.items()}))
            if is_kept:
                # Copies: the picked one's states must not keep those of all the others alive.
                paths[layers] = [*prefix, *(state[rows].clone() for state in inputs[len(prefix) - first :])]
        return paths

    def _run_from(
        self, start: int, state: torch.Tensor | None, pixel_values: torch.Tensor, is_recorded: bool = True
    ) -> tuple[Any, list[torch.Tensor]]:
        """Outputs, and the inputs of the blocks run: all of them, from the pixels, where `state` is `None`."""
        with ExitStack() as stack:
            inputs = stack.enter_context(block_inputs(self.vit.blocks)) if is_recorded else []
            if state is not None:
                stack.enter_context(self.vit.starting_at(start, state))
            outputs = self.forward(pixel_values)
        return outputs, inputs

    def _make_room(self, number: int, path: Path, candidates: Sequence[int]) -> bool:
        """Whether the block inputs of the base and of every candidate behind its own block may be kept."""
        states = len(path) + sum(len(path) - 1 - layer for layer in candidates)
        needed = states * path[0].nbytes
        others = sum(size for other, size in self._bytes.items() if other != number)
        is_kept = others + needed <= self.cache_bytes
        self._bytes[number] = needed if is_kept else 0
        return is_kept


def extend(base: LayerSet, layer: int) -> LayerSet:
    """`base` with one more layer, sorted."""
    return tuple(sorted((*base, layer)))


def nearest(layers: LayerSet, paths: Mapping[LayerSet, Path]) -> tuple[int, Path]:
    """
    Where a forward under `layers` may start, and on whose path: the last block, by number, whose input is that of a
    set already run. Only subsets count: behind the last attention of any other, the class token may be all there is.
    (0, empty) where there is none.
    """
    found: tuple[int, Path] = (0, [])
    for other, path in paths.items():
        if set(other) <= set(layers):
            start = min(set(layers) - set(other), default=len(path) - 1)
            if not found[1] or start > found[0]:
                found = (start, path)
    return found


@contextmanager
def block_inputs(blocks: Sequence[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """The input of every block, in order, as a forward within the context meets it."""
    inputs: list[torch.Tensor] = []
    handles = [block.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for block in blocks]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def joining(modules: Sequence[nn.Module], arrivals: Mapping[int, torch.Tensor]) -> Iterator[None]:
    """Within the context the rows of `arrivals[k]` join the batch in front of `modules[k]`."""

    def hook(arrived: torch.Tensor) -> Callable:
        def join(_module: nn.Module, args: tuple) -> tuple:
            hidden_states, *others = args
            # Behind the last attention the class token may be all that is left of those under way.
            return torch.cat([hidden_states, arrived[:, : hidden_states.shape[1]]]), *others

        return join

    handles = [modules[place].register_forward_pre_hook(hook(rows)) for place, rows in arrivals.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
