"""Shapes with a name, the sets that the paper removed from them, and what a shape costs by arithmetic alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig, ViTConfig

from .configuration_nose_vit import NoseViTConfig


LAYER_NORM_MACS_PER_ELEMENT = 5
# Hidden size and heads; 12 blocks, patches of 16 of 224 pixels, an MLP of four times the hidden size, 1,000 classes.
SHAPES = {"deit-tiny": (192, 3), "deit-small": (384, 6), "deit-base": (768, 12)}
# What makes two models of one shape, whatever is removed from them.
SHAPE_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "image_size",
    "patch_size",
    "num_channels",
    "num_labels",
)
# By shape and number of removed layers. The set behind the figure of DeiT-S 40 % is not published.
PUBLISHED_SETS = {
    ("deit-base", 5): [0, 1, 3, 4, 6],
    ("deit-base", 6): [0, 1, 3, 4, 6, 9],
    ("deit-small", 3): [0, 2, 4],
    ("deit-small", 4): [0, 2, 4, 6],
    ("deit-tiny", 3): [0, 2, 4],
    ("deit-tiny", 4): [0, 2, 4, 6],
}


def shape_config(name: str) -> ViTConfig:
    """The configuration of a dense classifier of a named shape; `ValueError` for an unknown name."""
    if name not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {name!r}.")
    hidden, heads = SHAPES[name]
    values: dict[str, Any] = {"hidden_size": hidden, "num_attention_heads": heads, "num_labels": 1000}
    return ViTConfig(intermediate_size=4 * hidden, **values)


def shape_name(config: PretrainedConfig) -> str | None:
    """The name of a configuration's shape, whatever is removed from it; `None` where it has none."""
    for name in SHAPES:
        if all(getattr(config, field) == getattr(shape_config(name), field) for field in SHAPE_FIELDS):
            return name
    return None


def removed_layers(text: str, config: PretrainedConfig) -> list[int]:
    """
    The layers that `"0,1,3,4,6"` or `"40%"` takes from a model of `config`. A ratio is nominal: round(ratio x blocks)
    layers, those that the paper removed from this shape where it says which, otherwise the first ones; to speed and
    memory it is the same, as long as the last attention layer stays.

    Raises:
        ValueError: for something else, for layers out of range, and where no attention would be left.
    """
    blocks = config.num_hidden_layers
    try:
        if text.endswith("%"):
            count = round(float(text[:-1]) / 100 * blocks)
            layers = PUBLISHED_SETS.get((shape_name(config) or "", count), list(range(count)))
        else:
            layers = sorted({int(part) for part in text.split(",")})
    except (ValueError, OverflowError) as error:
        raise ValueError(f"removed must be layers such as 0,1,3,4,6, or a share such as 40%, got {text!r}.") from error
    if not layers or not all(0 <= layer < blocks for layer in layers) or len(layers) >= blocks:
        raise ValueError(
            f"removed must take at least one and at most {blocks - 1} of the layers 0 to {blocks - 1}, got {text!r}."
        )
    return layers


def sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of an image or a patch, as a configuration gives its size."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def num_tokens(config: PretrainedConfig) -> int:
    """Patches and the class token."""
    image, patch = sides(config.image_size), sides(config.patch_size)
    return (image[0] // patch[0]) * (image[1] // patch[1]) + 1


def merged_tokens(config: NoseViTConfig, r: int, start: int = 0) -> list[tuple[int, int]]:
    """
    Tokens in front of and behind the merging (ToMe) of every block: r pairs become one each between attention and MLP
    of the surviving attention blocks, but not in the first `start` of those; never more than half of the patches, the
    class token is not merged.

    Args:
        config (`NoseViTConfig`): its removed layers merge nothing.
        r (`int`): tokens that a block loses.
        start (`int`, *optional*, defaults to 0): surviving attention blocks that are left alone.

    Source: arXiv 2404.05657, Tables 1 and 8; ToMe, arXiv 2210.09461.
    """
    tokens, survivors, counts = num_tokens(config), 0, []
    for layer in range(config.num_hidden_layers):
        before = tokens
        if layer not in config.removed_attention_layers:
            if survivors >= start:
                tokens -= min(r, (tokens - 1) // 2)
            survivors += 1
        counts.append((before, tokens))
    return counts


def formula_macs(
    config: PretrainedConfig, tokens: Sequence[tuple[int, int]] | None = None, class_token_tail: bool = False
) -> int:
    """
    Multiply-accumulates of one image by formula: per block 4 N d^2 + 2 N^2 d for the attention, at the tokens before
    merging, and 8 N d^2 for the MLP, at those after it, with patch embedding, head, and a LayerNorm at 5 per element.

    Args:
        config (`PretrainedConfig`): of a ViT or NoseViT classifier.
        tokens (`Sequence[tuple[int, int]]`, *optional*): what [`merged_tokens`] gives; all tokens by default.
        class_token_tail (`bool`, *optional*, defaults to `False`):
            Whether the last attention layer has one query, and only the class token goes on from there. The paper's
            figures are without.

    Source: arXiv 2404.05657, Tables 1 and 8; METHOD, sections 6 and 8.
    """
    width, removed = config.hidden_size, removed_of(config)
    total = num_tokens(config)
    tokens = [(total, total)] * config.num_hidden_layers if tokens is None else tokens
    last = max(layer for layer in range(config.num_hidden_layers) if layer not in removed)
    patch = sides(config.patch_size)
    norm = LAYER_NORM_MACS_PER_ELEMENT * width
    macs = (total - 1) * config.num_channels * patch[0] * patch[1] * width + width * config.num_labels
    for layer, (before, after) in enumerate(tokens):
        is_tail = class_token_tail and layer >= last
        if layer not in removed:
            queries = 1 if is_tail else before
            # Queries and output, keys and values, both products, LayerNorm.
            macs += 2 * queries * width**2 + 2 * before * width**2 + 2 * queries * before * width + before * norm
        macs += (1 if is_tail else after) * (2 * width * config.intermediate_size + norm)
    return macs + (1 if class_token_tail else tokens[-1][1]) * norm


def removed_of(config: PretrainedConfig) -> list[int]:
    """The removed layers of a configuration; a stock ViT's has none."""
    return list(config.removed_attention_layers) if isinstance(config, NoseViTConfig) else []
