"""Removal and exact folding: delete diluted attention at M = 0 and divide the doubling out of the weights.

Where a removed, compensated block doubles the stream, the stream is kept as `x / s` from there on: the output matrices
of attention and MLP are divided by the `s` in force, and every LayerNorm uses `eps / s^2` (the model derives that from
its configuration). Powers of two only move exponents, so nothing is lost to rounding.
"""

import copy
from typing import TypeVar

import torch
from torch import nn

from .configuration_nose_vit import NoseViTConfig
from .entropy import evaluating
from .modeling_nose_vit import NoseViTModel, nose_vit


Model = TypeVar("Model", bound=nn.Module)


def fold(model: Model) -> Model:
    """
    A new model of the same class without the diluted layers' attention and without any doubling.

    Args:
        model: holds one [`NoseViTModel`] whose M is 0; it is left as it is.

    Returns:
        The folded model. Its hidden states come back multiplied by s, so they equal the unfolded model's.

    Raises:
        `ValueError`: where M is not 0 in some diluted layer.
        `ArithmeticError`: where the outputs before and after differ (in any bit, in float32 or float64).
    """
    vit = nose_vit(model)
    if vit.config.diluted_attention_layers and not vit.is_mask_zero:
        values = dict(zip(vit.config.diluted_attention_layers, vit.mask_values(), strict=True))
        raise ValueError(
            f"fold needs M = 0 in every diluted layer, got {values}. Finish the dilution or set_mask(0.0)."
        )
    config = folded_config(vit.config)
    folded_vit: NoseViTModel = type(vit)(config)
    nn.Module.to(folded_vit, device=vit.device, dtype=vit.dtype)
    folded_vit.load_state_dict(folded_state(vit, config))
    folded_vit.train(vit.training)
    # Whatever holds the old ViT and its configuration holds the new ones in the copy.
    folded: Model = copy.deepcopy(model, {id(vit): folded_vit, id(vit.config): config})
    check_same_outputs(vit, folded_vit)
    return folded


def folded_config(config: NoseViTConfig) -> NoseViTConfig:
    """The configuration after folding: diluted layers removed, compensated ones folded."""
    config = copy.deepcopy(config)
    config.removed_attention_layers = sorted([*config.removed_attention_layers, *config.diluted_attention_layers])
    config.folded_attention_layers = sorted([*config.folded_attention_layers, *config.compensated_attention_layers])
    config.diluted_attention_layers = []
    config.compensated_attention_layers = []
    config.validate()
    return config


def folded_state(vit: NoseViTModel, config: NoseViTConfig) -> dict[str, torch.Tensor]:
    """The state dict of `vit` for `config`: dead keys dropped, output matrices divided by the growth of s."""
    state = {}
    for name, tensor in vit.state_dict().items():
        parts = name.split(".")
        if name == "dilution_mask":
            continue
        if parts[0] == "layers":
            layer, module = int(parts[1]), ".".join(parts[2:-1])
            if layer in config.removed_attention_layers and parts[2] in ("attention", "layernorm_before"):
                continue
            if module in ("attention.o_proj", "mlp.fc2"):
                tensor = tensor / (config.stream_scale(layer) / vit.config.stream_scale(layer))
        state[name] = tensor
    return state


@torch.no_grad()
def check_same_outputs(before: NoseViTModel, after: NoseViTModel, images: int = 2) -> None:
    """Compares the tokens after the final norm on seeded noise `images`; `ArithmeticError` where they differ."""
    patches = before.embeddings.patch_embeddings
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(images, patches.num_channels, *patches.image_size, generator=generator)
    pixel_values = pixel_values.to(before.device)
    with evaluating(before), evaluating(after):
        old, new = before(pixel_values).last_hidden_state, after(pixel_values).last_hidden_state
    if before.dtype in (torch.float32, torch.float64):
        same = torch.equal(old, new)
    else:
        same = torch.allclose(old.float(), new.float(), rtol=1e-2, atol=1e-2)
    if not same:
        difference = float((old.float() - new.float()).abs().max())
        raise ArithmeticError(
            f"Folding changed the outputs by up to {difference:.3g} in {before.dtype}; nothing was kept."
        )
