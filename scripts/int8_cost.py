#!/usr/bin/env python
"""
What int8 through onnxruntime costs in accuracy and gains in speed: a model as it is, and without some attention
layers, removed at once and not trained.

    python scripts/int8_cost.py --model facebook/deit-tiny-patch16-224 --dataset PARQUET --layers 3 --output int8.json
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from real_images import measured_on, measurement_parser

from hf_nose import NoseViTForImageClassification
from hf_nose.export_onnx_folder import export_onnx_folder
from hf_nose.files import read_json, write_json
from hf_nose.images import load_processor
from hf_nose.plan import parse_layers
from hf_nose.profiling import hardware


def main(argv: list[str] | None = None) -> int:
    """Exports, measures, writes."""
    parser = measurement_parser(__doc__)
    parser.add_argument("--layers", nargs="*", default=["3"], help="sets of layers to remove")
    parser.add_argument("--max_eval_samples", type=int, help="use a part of the images")
    parser.add_argument("--eval_batch_size", type=int, default=16, help="images a forward")
    options = parser.parse_args(argv)
    record: dict[str, Any] = {
        **measured_on(options),
        "models": {
            f"without attention {layers}" if layers else "as it is": measured(options, layers)
            for layers in ("", *options.layers)
        },
        "hardware": hardware("cpu", torch.float32),
    }
    write_json(options.output, record)
    for name, found in record["models"].items():
        print(name, {kind: found[kind] for kind in ("float32", "int8")})
    return 0


def measured(options: argparse.Namespace, layers: str) -> dict[str, Any]:
    """Accuracy, speed and size of both files of a model without the attention of `layers`."""
    removed = parse_layers(layers) if layers else []
    with tempfile.TemporaryDirectory() as folder:
        model, exported = Path(folder) / "model", Path(folder) / "onnx"
        NoseViTForImageClassification.from_vit(options.model, removed).save_pretrained(model)
        load_processor(options.model).save_pretrained(model)
        names = ("dataset", "max_eval_samples", "eval_batch_size")
        export_onnx_folder(model, exported, int8=True, **{name: getattr(options, name) for name in names})
        return read_json(exported / "onnx.json")["measured"]


if __name__ == "__main__":
    sys.exit(main())
