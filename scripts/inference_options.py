#!/usr/bin/env python
"""
What the options of inference cost or save, side by side in one process: class-token tail, fused q, k and v, slices.

    python scripts/inference_options.py --size B --removed 0,1,3,4,6 --batch_size 16 --output options.json
"""

import argparse
import sys
from pathlib import Path

import torch

from hf_nose import NoseViTConfig, NoseViTForImageClassification
from hf_nose.files import write_json
from hf_nose.plan import parse_layers
from hf_nose.profiling import compare_throughput, count_macs, hardware


HIDDEN_AND_HEADS = {"T": (192, 3), "S": (384, 6), "B": (768, 12)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(argv: list[str] | None = None) -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=HIDDEN_AND_HEADS, default="B", help="DeiT-T, -S or -B, random weights")
    parser.add_argument("--removed", default="", help="layers without attention, comma-separated; none by default")
    parser.add_argument("--batch_size", type=int, default=16, help="images")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and images")
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda")
    parser.add_argument("--pairs", type=int, default=15, help="rounds in which every variant runs once")
    parser.add_argument("--chunk_size_attention", type=int, default=4, help="images a slice of an attention")
    parser.add_argument("--chunk_size_feed_forward", type=int, default=4 * 197, help="tokens a slice of an MLP")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args(argv)
    removed = parse_layers(options.removed, "removed") if options.removed else []
    slices = {name: vars(options)[name] for name in ("chunk_size_attention", "chunk_size_feed_forward")}
    models = {
        name: model(options.size, removed, **fields).to(options.device, DTYPES[options.dtype])
        for name, fields in {
            "as it is": {},
            "all tokens": {"class_token_tail": False},
            "fused projections": {},
            "slices": slices,
        }.items()
    }
    models["fused projections"].fuse_qkv_projections()
    pixel_values = torch.randn(options.batch_size, 3, 224, 224).to(options.device, DTYPES[options.dtype])
    results = compare_throughput(models, pixel_values, rounds=options.pairs)
    record = {
        "model": f"DeiT-{options.size}, random weights",
        "removed_attention_layers": removed,
        "batch_size": options.batch_size,
        "pairs": options.pairs,
        **slices,
        "macs": {name: count_macs(found)["total"] for name, found in models.items()},
        "throughput": results,
        "hardware": hardware(options.device, DTYPES[options.dtype]),
    }
    write_json(options.output, record)
    for name, result in results.items():
        rate, ratio = result["images_per_s"], result["ratio_to_first"]
        print(f"{name:18} {rate:10.1f} images/s, {ratio:.3f} of the model as it is")
    return 0


def model(size: str, removed: list[int], **fields) -> NoseViTForImageClassification:
    """A model of DeiT's shape; the same random weights every time."""
    hidden, heads = HIDDEN_AND_HEADS[size]
    config = NoseViTConfig(
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        num_labels=1000,
        removed_attention_layers=removed,
        **fields,
    )
    torch.manual_seed(0)
    return NoseViTForImageClassification(config).eval()


if __name__ == "__main__":
    sys.exit(main())
