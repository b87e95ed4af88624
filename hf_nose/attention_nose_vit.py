"""A ViT's attention whose queries may be the class token's alone, and whose q, k and v may be one matrix product.

This file travels to the Hub beside the weights: it imports nothing but torch, transformers and its neighbours.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit.modeling_vit import ViTAttention, eager_attention_forward

from .configuration_nose_vit import NoseViTConfig


PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class NoseViTAttention(ViTAttention):
    """
    [`~transformers.models.vit.modeling_vit.ViTAttention`] with one query row where only the class token is needed.

    Between `fuse` and `unfuse` the weights of q, k and v are one parameter, each third of its rows one of them; the
    state dict holds the three under their own names at all times.
    """

    qkv_weight: nn.Parameter | None
    qkv_bias: nn.Parameter | None

    def __init__(self, config: NoseViTConfig):
        super().__init__(config)
        self.register_parameter("qkv_weight", None)
        self.register_parameter("qkv_bias", None)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        class_token_only: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        `hidden_states` (batch, tokens, hidden) -> the same shape, or (batch, 1, hidden) with `class_token_only`, where
        `attention_mask` is that of the class token's row; and the attention weights where the implementation has any.
        """
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        # Unpacked in the call, so that q, k and v are gone when the output is projected.
        output, weights = attend(
            self,
            *self.heads(hidden_states, class_token_only),
            attention_mask,
            dropout=dropout,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.flatten(2)), weights

    def heads(self, hidden_states: torch.Tensor, class_token_only: bool) -> list[torch.Tensor]:
        """Queries, keys and values by head, each (batch, heads, tokens, head_dim)."""
        projected = self.project(hidden_states, class_token_only)
        return [states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for states in projected]

    def project(self, hidden_states: torch.Tensor, class_token_only: bool) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values, each (batch, tokens, hidden), the queries (batch, 1, hidden) if asked for."""
        # Contiguous: a Linear over rows that lie apart becomes one small product an image.
        queried = hidden_states[:, :1].contiguous() if class_token_only else hidden_states
        if self.qkv_weight is None:
            return self.q_proj(queried), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if self.training:
            raise ValueError("Fused projections are for inference: call unfuse_qkv_projections() before training.")
        if not class_token_only:
            return linear(hidden_states, self.qkv_weight, self.qkv_bias).chunk(3, dim=-1)
        width = len(self.qkv_weight) // 3
        of_query, of_rest = self.qkv_weight.split((width, 2 * width))
        biases = (None, None) if self.qkv_bias is None else self.qkv_bias.split((width, 2 * width))
        return linear(queried, of_query, biases[0]), *linear(hidden_states, of_rest, biases[1]).chunk(2, dim=-1)

    @torch.no_grad()
    def fuse(self) -> None:
        """Makes one parameter of the three projections', which are freed; nothing to do where that is so already."""
        if self.qkv_weight is not None:
            return
        projections = [self.get_submodule(name) for name in PROJECTIONS]
        odd = sorted({type(module).__name__ for module in projections if type(module) is not nn.Linear})
        if odd:
            raise ValueError(f"q, k and v must be plain Linear modules to be fused, got {odd}. Merge adapters first.")
        if len({parameter.requires_grad for module in projections for parameter in module.parameters()}) > 1:
            raise ValueError("q, k and v must all be trainable or all be frozen to be fused, got some of each.")
        for kind in ("weight", "bias"):
            tensors = [getattr(module, kind) for module in projections]
            if tensors[0] is not None:
                fused = nn.Parameter(torch.cat(tensors), requires_grad=tensors[0].requires_grad)
                setattr(self, f"qkv_{kind}", fused)
        for name in PROJECTIONS:
            delattr(self, name)

    @torch.no_grad()
    def unfuse(self) -> None:
        """Gives the projections their own parameters back, bit for bit and in their old order."""
        if self.qkv_weight is None:
            return
        weights, output = self.qkv_weight, self._modules.pop("o_proj")
        biases = (None, None, None) if self.qkv_bias is None else self.qkv_bias.chunk(3)
        for name, weight, bias in zip(PROJECTIONS, weights.chunk(3), biases, strict=True):
            module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
            module.weight = nn.Parameter(weight.clone(), requires_grad=weights.requires_grad)
            if bias is not None:
                module.bias = nn.Parameter(bias.clone(), requires_grad=weights.requires_grad)
            self.add_module(name, module.train(self.training))
        self.add_module("o_proj", output)
        self.qkv_weight = self.qkv_bias = None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        fused = {kind: destination.pop(f"{prefix}qkv_{kind}", None) for kind in ("weight", "bias")}
        for index, name in enumerate(PROJECTIONS):
            for kind, tensor in fused.items():
                if tensor is not None:
                    destination[f"{prefix}{name}.{kind}"] = tensor.chunk(3)[index]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for kind in ("weight", "bias"):
            names = [f"{prefix}{name}.{kind}" for name in PROJECTIONS]
            if self._parameters[f"qkv_{kind}"] is not None and all(name in state_dict for name in names):
                state_dict[f"{prefix}qkv_{kind}"] = torch.cat([state_dict.pop(name) for name in names])
        super()._load_from_state_dict(state_dict, prefix, *args)


__all__ = ["NoseViTAttention"]
