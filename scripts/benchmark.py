#!/usr/bin/env python
"""
Measures what model_cards/results/speed holds, a command a measurement, and renders its README from the files there.

    python scripts/benchmark.py speed      # DeiT-B, batch 16: 40 and 50 % folded and dense against the stock ViT
    python scripts/benchmark.py memory     # DeiT-B: images in a fixed budget, in slices and whole
    python scripts/benchmark.py chunking   # DeiT-B: what the slices cost in time
    python scripts/benchmark.py fusing     # DeiT-B: what q, k and v as one matrix product gain
    python scripts/benchmark.py table      # DeiT-T/S/B at 0, 25, 40, 50 %: batch 1, 8, 32
    python scripts/benchmark.py published  # float32, eager, batch 128 or 256: beside the paper's columns
    python scripts/benchmark.py gpu        # bfloat16, with and without compiling; images in 10 GB
    python scripts/benchmark.py render     # tables, plots and README.md of the folder, from its JSON

An idle machine, please. What a file already holds is not measured again; any option below changes a measurement.
"""

import argparse
import sys
from functools import cache
from pathlib import Path
from typing import Any

from hf_nose.benchmark import BenchmarkOptions, run_benchmark
from hf_nose.benchmark_figures import draw_pareto
from hf_nose.benchmark_tables import markdown_table, tables, write_tables
from hf_nose.contenders import CHUNKED, contenders
from hf_nose.files import read_json, write_json, write_text
from hf_nose.profiling import machine_name
from hf_nose.published import shape_figures
from hf_nose.roofline import update_shares
from hf_nose.shapes import SHAPES


RESULTS = Path(__file__).resolve().parent.parent / "model_cards" / "results" / "speed"
SHARES = ["25%", "40%", "50%"]
# An MLP over the tokens of four images, an attention layer over four images.
CHUNKS = {"chunk_size_feed_forward": 788, "chunk_size_attention": 4}
BASE = {"models": ["deit-base"], "removed": ["40%", "50%"]}
# What one command measures, one record entry after the other.
PRESETS: dict[str, list[dict[str, Any]]] = {
    "speed": [{**BASE, "batch_sizes": ["16"]}],
    # Budgets that hold a little more than 64 stock images: every guess of the search is a whole forward.
    "memory": [
        {**BASE, **CHUNKS, "removed": ["40%"], "rounds": 0, "memory_budget": "928MiB"},
        {**BASE, **CHUNKS, "removed": ["40%"], "rounds": 0, "memory_budget": "544MiB", "dtypes": ["bfloat16"]},
    ],
    "chunking": [{"models": ["deit-base"], **CHUNKS, "batch_sizes": ["16"], "rounds": 21}],
    "fusing": [{**BASE, "fuse_qkv": True, "batch_sizes": ["1", "16"], "rounds": 21}],
    "table": [{"models": list(SHAPES), "removed": SHARES}],
    "published": [
        {**BASE, "batch_sizes": ["128"], "attentions": ["eager"], "rounds": 6},
        {
            "models": ["deit-small", "deit-tiny"],
            "removed": ["25%", "30%", "40%"],
            "batch_sizes": ["256"],
            "attentions": ["eager"],
            "rounds": 6,
        },
    ],
    "gpu": [
        {"models": [shape], "removed": SHARES, "dtypes": ["bfloat16"], "device": "cuda", **more}
        for shape in SHAPES
        for more in (
            {**CHUNKS, "batch_sizes": ["1", "8", "32", "256", "max"], "memory_budget": "10GB"},
            {"batch_sizes": ["1", "8", "32", "256"], "torch_compile": True},
        )
    ],
}
# The least that is asked of a ratio, by the end of a model's name.
SPEED_BOUNDS = {" dense": 1.06, " 40%": 1.27, " 50%": 1.30}
MEMORY_BOUND, LEAST_STOCK_IMAGES, CHUNKING_BOUND, LEAST_PAIRS = 3.0, 64, 0.03, 15


