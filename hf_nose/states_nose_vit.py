"""Which state each block of a NoseViT is in: kept, diluted by its value of the mask M, or without attention.

This file travels to the Hub beside the weights: it imports nothing but torch, transformers and its neighbours.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn

from .block_nose_vit import NoseViTLayer
from .configuration_nose_vit import NoseViTConfig


class BlockStates(nn.Module):
    """What the bare model knows of its blocks' states; M is a buffer, and Python flags follow from it."""

    config: NoseViTConfig
    layers: nn.ModuleList
    dilution_mask: torch.Tensor | None
    is_mask_zero: bool
    _start: tuple[int, torch.Tensor] | None

    @property
    def blocks(self) -> list[NoseViTLayer]:
        """The blocks, from the input on."""
        return cast(list[NoseViTLayer], list(self.layers))

    @property
    def kept_attention_layers(self) -> list[int]:
        """Blocks whose attention is whole: neither diluted nor removed."""
        gone = {*self.config.removed_attention_layers, *self.config.diluted_attention_layers}
        return [layer for layer in range(self.config.num_hidden_layers) if layer not in gone]

    def mask_values(self) -> list[float]:
        """M, one number in [0, 1] per diluted layer in ascending order."""
        return [] if self.dilution_mask is None else self.dilution_mask.tolist()

    def sync_gains(self, values: list[float] | None = None) -> None:
        """Sets, from M, whether diluted attention is computed: a Python flag, so that compiling sees it."""
        if self.dilution_mask is not None and self.dilution_mask.is_meta:
            return
        values = self.mask_values() if values is None else values
        self.is_mask_zero = bool(values) and not any(values)
        for layer in self.config.diluted_attention_layers:
            block = self.blocks[layer]
            block.gain = (2 if block.is_compensated else 1) if self.is_mask_zero else None

    @contextmanager
    def starting_at(self, layer: int, hidden_states: torch.Tensor) -> Iterator[None]:
        """
        Within the context a forward skips the embeddings and the blocks before `layer`: block `layer` is fed
        `hidden_states` (its recorded input). The head and whatever wraps this model run as ever.
        """
        self._start = (layer, hidden_states)
        try:
            yield
        finally:
            self._start = None


def sync_gains_after_loading(module: BlockStates, _incompatible_keys) -> None:
    """`load_state_dict` post-hook, a named function so that a model can be pickled."""
    module.sync_gains()


__all__ = ["BlockStates", "sync_gains_after_loading"]
