#!/usr/bin/env python
"""
Writes the pages of model_cards/results/deit-tiny and model_cards/results/training-speed from the JSON beside them.

    python scripts/render_pages.py
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_nose.benchmark_tables import markdown_table
from hf_nose.files import read_json, write_text
from hf_nose.profiling import machine_name
from hf_nose.published import BASES, figures


RESULTS = Path(__file__).resolve().parent.parent / "model_cards" / "results"
Record = dict[str, Any]


def main() -> int:
    """Renders every page."""
    for folder, render in PAGES.items():
        write_text(RESULTS / folder / "README.md", render(RESULTS / folder))
    return 0


def deit_tiny(folder: Path) -> str:
    """The page of what was measured on DeiT-T as its authors trained it."""
    parts = ["# DeiT-T as it was trained", "Rendered by `python scripts/render_pages.py`; no number is typed."]
    for name, section in SECTIONS.items():
        path = folder / f"{name}.json"
        if path.is_file():
            record = read_json(path)
            parts += [*section(record), f"{source(record)}; `{path.name}`."]
    return "\n\n".join(parts) + "\n"


def source(record: Record) -> str:
    """What a record was measured on and with."""
    where, packages = record["hardware"], record["versions"]
    return (
        f"{record['model']} on {record['dataset']}; {machine_name(where)}, {where['dtype']}, torch {packages['torch']}"
    )


def search_cost(record: Record) -> list[str]:
    """Time and agreement of every search."""
    rows = [
        [
            arm_words(name, each),
            f"{each['ratio_to_naive']:.2f}",
            f"{each['block_forwards_per_batch']:.0f}",
            " ".join(map(str, each["layers"])),
            f"{each['largest_te_difference']:.1g}",
        ]
        for name, each in record["searches"].items()
    ]
    rounds = len(record["searches"]["naive"]["seconds"])
    closest = min(record["searches"]["naive"]["runner_up_distances"])
    header = ["search", f"{record['clock']}, naive is 1", "block forwards", "layers", "difference in TE, nats"]
    halves = [each["precision"] for each in record["searches"].values() if "precision" in each]
    return [
        "## What the search costs",
        f"Against the naive search through the stock forward, rounds in turn: {rounds}, of which the median; "
        f"{record['num_images']} images, batches of {record['batch_size']}. The closest runner-up is "
        f"{closest:.2g} nats behind. All but the naive one share prefixes; block inputs are kept in up to "
        f"{record['state_cache_gib']:g} GiB. A race scores candidates that drop out early on fewer images, which come "
        "in random order.",
        "\n".join(markdown_table(header, rows)),
        *(
            f"bfloat16 beside float32, {half['num_sets']} sets on {half['num_images']} images: TE differs by "
            f"{half['largest_difference']:.2g} nats at most, {half['mean_difference']:.2g} in the mean; the same pick "
            f"in {half['rounds_of_same_pick']} of {half['rounds']} rounds."
            for half in halves[:1]
        ),
    ]


ARM_WORDS = {
    "keeps": "block inputs kept",
    "class_token_tail": "class-token tail",
    "stack_candidates": "candidates stacked",
    "bf16": "bfloat16",
}


def arm_words(name: str, search: Record) -> str:
    """What a search does that others do not."""
    if name == "naive":
        return "naive"
    words = [text for option, text in ARM_WORDS.items() if search["options"].get(option)]
    if "confidence" in search:
        words.append(f"race, {100 * search['confidence']:g} % sure")
    return ", ".join(words) or "prefix cache alone"


def first_picks(record: Record) -> list[str]:
    """Which layer goes first, by mask, sign and number of images."""
    rows = [
        [variant, size, ", ".join(f"layer {layer}: {count}" for layer, count in ranked(found["counts"]))]
        for variant, sizes in record["picks"].items()
        for size, found in sizes.items()
    ]
    return [
        "## Which layer goes first",
        f"The first pick in {record['seeds']} random samples of the {record['num_images']} images, by how attention "
        "is masked and how the transfer entropy is ranked.",
        "\n".join(markdown_table(["mask, sign", "images", "first pick: how often"], rows)),
    ]


def ranked(counts: dict[str, int]) -> list[tuple[str, int]]:
    """The most frequent first."""
    return sorted(counts.items(), key=lambda item: -item[1])


def half_precision(record: Record) -> list[str]:
    """What float16 holds."""
    peaks, limit, scaled = record["largest_by_doublings"], record["largest_float16"], record["scaled"]
    fits = "does not overflow" if peaks[-1] < limit else "overflows"
    unfolded, folded, images = scaled["unfolded"], scaled["folded"], record["num_images"]
    return [
        "## float16",
        f"As it is, the largest number of the stream is {peaks[0]:,.0f}, and {peaks[-1]:,.0f} where all "
        f"{len(peaks) - 1} blocks lose their attention and double the stream: float16 ends at {limit:,.0f}, so the "
        f"compensated stream {fits} and needs no folding for its range.",
        f"With the stream scaled by {scaled['factor']:.0f}, which changes no logit, and {len(scaled['layers'])} "
        f"compensated layers removed, it reaches {unfolded['largest']:,.0f}: the unfolded model gives "
        f"{unfolded['finite_rows']} of {images} finite rows. Folded, it stays at {folded['largest']:,.0f}: "
        f"{folded['finite_rows']} of {images}, {folded['same_argmax']} with float32's argmax, relative error "
        f"{folded['relative_error']:.1e}.",
    ]


def int8(record: Record) -> list[str]:
    """Accuracy, speed and size of the quantised files."""
    rows = []
    for name, found in record["models"].items():
        for kind in ("float32", "int8"):
            each = found[kind]
            rows.append(
                [
                    f"{name}, {kind}",
                    f"{100 * each['top1']:.1f}",
                    f"{each['images_per_s']:.1f}",
                    f"{each['ratio_to_float32']:.2f}",
                    f"{each['bytes'] / 1e6:.1f}",
                ]
            )
    some = next(iter(record["models"].values()))
    base = BASES.get(record["model"])
    whole = figures(base.table, base.setting, base.dense)["top1"] if base else None
    easier = whole is not None and 100 * some["float32"]["top1"] > float(whole)
    return [
        "## int8 through onnxruntime",
        f"Dynamic quantisation of MatMul and Gemm; {some['float32']['num_images']} images, batches of "
        f"{some['batch_size']}, both files in turn, {some['rounds']} rounds. A ratio of 1 or less is not faster."
        + easier
        * f" These images are easier than the whole validation set, on which the paper has {whole} %.",
        "\n".join(markdown_table(["file", "top-1 %", "images/s", "against float32", "MB"], rows)),
    ]


SECTIONS: dict[str, Callable[[Record], list[str]]] = {
    "search_cost": search_cost,
    "first_picks": first_picks,
    "half_precision": half_precision,
    "int8": int8,
}


def training_speed(folder: Path) -> str:
    """The page of what a training step costs, dense, diluted and at M = 0."""
    rows, notes = [], []
    for path in sorted(folder.glob("*.json")):
        record = read_json(path)
        steps, data = record["steps"], record["data"]
        rows.append(
            [
                f"{path.stem}, batch {record['batch_size']}",
                *(f"{steps['seconds'][name]:.2f}" for name in ("dense", "diluted", "tail")),
                f"{100 * steps['dilution_cost']:+.1f} %",
                f"{100 * steps['tail_saving']:.1f} %",
                f"{100 * steps['macs_saved']:.1f} %",
                f"{100 * data['waiting_share']:.1f} %",
            ]
        )
        workers = f"loader workers: {record['num_workers'] or 'none'}"
        told = f"layers {record['layers']}, {steps['pairs']} rounds in turn, {workers}"
        notes.append(f"- {source(record)}; {told}; `{path.name}`.")
    header = ["run", "dense s", "diluted s", "M = 0 s", "dilution costs", "M = 0 saves", "MACs saved", "data waits"]
    return (
        "\n\n".join(
            [
                "# What a training step costs",
                "Rendered by `python scripts/render_pages.py`; no number is typed. Seconds are medians of whole "
                "optimizer steps; shares are medians of ratios taken round by round, MACs those that are computed. "
                "The last column is the share of its time that training waits for images.",
                "\n".join(markdown_table(header, rows)),
                "\n".join(notes),
            ]
        )
        + "\n"
    )


PAGES: dict[str, Callable[[Path], str]] = {"deit-tiny": deit_tiny, "training-speed": training_speed}


if __name__ == "__main__":
    sys.exit(main())
