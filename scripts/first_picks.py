#!/usr/bin/env python
"""
Which attention layer the search takes first, and how sure that is: counts over many calibration samples.

The logits of every image with each layer masked are computed once; every sample is then scored from them.

    python scripts/first_picks.py --model facebook/deit-tiny-patch16-224 --dataset PARQUET --output first_picks.json
"""

import sys
from collections import Counter
from typing import Any

import torch
from real_images import measured_on, measurement_parser
from tqdm.auto import tqdm

from hf_nose import NoseViTForImageClassification
from hf_nose.criteria import CRITERIA, Evidence
from hf_nose.evaluation import evaluation_images
from hf_nose.files import write_json
from hf_nose.images import ImageBatches, load_processor
from hf_nose.modeling_nose_vit import MASK_GAINS, nose_vit
from hf_nose.prefixes import block_inputs
from hf_nose.profiling import hardware


VARIANTS = (("skip", "absolute"), ("skip", "signed"), ("double", "absolute"), ("double", "signed"))


def main(argv: list[str] | None = None) -> int:
    """Computes logits, draws samples, counts first picks."""
    parser = measurement_parser(__doc__)
    parser.add_argument("--sizes", default="64,128,256,512", help="images in a sample")
    parser.add_argument("--seeds", type=int, default=50, help="samples of each size")
    parser.add_argument("--batch_size", type=int, default=32, help="images a forward")
    parser.add_argument("--max_eval_samples", type=int, help="use a part of the images")
    options = parser.parse_args(argv)
    model = NoseViTForImageClassification.from_vit(options.model).eval()
    images, _ = evaluation_images(
        options.dataset, load_processor(options.model), model.num_labels, max_eval_samples=options.max_eval_samples
    )
    dense, masked = masked_logits(model, ImageBatches(images, options.batch_size))
    sizes = [int(size) for size in options.sizes.split(",")]
    picks = {
        f"{mask}, {sign}": {
            str(size): count_picks(dense, masked[mask], sign, size, options.seeds)
            for size in sizes
            if size <= len(dense)
        }
        for mask, sign in VARIANTS
    }
    record = {
        **measured_on(options),
        "num_images": len(dense),
        "criterion": "transfer_entropy",
        "target": "logits",
        "seeds": options.seeds,
        "picks": picks,
        "hardware": hardware(),
    }
    write_json(options.output, record)
    for variant, found in picks.items():
        print(variant, {size: result["counts"] for size, result in found.items()})
    return 0


@torch.no_grad()
def masked_logits(model: torch.nn.Module, batches: ImageBatches) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits (images, classes) of the model as it is and, per mask, (layers, images, classes) with a layer masked."""
    vit = nose_vit(model)
    dense: list[torch.Tensor] = []
    masked: dict[str, list[torch.Tensor]] = {mask: [] for mask in MASK_GAINS}
    for batch in tqdm(batches, desc="Masked logits", unit="batch"):
        with block_inputs(vit.blocks) as inputs:
            dense.append(model(batch["pixel_values"]).logits)
        for mask, parts in masked.items():
            rows = []
            for layer, state in enumerate(inputs):
                with vit.masked_attention([layer], mask), vit.starting_at(layer, state):
                    rows.append(model(batch["pixel_values"]).logits)
            parts.append(torch.stack(rows))
    return torch.cat(dense), {mask: torch.cat(parts, dim=1) for mask, parts in masked.items()}


def count_picks(dense: torch.Tensor, masked: torch.Tensor, sign: str, size: int, seeds: int) -> dict[str, Any]:
    """How often each layer comes first over samples of `size` images, and the pick of every seed."""
    criterion = CRITERIA["transfer_entropy"]
    picks = []
    for seed in range(seeds):
        sample = torch.randperm(len(dense), generator=torch.Generator().manual_seed(seed))[:size]
        reference = evidence(dense[sample])
        values = [criterion.score(reference, evidence(logits[sample])) for logits in masked]
        picks.append(min(range(len(values)), key=lambda layer: (criterion.cost(values[layer], sign), layer)))
    return {"counts": {str(layer): count for layer, count in sorted(Counter(picks).items())}, "seeds": picks}


def evidence(logits: torch.Tensor) -> Evidence:
    """Moments of logits of shape (images, classes)."""
    found = Evidence(num_images=len(logits))
    found.moments.update(logits)
    return found


if __name__ == "__main__":
    sys.exit(main())
