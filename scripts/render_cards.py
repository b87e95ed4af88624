#!/usr/bin/env python
"""
Writes the model cards in model_cards/: from the paper's tables and the recipes, and from the committed results.

    python scripts/render_cards.py
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from cifar10_summary import best_arm

from hf_nose.card_records import card_record, recipe_record
from hf_nose.cards import render_card
from hf_nose.files import read_json, write_text
from hf_nose.published import NUM_BLOCKS


CARDS = Path(__file__).resolve().parent.parent / "model_cards"
RECIPES = (
    "deit-b-nose40",
    "deit-b-nose50",
    "deit-s-nose25",
    "deit-s-nose30",
    "deit-s-nose40",
    "deit-t-nose25",
    "deit-t-nose30",
)
# What the arms of both experiments are called in a card; those of an experiment stand in this order.
ARMS = {
    "dense": "dense, before the removal",
    "dense-trained-on": "dense, trained on for as long",
    "nose-5-dilution": "NOSE, 5 of 12: dilution with compensation (the paper's way)",
    "nose-5-no-compensation": "NOSE, 5 of 12: dilution without compensation",
    "nose-5-one-shot": "NOSE, 5 of 12: removed in one shot",
    "first-5-dilution": "First-5: dilution with compensation",
    "nose-9-dilution": "NOSE, 9 of 12: dilution with compensation",
    "nose-9-one-shot": "NOSE, 9 of 12: removed in one shot",
    "nose-dilution-compensated": "NOSE: dilution with compensation (the paper's way)",
    "nose-dilution": "NOSE: dilution without compensation",
    "nose-one-shot": "NOSE: removed in one shot",
    "nose-one-shot-distilled": "NOSE: removed in one shot, distilled",
    "nose-dilution-distilled": "NOSE: dilution without compensation, distilled",
    "nose-dilution-short": "NOSE: dilution without compensation, over a fifth of the steps",
    "nose-dilution-cosine": "NOSE: dilution without compensation, M as a cosine",
    "nose-dilution-ascending": "NOSE: dilution without compensation, one layer after another, the first one first",
    "nose-dilution-descending": "NOSE: dilution without compensation, one layer after another, the last one first",
    "nose-one-shot-high-rate": "NOSE: removed in one shot, higher learning rate",
    "kl-one-shot": "prediction KL instead of transfer entropy: removed in one shot",
    "first-one-shot": "First-5: removed in one shot",
    "random-0-one-shot": "random set 0: removed in one shot",
    "random-1-one-shot": "random set 1: removed in one shot",
    "random-2-one-shot": "random set 2: removed in one shot",
}
PAPERS_WAY, CONTROL, DENSE = "nose-dilution-compensated", "dense-trained-on", "dense"


def main(argv: list[str] | None = None) -> int:
    """Renders every card whose results are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", type=Path, default=CARDS, help="where the cards go; their results are beside them")
    options = parser.parse_args(argv)
    for name, record in records(options.cards / "results").items():
        write_text(options.cards / f"{name}.md", render_card(record))
    return 0


def records(results: Path) -> dict[str, dict[str, Any]]:
    """The record of every card, by its name; an experiment without a summary has none."""
    found = {name: recipe_record(name) for name in RECIPES}
    made = {"digits": digits_record, "cifar10-deit-tiny": cifar_record}
    return found | {
        name: make(results / name) for name, make in made.items() if (results / name / "summary.json").is_file()
    }


def digits_record(folder: Path) -> dict[str, Any]:
    """The embedded default: one timed run, and three seeds with every control."""
    run = {name: read_json(folder / "run" / f"{name}.json") for name in ("selection", "metrics")}
    summary, first = read_json(folder / "summary.json"), read_json(folder / "nose-5-dilution-seed0.json")
    arms, steps = summary["arms"], summary["steps"]
    names = [name for name in ARMS if name in arms]
    body = [
        [
            ARMS[name],
            f"{arms[name]['top1_median']:.1f}",
            ", ".join(f"{value:.1f}" for value in arms[name]["top1"]),
            f"{arms[name]['masked_untrained_top1_median']:.1f}" if "gain" in arms[name] else "",
        ]
        for name in names
    ]
    return card_record(
        folder.name,
        {
            "num_hidden_layers": NUM_BLOCKS,
            "num_removed": len(run["selection"]["layers"]),
            "removed": sorted(run["selection"]["layers"]),
            "diluted": [],
            "mask": [],
            "image_size": 8,
            "chosen_by": "",
        },
        base_model="digits-vit (hf_nose's small ViT, trained from random weights)",
        license="apache-2.0",
        dataset="scikit-learn's handwritten digits",
        records=run,
        settings={**first["settings"], **first["training"], "dense_steps": first["dense_steps"]},
        experiment={
            "title": "Three seeds, every control",
            "text": f"{steps['dense']} dense steps, then {steps['after']} more for every arm; {summary['num_images']} "
            "images evaluate.",
            "table": [["", "top-1 %, median", "each seed", "masked, before training"], *body],
            "note": "Handwritten digits are easy: they show that the machinery works, not what the method is worth.",
        },
        figures={
            name: f"results/{folder.name}/run/figures/{name}.png" for name in ("trajectory", "training", "comparison")
        },
    )


