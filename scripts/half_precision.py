#!/usr/bin/env python
"""
float16 of compensated streams: how large they grow, and what folding saves, on real weights and images.

    python scripts/half_precision.py --model facebook/deit-tiny-patch16-224 --dataset PARQUET --output half.json
"""

import copy
import sys
from collections.abc import Sequence
from typing import Any

import torch
from real_images import measured_on, measurement_parser
from torch import nn
from transformers import ViTForImageClassification

from hf_nose import NoseViTForImageClassification
from hf_nose.evaluation import evaluation_images
from hf_nose.files import write_json
from hf_nose.images import ImageBatches, load_processor
from hf_nose.profiling import hardware
from hf_nose.surgery import fold


LARGEST = torch.finfo(torch.float16).max
# Removed where the scaled stream is tried: eight of twelve.
LAYERS = [0, 1, 3, 4, 6, 7, 8, 9]


def main(argv: list[str] | None = None) -> int:
    """Measures both streams, as they are and scaled."""
    parser = measurement_parser(__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS, help="layers removed from the scaled model")
    parser.add_argument("--factor", type=float, default=32.0, help="of the scaled stream, a power of two")
    parser.add_argument("--max_eval_samples", type=int, default=64, help="images")
    options = parser.parse_args(argv)
    stock = ViTForImageClassification.from_pretrained(options.model).eval()
    images, _ = evaluation_images(
        options.dataset,
        load_processor(options.model),
        stock.config.num_labels,
        max_eval_samples=options.max_eval_samples,
    )
    pixel_values = ImageBatches(images, len(images))[0]["pixel_values"]
    record = {
        **measured_on(options),
        "num_images": len(pixel_values),
        "largest_float16": LARGEST,
        "largest_by_doublings": doublings(stock, pixel_values),
        "scaled": {
            "factor": options.factor,
            "layers": options.layers,
            **folding(scaled(stock, options.factor), options.layers, pixel_values),
        },
        "hardware": hardware("cpu", torch.float16),
    }
    write_json(options.output, record)
    print({name: record[name] for name in ("largest_by_doublings", "scaled")})
    return 0


@torch.no_grad()
def scaled(stock: ViTForImageClassification, factor: float) -> ViTForImageClassification:
    """The same function with a stream `factor` times as large: exact, where that is a power of two."""
    stock = copy.deepcopy(stock)
    stock.config.layer_norm_eps *= factor**2
    embeddings = stock.vit.embeddings
    modules = [embeddings.patch_embeddings.projection]
    for block in stock.vit.layers:
        modules += [block.attention.o_proj, block.mlp.fc2]
    for parameter in (embeddings.cls_token, embeddings.position_embeddings):
        parameter *= factor
    for module in modules:
        module.weight *= factor
        module.bias *= factor
    for module in stock.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps *= factor**2
    return stock


@torch.no_grad()
def largest(model: NoseViTForImageClassification, pixel_values: torch.Tensor) -> float:
    """The largest number that a block hands on."""
    seen: list[float] = []
    hooks = [
        block.register_forward_hook(lambda *args: seen.append(float(args[2].abs().max())))
        for block in model.vit.blocks
    ]
    with model.all_tokens():
        model(pixel_values)
    for hook in hooks:
        hook.remove()
    return max(seen)


def doublings(stock: ViTForImageClassification, pixel_values: torch.Tensor) -> list[float]:
    """The largest number of the float32 stream where the first 0, 1, ... and all blocks double it."""
    model = NoseViTForImageClassification.from_vit(stock)
    found = []
    for count in range(len(model.vit.layers) + 1):
        with model.masked_attention(range(count), "double"):
            found.append(largest(model, pixel_values))
    return found


@torch.no_grad()
def folding(stock: ViTForImageClassification, layers: Sequence[int], pixel_values: torch.Tensor) -> dict[str, Any]:
    """Rows of logits in float16 against float32, of a compensated model as it is and folded."""
    unfolded = NoseViTForImageClassification.from_vit(stock, layers, feature_compensation=True, force=True)
    expected = unfolded(pixel_values).logits
    found = {}
    for name, model in {"unfolded": unfolded, "folded": fold(unfolded)}.items():
        made = copy.deepcopy(model).half()(pixel_values.half()).logits.float()
        rows = made.isfinite().all(1)
        error = (made[rows] - expected[rows]).norm() / expected[rows].norm()
        found[name] = {
            "largest": largest(model, pixel_values),
            "finite_rows": int(rows.sum()),
            "relative_error": float(error) if rows.any() else None,
            "same_argmax": int((made.argmax(1) == expected.argmax(1))[rows].sum()),
        }
    return found


if __name__ == "__main__":
    sys.exit(main())