def main(argv: list[str] | None = None) -> int:
    """Measures and renders; 1 where a bound that the project set itself is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*PRESETS, "render"])
    parser.add_argument("--output_dir", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--overwrite", action="store_true", help="forget what the file of this machine holds")
    parser.add_argument("--models", nargs="+", help="shapes, folders or Hub ids instead")
    parser.add_argument("--removed", nargs="+", help="layers or shares instead")
    parser.add_argument("--batch_sizes", nargs="+", help="batch sizes instead")
    parser.add_argument("--rounds", type=int, help="timed forwards of each model instead")
    parser.add_argument("--memory_budget", help="budget instead, such as 1GiB")
    parser.add_argument("--device", help="auto, cpu, cuda, mps instead")
    parser.add_argument("--threads", type=int, help="threads of torch on a CPU")
    options = vars(parser.parse_args(argv))
    what, folder, overwrite = (options.pop(name) for name in ("what", "output_dir", "overwrite"))
    kept = True
    if what != "render":
        changes = {name: value for name, value in options.items() if value is not None}
        for preset in PRESETS[what]:
            path, record = run_benchmark(BenchmarkOptions(**preset | changes), folder, overwrite, print)
            overwrite = False
            write_tables(record, path)
            draw_pareto(record, path.with_suffix(".png"))
        print(tables(record))
        section, check = CHECKS.get(what, ("groups", none))
        checks = [found for entry in record[section] for found in check(entry)]
        for text, is_kept in checks:
            print(f"{'kept' if is_kept else 'MISSED'}: {text}")
        kept = all(is_kept for _, is_kept in checks)
    folder.mkdir(parents=True, exist_ok=True)
    if what == "render":
        for path in sorted(folder.glob("*.json")):
            render(path)
    write_text(folder / "README.md", readme(folder))
    return 0 if kept else 1


def render(path: Path) -> None:
    """What stands beside a record, from the record alone: shares of the rate of matrix products, tables, plot."""
    record = read_json(path)
    update_shares(record["groups"])
    write_json(path, record)
    write_tables(record, path)
    draw_pareto(record, path.with_suffix(".png"))


def none(entry: dict[str, Any]) -> list[tuple[str, bool]]:
    """Of most measurements nothing is asked but that they are honest."""
    return []


def speed_checks(entry: dict[str, Any]) -> list[tuple[str, bool]]:
    """Whether the ratios to the stock ViT reach their bounds, in a group of DeiT-B at batch 16."""
    if (entry["batch_size"], entry["dtype"], entry["shape"]) != (16, "float32", "deit-base") or not entry["rounds"]:
        return []
    found = []
    for model in entry["models"]:
        for end, bound in SPEED_BOUNDS.items():
            if model["name"].endswith(end):
                ratio = model["ratio_to_first"]
                found.append((f"{model['name']} {ratio:.3f}x, at least {bound:.2f}x asked", ratio >= bound))
    return found


def memory_checks(entry: dict[str, Any]) -> list[tuple[str, bool]]:
    """Whether the dense model in slices holds three times the stock one's images, those being enough."""
    stock, found = entry["models"][0]["images"], []
    where = f"{entry['dtype']}, {entry['budget_bytes'] / 2**20:.0f} MiB"
    found.append((f"{where}: {stock} stock images, at least {LEAST_STOCK_IMAGES} asked", stock >= LEAST_STOCK_IMAGES))
    for model in entry["models"]:
        if model["name"].endswith(" dense chunked"):
            ratio = model["images"] / stock if stock else 0.0
            text = f"{where}: {model['name']} {ratio:.2f}x as many images, at least {MEMORY_BOUND:.0f}x asked"
            found.append((text, ratio >= MEMORY_BOUND))
    return found


