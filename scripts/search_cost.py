#!/usr/bin/env python
"""
What the NOSE search costs against the naive one through the stock forward: all of them in turn, in one process.

    python scripts/search_cost.py --model facebook/deit-tiny-patch16-224 --dataset PARQUET --output search_cost.json
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from real_images import measured_on, measurement_parser
from torch import nn
from torch.utils.data import default_collate
from transformers import ViTForImageClassification

from hf_nose import NoseViTForImageClassification, select_attention_layers
from hf_nose.criteria import CRITERIA, Evidence
from hf_nose.devices import stopwatch
from hf_nose.evaluation import evaluation_images
from hf_nose.files import write_json
from hf_nose.images import load_processor
from hf_nose.profiling import hardware


# Options of `select_attention_layers`; `{}` is the prefix cache alone. The cache's size comes from the command line.
ARMS: dict[str, dict[str, Any]] = {
    "prefix": {},
    "tail": {"class_token_tail": True},
    "kept": {"keeps": True, "class_token_tail": True},
    "stacked": {"keeps": True, "class_token_tail": True, "stack_candidates": True},
    "bf16": {"keeps": True, "class_token_tail": True, "stack_candidates": True, "bf16": True},
    "racing": {"keeps": True, "class_token_tail": True, "search": "racing"},
    "racing_bf16": {
        "keeps": True,
        "class_token_tail": True,
        "search": "racing",
        "stack_candidates": True,
        "bf16": True,
    },
}
# What is asked: of the naive search's time, with and without a race, and of TE in nats.
SEARCH_BOUND, RACE_BOUND, TE_BOUND = 0.60, 0.25, 1e-3


def main(argv: list[str] | None = None) -> int:
    """Times the searches, compares their scores."""
    parser = measurement_parser(__doc__)
    parser.add_argument("--num_removed", type=int, default=5, help="layers to pick")
    parser.add_argument("--num_calibration", type=int, default=256, help="images to search on")
    parser.add_argument("--batch_size", type=int, default=16, help="images a forward")
    parser.add_argument("--arms", default="prefix,tail,kept,racing", help=f"comma-separated, among {', '.join(ARMS)}")
    parser.add_argument("--confidence", type=float, default=0.99, help="of the races")
    parser.add_argument(
        "--state_cache_gib", type=float, default=4.0, help="block inputs kept between rounds, in arms that do"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the images' order: a race takes a part for the whole")
    parser.add_argument("--rounds", type=int, default=3, help="times that every search is made, in turn")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args(argv)
    arms = options.arms.split(",")
    if not set(arms) <= set(ARMS):
        parser.error(f"--arms must be among {', '.join(ARMS)}, got {options.arms!r}.")
    stock = ViTForImageClassification.from_pretrained(options.model).eval().to(options.device)
    model = NoseViTForImageClassification.from_vit(stock).eval().to(options.device)
    images, _ = evaluation_images(
        options.dataset, load_processor(options.model), model.num_labels, max_eval_samples=options.num_calibration
    )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(options.seed))
    batches = [default_collate([images[int(index)] for index in part]) for part in order.split(options.batch_size)]

    def search(keeps: bool = False, **asked: Any) -> dict[str, Any]:
        gib = options.state_cache_gib if keeps else 0.0
        asked |= {"state_cache_gib": gib, "confidence": options.confidence}
        found = select_attention_layers(model, batches, options.num_removed, **asked)
        return {
            name: getattr(found, name) for name in ("layers", "trace", "block_forwards", "confidence", "precision")
        }

    searches: dict[str, Callable[[], dict[str, Any]]] = {
        "naive": lambda: naive_search(stock, batches, options.num_removed)
    }
    searches |= {name: lambda name=name: search(**ARMS[name]) for name in arms}
    with torch.no_grad():
        stock(batches[0]["pixel_values"].to(options.device))
    found, seconds = in_turn(searches, options.rounds, options.device)
    record = {
        **measured_on(options),
        "num_images": len(images),
        "batch_size": options.batch_size,
        "seed": options.seed,
        "state_cache_gib": options.state_cache_gib,
        "clock": "CPU seconds" if options.device == "cpu" else "seconds",
        "searches": {
            name: {
                **compare(found["naive"], each),
                "block_forwards_per_batch": each["block_forwards"] / len(batches),
                "options": ARMS.get(name, {}),
                "seconds": seconds[name],
                "ratio_to_naive": statistics.median(
                    ours / naive for ours, naive in zip(seconds[name], seconds["naive"], strict=True)
                ),
                **{part: each[part] for part in ("confidence", "precision") if each.get(part) is not None},
            }
            for name, each in found.items()
        },
        "threads": torch.get_num_threads(),
        "hardware": hardware(torch.device(options.device)),
    }
    write_json(options.output, record)
    for name, each in record["searches"].items():
        print(name, {part: each[part] for part in each if part != "images"})
    checks = bounds(record["searches"])
    for text, is_kept in checks:
        print(f"{'kept' if is_kept else 'MISSED'}: {text}")
    return 0 if all(is_kept for _, is_kept in checks) else 1


def bounds(searches: dict[str, dict[str, Any]]) -> list[tuple[str, bool]]:
    """
    Whether the searches in float32 are as cheap and as exact as is asked of them: the cheapest that is no race, and
    the race; of all of them the same layers, and the same TE where all images were seen.
    """
    exact = {name: each for name, each in searches.items() if name != "naive" and "bf16" not in name}
    found = []
    for kind, bound in (("search", SEARCH_BOUND), ("race", RACE_BOUND)):
        ratios = {
            name: each["ratio_to_naive"] for name, each in exact.items() if ("racing" in name) == (kind == "race")
        }
        if ratios:
            name = min(ratios, key=lambda name: ratios[name])
            text = f"cheapest {kind}, {name}: {ratios[name]:.3f} of the naive search's time, at most {bound:.2f} asked"
            found.append((text, ratios[name] <= bound))
    if exact:
        largest = max(each["largest_te_difference"] for each in exact.values())
        text = f"TE within {largest:.1g} nats of the naive search's, {TE_BOUND:g} asked"
        found.append((text, largest <= TE_BOUND))
        others = [name for name, each in exact.items() if each["layers"] != searches["naive"]["layers"]]
        found.append((f"other layers than the naive search's: {', '.join(others) or 'none'}", not others))
    return found


def in_turn(
    searches: dict[str, Callable[[], dict[str, Any]]], rounds: int, device: str
) -> tuple[dict[str, dict[str, Any]], dict[str, list[float]]]:
    """
    What each search found, and its seconds in each of `rounds` rounds: A B C A B C, so that a drift hits all. On a CPU
    they are CPU seconds of this process.
    """
    found: dict[str, dict[str, Any]] = {}
    watch = stopwatch(torch.device(device), time.process_time)
    seconds: dict[str, list[float]] = {name: [] for name in searches}
    for _ in range(rounds):
        for name, search in searches.items():
            seconds[name].append(watch(lambda name=name, search=search: found.update({name: search()})))
    return found, seconds


def compare(naive: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """
    The layers of a search; and over the rounds up to the first in which it picks another layer than the naive one, the
    largest difference in TE of candidates scored on all images, the distance of the naive search's runner-up, in nats,
    and on how many images each candidate was scored.
    """
    largest, runners_up, images = 0.0, [], []
    for ours, theirs in zip(other["trace"], naive["trace"], strict=True):
        counts = ours.get("images", dict.fromkeys(ours["scores"], naive["num_images"]))
        whole = [layer for layer, count in counts.items() if count == naive["num_images"]]
        largest = max([largest, *(abs(ours["scores"][layer] - theirs["scores"][layer]) for layer in whole)])
        best, second = sorted(abs(value) for value in theirs["scores"].values())[:2]
        runners_up.append(second - best)
        images.append(counts)
        if ours["picked"] != theirs["picked"]:
            break
    return {
        "layers": other["layers"],
        "largest_te_difference": largest,
        "runner_up_distances": runners_up,
        "images": images,
    }


class AttentionFree(nn.Module):
    """What is left of a stock block under the mask: `MLP(LN2(x)) + x`."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`hidden_states` (batch, tokens, hidden) -> the same shape."""
        return self.block.mlp(self.block.layernorm_after(hidden_states)) + hidden_states


@contextmanager
def masked(stock: ViTForImageClassification, layers: list[int]) -> Iterator[None]:
    """The stock model without the attention of `layers`, not computed either."""
    blocks = stock.vit.layers
    before = {layer: blocks[layer] for layer in layers}
    try:
        for layer, block in before.items():
            blocks[layer] = AttentionFree(block)
        yield
    finally:
        for layer, block in before.items():
            blocks[layer] = block


@torch.no_grad()
def naive_search(stock: ViTForImageClassification, batches: list, num_layers: int) -> dict[str, Any]:
    """Algorithm 1 with one whole forward of the stock model per candidate set and batch."""
    criterion, blocks = CRITERIA["transfer_entropy"], len(stock.vit.layers)
    forwards = 0

    def evidence(layers: list[int]) -> Evidence:
        nonlocal forwards
        found = Evidence()
        with masked(stock, layers):
            for batch in batches:
                found.see_target(stock(batch["pixel_values"].to(stock.device)).logits)
                found.num_images += len(batch["pixel_values"])
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
        trace.append({"picked": picked[-1], "scores": scores})
    return {"layers": picked, "trace": trace, "block_forwards": forwards, "num_images": dense.num_images}


if __name__ == "__main__":
    sys.exit(main())
