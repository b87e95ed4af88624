"""The stream around the blocks: what a classifier needs of it, and what is handed out of a folded one.

This file travels to the Hub beside the weights: it imports nothing but torch, transformers and its neighbours.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import torch
from transformers.masking_utils import create_bidirectional_mask

from .block_nose_vit import NoseViTLayer
from .configuration_nose_vit import NoseViTConfig


def tail_changes_nothing(config: NoseViTConfig, is_training: bool, options: Mapping[str, Any]) -> bool:
    """
    Whether the tail may begin: `options` of the forward or `config` ask for no hidden states and no attentions, and no
    dropout is about to be drawn. Dropout draws for every token, so with fewer of them the class token's own draws (and
    all later ones) would be others; stochastic depth draws for every image, whatever its tokens. An adapter's dropout
    is not looked for: it draws from the same distribution with the tail, but other numbers.
    """
    recorded = ("output_hidden_states", config.output_hidden_states), ("output_attentions", config.output_attentions)
    if any(options.get(name, default) for name, default in recorded):
        return False
    return not (is_training and (config.hidden_dropout_prob or config.attention_probs_dropout_prob))


def last_attention(blocks: Sequence[NoseViTLayer]) -> int:
    """The last block whose attention is computed: not removed, masked, or at M = 0; -1 where there is none."""
    computed = [layer for layer, block in enumerate(blocks) if block.gain is None]
    return computed[-1] if computed else -1


def class_token_mask(config: NoseViTConfig, hidden_states: torch.Tensor, attention_mask: Any) -> Any:
    """
    What `create_bidirectional_mask` makes of `attention_mask`, for one query, the class token, against all tokens of
    `hidden_states` (batch, tokens, hidden). A mask prepared by the caller (batch, heads, queries, keys) gives its row.
    """
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4:
        return attention_mask[:, :, :1]
    return create_bidirectional_mask(config, hidden_states[:, :1], attention_mask, encoder_hidden_states=hidden_states)


def rescale_hidden_states(forward: Callable) -> Callable:
    """Multiplies recorded hidden states back by what folding divided out; sits outside the hooks that record them."""

    @wraps(forward)
    def wrapper(self, *args, **kwargs):
        return_dict = kwargs.pop("return_dict", self.config.return_dict)
        output = forward(self, *args, return_dict=True, **kwargs)
        if self.config.folded_attention_layers and output.get("hidden_states") is not None:
            output["hidden_states"] = tuple(
                state if state is None else state * self.config.stream_scale(layer)
                for layer, state in enumerate(output["hidden_states"], start=-1)
            )
        return output.to_tuple() if return_dict is False else output

    return wrapper


__all__ = ["class_token_mask", "last_attention", "rescale_hidden_states", "tail_changes_nothing"]
