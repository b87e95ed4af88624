"""Tiny models, images, and a Vision Transformer's forward written out by hand, to hold the library's against."""

from functools import cache

import torch
from transformers import ViTConfig, ViTForImageClassification

from hf_nose.modeling_nose_vit import NoseViTForImageClassification


NUM_BLOCKS = 6
NUM_LABELS = 5
# Large enough that a wrong eps shows in float32, as DeiT's 1e-12 would not.
EPS = 1e-4


def vit_config(**fields) -> ViTConfig:
    sizes = {
        "hidden_size": 24,
        "num_hidden_layers": NUM_BLOCKS,
        "num_attention_heads": 3,
        "intermediate_size": 48,
        "image_size": 16,
        "patch_size": 4,
        "num_labels": NUM_LABELS,
        "initializer_range": 0.1,
        "layer_norm_eps": EPS,
    }
    if "id2label" in fields:
        del sizes["num_labels"]
    return ViTConfig(**{**sizes, **fields})


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Moves every parameter away from its start: biases of 0 and norms of 1 would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@cache
def stock_vit(
    seed: int = 0, dtype: torch.dtype = torch.float32, blocks: int = NUM_BLOCKS
) -> ViTForImageClassification:
    """A dense ViT of transformers, shared between tests: not to be changed."""
    torch.manual_seed(seed)
    return randomise(ViTForImageClassification(vit_config(num_hidden_layers=blocks)), seed).to(dtype).eval()


def nose(removed=(), seed: int = 0, dtype: torch.dtype = torch.float32, **options) -> NoseViTForImageClassification:
    """
    A fresh NoseViT with the weights of `stock_vit`. It computes all tokens by default: so does the reference, and a
    product of one row does not have the bits of one of many.
    """
    fields = {"class_token_tail": False, **options}
    return NoseViTForImageClassification.from_vit(stock_vit(seed, dtype), removed, **fields)


def images(count: int = 3, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 16, 16, generator=generator).to(dtype)


def batches(sizes=(4, 4, 3), dtype: torch.dtype = torch.float32) -> list[dict[str, torch.Tensor]]:
    """Calibration batches, the last one smaller."""
    generator = torch.Generator().manual_seed(7)
    return [
        {
            "pixel_values": images(size, 10 + index, dtype),
            "labels": torch.randint(NUM_LABELS, (size,), generator=generator),
        }
        for index, size in enumerate(sizes)
    ]


@torch.no_grad()
def reference(stock: ViTForImageClassification, pixel_values: torch.Tensor, rules=None) -> dict:
    """
    The forward of a dense ViT, block by block: `f = a Attn(LN1(x)) + b x`, `out = MLP(LN2(f)) + f`, where `rules`
    gives (a, b) for a block and (1, 1) is the rule of the others; with a = 0 attention is not computed.
    """
    rules = rules or {}
    vit = stock.vit
    x = vit.embeddings(pixel_values)
    blocks = []
    for layer, block in enumerate(vit.layers):
        a, b = rules.get(layer, (1, 1))
        branch = None if isinstance(a, int) and a == 0 else block.attention(block.layernorm_before(x))[0]
        f = x if isinstance(b, int) and b == 1 else b * x
        if branch is not None:
            f = (branch if isinstance(a, int) and a == 1 else a * branch) + f
        update = block.mlp(block.layernorm_after(f))
        blocks.append(
            {"input": x, "attention": f, "attention_branch": branch, "mlp_branch": update, "mlp": update + f}
        )
        x = blocks[-1]["mlp"]
    tokens = vit.layernorm(x)
    return {"blocks": blocks, "tokens": tokens, "logits": stock.classifier(tokens[:, 0])}


def logits(model, pixel_values: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(pixel_values).logits


class Calls:
    """Counts the forwards of modules, by hooks of its own."""

    def __init__(self, modules):
        self.count = 0
        self.handles = [module.register_forward_hook(self.hook) for module in modules]

    def hook(self, *_):
        self.count += 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def attention_calls(model, layers=None) -> Calls:
    blocks = model.vit.layers
    chosen = range(len(blocks)) if layers is None else layers
    return Calls([blocks[layer].attention for layer in chosen if hasattr(blocks[layer], "attention")])
