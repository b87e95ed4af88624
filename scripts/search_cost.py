#!/usr/bin/env python
"""
What the prefix cache saves: the NOSE search against the naive one, side by side in one process, in CPU seconds.

    python scripts/search_cost.py --model facebook/deit-tiny-patch16-224 --dataset PARQUET --output search_cost.json
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from hf_nose import NoseViTForImageClassification, select_attention_layers
from hf_nose.criteria import CRITERIA, Evidence
from hf_nose.data import load_image_data
from hf_nose.files import write_json
from hf_nose.images import ImageBatches, ImageDataset, load_processor
from hf_nose.profiling import hardware
from hf_nose.records import public_id


def main(argv: list[str] | None = None) -> int:
    """Times both searches, compares their scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hub id or folder of a ViT")
    parser.add_argument("--dataset", required=True, help="images, see hf-nose run")
    parser.add_argument("--base_model_id", help="public name of the model")
    parser.add_argument("--dataset_id", help="public name of the data set")
    parser.add_argument("--num_removed", type=int, default=5, help="layers to pick")
    parser.add_argument("--num_calibration", type=int, default=64, help="images to search on")
    parser.add_argument("--batch_size", type=int, default=32, help="images a forward")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args(argv)
    model = NoseViTForImageClassification.from_vit(options.model).eval()
    data = load_image_data(options.dataset, evaluation_only=True, max_eval_samples=options.num_calibration)
    columns = data.image_column, data.label_column
    images = ImageDataset(data.evaluation, load_processor(options.model), *columns, num_labels=model.num_labels)
    batches = list(ImageBatches(images, options.batch_size))
    with torch.no_grad():
        model(batches[0]["pixel_values"])
    started = time.process_time()
    selection = select_attention_layers(model, batches, options.num_removed)
    cached = time.process_time() - started
    started = time.process_time()
    trace, forwards = naive_search(model, batches, options.num_removed)
    naive = time.process_time() - started
    pairs = [
        (step["scores"][layer], value)
        for step, other in zip(selection.trace, trace, strict=True)
        for layer, value in other.items()
    ]
    record = {
        "model": public_id(options.model, options.base_model_id),
        "dataset": public_id(options.dataset, options.dataset_id),
        "num_images": len(images),
        "layers": selection.layers,
        "block_forwards_per_batch": {
            "cached": selection.block_forwards // len(batches),
            "naive": forwards // len(batches),
        },
        "cpu_seconds": {"cached": cached, "naive": naive},
        "cpu_seconds_ratio": cached / naive,
        "largest_relative_difference": max(abs(a - b) / abs(b) for a, b in pairs),
        "threads": torch.get_num_threads(),
        "hardware": hardware(),
    }
    write_json(options.output, record)
    print({name: record[name] for name in ("layers", "block_forwards_per_batch", "cpu_seconds", "cpu_seconds_ratio")})
    print({"largest_relative_difference": record["largest_relative_difference"]})
    return 0


@torch.no_grad()
def naive_search(model: torch.nn.Module, batches: list, num_layers: int) -> tuple[list[dict[int, float]], int]:
    """Algorithm 1 with one whole forward per candidate set and batch; the trace and the block forwards it took."""
    criterion, blocks = CRITERIA["transfer_entropy"], len(model.vit.blocks)
    forwards = 0

    def evidence(layers: list[int]) -> Evidence:
        nonlocal forwards
        found = Evidence()
        with model.masked_attention(layers):
            for batch in batches:
                found.moments.update(model(batch["pixel_values"]).logits)
                forwards += blocks
        return found

    dense = evidence([])
    picked: list[int] = []
    trace = []
    for _ in range(num_layers):
        scores = {
            layer: criterion.score(dense, evidence([*picked, layer])) for layer in range(blocks) if layer not in picked
        }
        picked.append(min(scores, key=lambda layer: (criterion.cost(scores[layer], "absolute"), layer)))
        trace.append(scores)
    return trace, forwards


if __name__ == "__main__":
    sys.exit(main())