def chunking_checks(entry: dict[str, Any]) -> list[tuple[str, bool]]:
    """Whether slices cost little time."""
    found = []
    for model in entry["models"]:
        if model["name"].endswith(CHUNKED) and entry["rounds"]:
            cost = 1 / model["ratio_to_plain"] - 1
            text = f"{model['name']}: slices cost {100 * cost:.1f} %, at most {100 * CHUNKING_BOUND:.0f} % asked"
            found.append(
                (f"{text}, {entry['rounds']} pairs", cost <= CHUNKING_BOUND and entry["rounds"] >= LEAST_PAIRS)
            )
    return found


# By what was measured: where in the record it stands, and what is asked of it.
CHECKS = {
    "speed": ("groups", speed_checks),
    "memory": ("memory", memory_checks),
    "chunking": ("groups", chunking_checks),
}


def readme(folder: Path) -> str:
    """README.md of the folder: caveats, costs by counting, and the tables of every file."""
    records = {path: read_json(path) for path in sorted(folder.glob("*.json"))}
    lines = ["# Speed and memory", "", "Rendered by `python scripts/benchmark.py render`; no number is typed.", ""]
    lines += [f"- {caveat}" for caveat in caveats(list(records.values()))]
    lines += ["", "## What the shapes cost", "", *costs()]
    for path, record in records.items():
        hardware, versions = record["hardware"], record["versions"]
        lines += ["", f"## {machine_name(hardware)}", ""]
        packages = ", ".join(f"{package} {versions[package]}" for package in ("hf_nose", "torch", "transformers"))
        lines += [f"{packages}; `{path.name}`.", ""]
        if path.with_suffix(".png").exists():
            lines += [f"![Images per second against latency]({path.stem}.png)", ""]
        lines += [tables(record).rstrip()]
    return "\n".join([*lines, ""])


def caveats(records: list[dict[str, Any]]) -> list[str]:
    """What a reader has to know, and what was not measured."""
    missing = []
    if not any(record["hardware"]["device"] == "cuda" for record in records):
        missing.append("Nothing here was measured on a GPU: none was at hand.")
    if not any(record["hardware"]["device"] == "cpu" for record in records):
        missing.append("Nothing here was measured on a CPU.")
    return [
        *missing,
        "Weights are random: speed and memory do not depend on them. Accuracy stands elsewhere.",
        "Every ratio is to transformers' own ViT of the same shape in the same process, the models in turn; other "
        "implementations of ViT may be faster or slower than that one.",
        "The shares are nominal, round(share x blocks) layers; where the paper does not say which, the first ones.",
        "The whole forward from pixels to logits, in memory already: no decoding, no processor, no transfer; "
        "compiling is not counted.",
        "The paper's columns come from other machines and another code; they are shown, not compared.",
        "The rate of matrix products is the best of a few sizes, before and after the models, and of all groups of "
        "one data type: what disturbs it makes it lower. A share of it counts the MACs that are computed, not "
        "softmax, activations or sums.",
        "Memory on a CPU is what the system counts as resident above the empty process, so it moves a little between "
        "runs; on a GPU it is that of torch's allocator, without the driver's context.",
        "Speed on a CPU depends on what else runs; the quartiles show how much.",
    ]


@cache
def costs() -> list[str]:
    """Parameters and MACs of the shapes, counted on the meta device, the paper's beside them."""
    rows = []
    for shape in SHAPES:
        for contender in contenders([shape], ["25%", "30%", "40%", "50%"])[shape]:
            if contender.kind != "stock":
                count, paper = contender.costs(), shape_figures(shape, len(contender.removed))
                row = [contender.name, " ".join(map(str, contender.removed)), f"{count['parameters'] / 1e6:.2f}"]
                row += [f"{count[key] / 1e9:.2f}" for key in ("macs", "macs_computed")]
                row += [f"{count['macs_by_part'][part] / 1e9:.2f}" for part in ("attention", "mlp")]
                rows.append([*row, *(f"{paper[key]:.1f}" if paper else "" for key in ("params_m", "gmacs"))])
    header = ["model", "removed", "M params", "GMACs as published", "GMACs computed", "of which attention", "MLPs"]
    return markdown_table([*header, "paper: M params", "paper: GMACs"], rows)


if __name__ == "__main__":
    sys.exit(main())
