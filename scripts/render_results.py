#!/usr/bin/env python
"""Writes the generated parts of README.md: measured figures from the committed JSON, the file tree from the files."""

import ast
import sys
from pathlib import Path
from typing import Any

from hf_nose.files import read_json, write_text


ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "model_cards" / "results" / "digits"
ROWS = {
    "dense": "dense, before selection",
    "dense-trained-on": "dense, trained on for the same steps",
    "nose-5-dilution": "NOSE, 5 of 12 removed: dilution with compensation (the paper's way)",
    "nose-5-no-compensation": "NOSE, 5 of 12: dilution without compensation",
    "nose-5-one-shot": "NOSE, 5 of 12: removed in one shot, trained as long",
    "first-5-dilution": "First-5: dilution with compensation",
    "nose-9-dilution": "NOSE, 9 of 12: dilution with compensation",
    "nose-9-one-shot": "NOSE, 9 of 12: removed in one shot, trained as long",
}


def main() -> int:
    """Renders both parts in place."""
    path = ROOT / "README.md"
    write_text(path, rendered(path.read_text(encoding="utf-8")))
    return 0


def rendered(readme: str) -> str:
    """The text of README.md with its generated parts made anew."""
    return between(between(readme, "results", results(RESULTS)), "files", file_tree(ROOT))


def between(text: str, name: str, content: str) -> str:
    """`text` with `content` between the comments that mark the part `name`."""
    head, rest = text.split(f"<!-- {name}: begin", 1)
    comment, rest = rest.split("-->\n", 1)
    _, tail = rest.split(f"<!-- {name}: end -->", 1)
    return f"{head}<!-- {name}: begin{comment}-->\n{content}<!-- {name}: end -->{tail}"


def results(folder: Path) -> str:
    """The tables of the digits experiment and of one timed run."""
    summary, run = read_json(folder / "summary.json"), read_json(folder / "run" / "metrics.json")
    selection = read_json(folder / "run" / "selection.json")
    arms, steps, hardware = summary["arms"], summary["steps"], run["hardware"]
    lines = [
        f"`make run` on {hardware['cores']} cores ({hardware['processor']}, {hardware['dtype']}), "
        f"layers {selection['layers']} removed, {run['models']['dense']['num_images']} test images, "
        f"batches of {run['throughput']['batch_size']}:",
        "",
        "| model | top-1 % | parameters | MMACs | images/s | against dense |",
        "|---|---|---|---|---|---|",
        *(speed_row(name, model) for name, model in run["models"].items()),
        "",
        f"Three seeds, {steps['dense']} dense steps, then {steps['after']} more for every arm, top-1 in percent on "
        f"{summary['num_images']} test images:",
        "",
        "| model | median | each seed | masked, before training |",
        "|---|---|---|---|",
        *(accuracy_row(text, arms[name]) for name, text in ROWS.items()),
        f"| First-5, masked, never trained | {percent(arms['first-5-masked-untrained']['top1_median'])} | | |",
        f"| random 5 of 12, masked, never trained | {percent(arms['random-masked-untrained']['top1_median'])} | | |",
        "",
        "![Transfer entropy of every candidate in every round](model_cards/results/digits/figures/trajectory.png)",
        "",
        "Handwritten digits are easy; they show that the machinery works, not what the method is worth on ImageNet. "
        "The control that the paper does not show, removal in one shot with as many steps, stands beside dilution.",
        "",
    ]
    return "\n".join(lines)


def speed_row(name: str, model: dict[str, Any]) -> str:
    """One model of a timed run."""
    return (
        f"| {name.replace('_', ' ')} | {percent(100 * model['top1'])} | {model['parameters']:,} "
        f"| {model['macs'] / 1e6:.2f} | {model['images_per_s']:,.0f} | {model['ratio_to_dense']:.2f}x |"
    )


def accuracy_row(text: str, arm: dict[str, Any]) -> str:
    """One arm of the experiment."""
    masked = arm.get("masked_untrained_top1_median")
    seeds = ", ".join(percent(value) for value in arm["top1"])
    return f"| {text} | {percent(arm['top1_median'])} | {seeds} | {'' if masked is None else percent(masked)} |"


def percent(value: float) -> str:
    """A percentage to one decimal."""
    return f"{value:.1f}"


def file_tree(root: Path) -> str:
    """Every file of the library and the scripts with the first line of its documentation."""
    lines = ["```"]
    for folder, pattern in (("hf_nose", "*.py"), ("hf_nose/recipes", "*.yaml"), ("scripts", "*.py")):
        lines.append(f"{folder}/")
        for path in sorted((root / folder).glob(pattern)):
            lines.append(f"  {path.name:<30}{first_line(path)}")
    return "\n".join([*lines, "```", ""])


def first_line(path: Path) -> str:
    """What a file says it is: the first line of its docstring, or its first comment."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        return text.splitlines()[0].removeprefix("# ")
    return (ast.get_docstring(ast.parse(text)) or "").splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
