"""One block of a NoseViT: its attention is kept, diluted by the mask M, or gone.

This file travels to the Hub beside the weights: it imports nothing but torch, transformers and its neighbours.
Equation numbers are those of "MLP Can Be A Good Transformer Learner" (arXiv 2404.05657).
"""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.dinov2.modeling_dinov2 import Dinov2DropPath
from transformers.models.vit.modeling_vit import ViTAttention, ViTMLP

from .configuration_nose_vit import NoseViTConfig


class NoseViTLayer(GradientCheckpointingLayer):
    """
    One pre-norm block, `f = Attn(LN1(x)) + x`, `out = MLP(LN2(f)) + f`, with its attention kept, diluted (Eq. 8, 9)
    or removed. `gain` is what is left of the first line where attention is not computed: `f = gain * x`; it is `None`
    where attention is computed.
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
            self.attention = ViTAttention(config)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.scaled_eps(layer))
        self.mlp = ViTMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = Dinov2DropPath(config.drop_path(layer))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        if self.gain is None:
            update = self.attend(self.layernorm_before(hidden_states), attention_mask, **kwargs)
            update = self.drop_path(self.dropout(update))
            if mask is not None:
                update = mask * update
                if self.is_compensated:
                    hidden_states = (2 - mask) * hidden_states
            hidden_states = update + hidden_states
        elif self.gain != 1:
            hidden_states = self.gain * hidden_states
        update = self.feed_forward(self.layernorm_after(hidden_states))
        return self.drop_path(self.dropout(update)) + hidden_states

    def attend(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs) -> torch.Tensor:
        """Attention over (batch, tokens, hidden); outside training by `config.chunk_size_attention` images."""
        size = self.config.chunk_size_attention
        # Recorded attentions are one tensor a layer, so there are no slices where they are asked for.
        wants_attentions = kwargs.get("output_attentions", self.config.output_attentions)
        if self.training or wants_attentions or not 0 < size < hidden_states.shape[0]:
            return self.attention(hidden_states, attention_mask, **kwargs)[0]
        masks = (None,) * -(-hidden_states.shape[0] // size) if attention_mask is None else attention_mask.split(size)
        slices = zip(hidden_states.split(size), masks, strict=True)
        return torch.cat([self.attention(images, mask, **kwargs)[0] for images, mask in slices])

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The MLP over (batch, tokens, hidden), in slices of `config.chunk_size_feed_forward` tokens."""
        size = self.config.chunk_size_feed_forward
        if size <= 0:
            return self.mlp(hidden_states)
        tokens = hidden_states.flatten(0, -2)
        return torch.cat([self.mlp(part) for part in tokens.split(size)]).view_as(hidden_states)
