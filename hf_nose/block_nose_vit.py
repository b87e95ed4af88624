"""One block of a NoseViT: its attention is kept, diluted by the mask M, or gone.

This file travels to the Hub beside the weights: it imports nothing but torch, transformers and its neighbours.
Equation numbers are those of "MLP Can Be A Good Transformer Learner" (arXiv 2404.05657).
"""

from collections.abc import Iterable

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.dinov2.modeling_dinov2 import Dinov2DropPath
from transformers.models.vit.modeling_vit import ViTMLP

from .attention_nose_vit import NoseViTAttention
from .configuration_nose_vit import NoseViTConfig


class NoseViTLayer(GradientCheckpointingLayer):
    """
    One pre-norm block, `f = Attn(LN1(x)) + x`, `out = MLP(LN2(f)) + f`, with its attention kept, diluted (Eq. 8, 9)
    or removed. `gain` is what is left of the first line where attention is not computed: `f = gain * x`; it is `None`
    where attention is computed.

    With slices of both, and outside training and autograd, one tensor of the stream's size is made beside the input
    and no other: a slice of the attention goes from stream to stream, and one of the MLP is added where it stands.
    """

    def __init__(self, config: NoseViTConfig, layer: int):
        super().__init__()
        self.config = config
        self.layer = layer
        self.is_compensated = layer in config.compensated_attention_layers
        self.gain: int | None = None
        if layer in config.removed_attention_layers:
            self.gain = 2 if self.is_compensated else 1
        else:
            self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.scaled_eps(layer - 1))
            self.attention = NoseViTAttention(config)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.scaled_eps(layer))
        self.mlp = ViTMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = Dinov2DropPath(config.drop_path(layer))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        class_token_only: bool = False,
        **kwargs,
    ) -> torch.Tensor:
        """
        `hidden_states` (batch, tokens, hidden) -> the same shape, or (batch, 1, hidden) where attention is computed
        with `class_token_only`: all tokens are keys and values then, and only the class token goes on.
        """
        if self.gain is None:
            stream = self.attend(hidden_states, attention_mask, mask, class_token_only, **kwargs)
        else:
            stream = hidden_states if self.gain == 1 else self.gain * hidden_states
        return self.feed_forward(stream, is_own=self.gain != 1)

    def attend(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        mask: torch.Tensor | None,
        class_token_only: bool,
        **kwargs,
    ) -> torch.Tensor:
        """`f = M Attn(LN1(x)) + (2 - M) x`; outside training in slices of `config.chunk_size_attention` images."""
        size, images = self.config.chunk_size_attention, hidden_states.shape[0]
        # Recorded attentions are one tensor a layer, so there are no slices where they are asked for.
        wants_attentions = kwargs.get("output_attentions", self.config.output_attentions)
        if self.training or wants_attentions or not 0 < size < images:
            return self.attend_whole(hidden_states, attention_mask, mask, class_token_only, **kwargs)
        parts = hidden_states.split(size)
        if attention_mask is None or attention_mask.shape[0] == 1:
            slices = zip(parts, [attention_mask] * len(parts), strict=True)
        else:
            slices = zip(parts, attention_mask.split(size), strict=True)
        return assemble((self.attend_whole(*part, mask, class_token_only, **kwargs) for part in slices), images)

    def attend_whole(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        mask: torch.Tensor | None,
        class_token_only: bool,
        **kwargs,
    ) -> torch.Tensor:
        """`attend` over all images at once."""
        options = {"class_token_only": class_token_only, **kwargs}
        update = self.attention(self.layernorm_before(hidden_states), attention_mask, **options)[0]
        update = self.drop_path(self.dropout(update))
        if class_token_only:
            hidden_states = hidden_states[:, :1]
        if mask is not None:
            update = mask * update
            if self.is_compensated:
                hidden_states = (2 - mask) * hidden_states
        return update + hidden_states

    def feed_forward(self, hidden_states: torch.Tensor, is_own: bool) -> torch.Tensor:
        """
        `MLP(LN2(f)) + f` over (batch, tokens, hidden), in slices of `config.chunk_size_feed_forward` tokens, counted
        over images; they are written over `f` where it `is_own` to this block.
        """
        size, shape = self.config.chunk_size_feed_forward, hidden_states.shape
        if size <= 0:
            return self.drop_path(self.dropout(self.mlp(self.layernorm_after(hidden_states)))) + hidden_states
        if self.training or torch.is_grad_enabled():
            tokens = self.layernorm_after(hidden_states).flatten(0, 1)
            update = torch.cat([self.mlp(part) for part in tokens.split(size)]).unflatten(0, shape[:2])
            return self.drop_path(self.dropout(update)) + hidden_states
        tokens = hidden_states.flatten(0, 1)
        output = tokens if is_own else torch.empty_like(tokens)
        for part, place in zip(tokens.split(size), output.split(size), strict=True):
            place.copy_(self.mlp(self.layernorm_after(part)) + part)
        return output.unflatten(0, shape[:2])


def assemble(parts: Iterable[torch.Tensor], length: int) -> torch.Tensor:
    """
    The `parts`, one after the other, as one tensor with `length` rows. Without autograd each is written into its place
    as it comes, so that the whole is in memory once and not twice.
    """
    if torch.is_grad_enabled():
        return torch.cat(list(parts))
    whole, start = torch.empty(0), 0
    for part in parts:
        if start == 0:
            whole = part.new_empty(length, *part.shape[1:])
        whole[start : start + part.shape[0]] = part
        start += part.shape[0]
    return whole