def cifar_record(folder: Path) -> dict[str, Any]:
    """DeiT-T on CIFAR-10: every arm beside the dense model that was trained as long."""
    summary = read_json(folder / "summary.json")
    arms, first = summary["arms"], read_json(folder / f"{DENSE}-seed{summary['seeds'][0]}.json")
    absent = [name for name in (DENSE, CONTROL, PAPERS_WAY) if name not in arms]
    if absent:
        raise ValueError(f"{folder.name} is not finished: {absent} have not been run for every seed.")
    names = [name for name in ARMS if name in arms]
    compressed = [name for name in names if name not in (DENSE, CONTROL)]
    best = best_arm(summary)
    chosen = read_json(folder / f"{best}-seed{summary['seeds'][0]}.json")
    body = [
        [
            ARMS[name],
            f"{arms[name]['top1_mean']:.1f}",
            ", ".join(f"{value:.1f}" for value in arms[name]["top1"]),
            ", ".join(f"{value:.1f}" for value in arms[name]["masked_untrained_top1"]) if name in compressed else "",
            gap_words(arms[name]["gap"]["dense_trained_on"]) if name != CONTROL else "",
            "; ".join(", ".join(map(str, found)) for found in arms[name]["layers"] if found is not None),
        ]
        for name in names
    ]
    cost = {
        name: {key: arms[arm][key] for key in ("parameters", "macs")}
        for name, arm in (("dense", DENSE), ("compressed", best))
    }
    return card_record(
        folder.name,
        {
            "num_hidden_layers": NUM_BLOCKS,
            "num_removed": len(chosen["layers"]),
            "removed": [],
            "diluted": [],
            "mask": [],
            "image_size": summary["image_size"],
            "chosen_by": "Searched anew for every seed: the table below says which layers went.",
        },
        base_model=summary["model"],
        base_model_id=summary["model"],
        dataset=summary["dataset"],
        dataset_id=summary["dataset"],
        counted=cost,
        settings={
            **{key: chosen["training"][key] for key in ("schedule", "decay", "feature_compensation")},
            "bf16": summary["bf16"],
        },
        experiment={
            "title": "Every arm, every seed",
            "text": f"{summary['num_train']} training images at {summary['image_size']} px, all "
            f"{summary['num_images']} test images; seeds {', '.join(map(str, summary['seeds']))}. The dense model "
            f"took {first['training']['steps']} steps, every arm {chosen['training']['steps']} more.",
            "headline": cifar_headline(arms, best),
            "table": [
                [
                    "",
                    "top-1 %, mean",
                    "each seed",
                    "masked, before training",
                    "points against dense trained on",
                    "layers, a set a seed",
                ],
                *body,
            ],
            "note": "Gaps are paired image by image, with the 95 % interval of that; what another seed would give is "
            "not in it. The images were encoded anew: compare arms with each other, not with published accuracies.",
            "results": {"top-1": arms[best]["top1_mean"] / 100},
        },
    )


def cifar_headline(arms: dict[str, Any], best: str) -> list[str]:
    """What was gained and what was lost: by the paper's way, and by what did best."""
    dense, small = arms[DENSE], arms[PAPERS_WAY]
    change = [f"{100 * (small[key] / dense[key] - 1):+.1f} %" for key in ("parameters", "macs")]
    lines = [f"Gained: parameters {change[0]}, MACs {change[1]}, in every arm without attention layers."]
    control = f"{arms[CONTROL]['top1_mean']:.1f}"
    picked = f"The best arm, picked by these very figures ({ARMS[best]})"
    for name, which in {PAPERS_WAY: ARMS[PAPERS_WAY], best: picked}.items():
        gap = arms[name]["gap"]["dense_trained_on"]
        verdict = "Lost" if gap["high"] < 0 else "Not told from the dense model" if gap["low"] <= 0 else "Gained"
        lines.append(
            f"{verdict}: {which} has top-1 {arms[name]['top1_mean']:.1f} % against {control} % of the "
            f"dense model trained as long, {gap_words(gap)} points."
        )
    return lines


def gap_words(gap: dict[str, float]) -> str:
    """A difference in points, with its interval."""
    return f"{gap['points']:+.1f} ({gap['low']:+.1f} to {gap['high']:+.1f})"


if __name__ == "__main__":
    sys.exit(main())
