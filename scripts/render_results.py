#!/usr/bin/env python
"""
Writes the generated parts of README.md: measured figures from the committed JSON, the file tree from the files.

    python scripts/render_results.py                    # after a change of files or results
    python scripts/render_results.py --run runs/digits  # takes the figures of a new `make run` first
"""

import argparse
import ast
import shutil
import sys
from pathlib import Path
from typing import Any

from hf_nose.files import read_json, write_text
from hf_nose.records import RECORDS


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


def main(argv: list[str] | None = None) -> int:
    """Renders both parts in place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a finished run of the recipe digits, to be shown")
    options = parser.parse_args(argv)
    if options.run is not None:
        publish_run(options.run, RESULTS / "run")
    path = ROOT / "README.md"
    write_text(path, rendered(path.read_text(encoding="utf-8")))
    return 0


def publish_run(run: Path, results: Path) -> None:
    """Copies the records and pictures that README shows of a run."""
    shutil.copytree(run / "figures", results / "figures", dirs_exist_ok=True)
    for stage in ("select", "evaluate"):
        shutil.copy2(run / RECORDS[stage], results / RECORDS[stage])


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
        "| model | top-1 % | parameters | MMACs | images/s | against dense, 95 % |",
        "|---|---|---|---|---|---|",
        *(speed_row(name, model) for name, model in run["models"].items()),
        "",
        f"Three seeds, {steps['dense']} dense steps, then {steps['after']} more for every arm, top-1 in percent on "
        f"{summary['num_images']} test images:",
        "",
        "| model | median | each seed | masked, before training | gained by training, each seed |",
        "|---|---|---|---|---|",
        *(accuracy_row(text, arms[name]) for name, text in ROWS.items()),
        f"| First-5, masked, never trained | {percent(arms['first-5-masked-untrained']['top1_median'])} | | | |",
        f"| random 5 of 12, masked, never trained | {percent(arms['random-masked-untrained']['top1_median'])} | | | |",
        "",
        "![Transfer entropy of every candidate in every round](model_cards/results/digits/run/figures/trajectory.png)",
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
        f"| {model['macs'] / 1e6:.2f} | {model['images_per_s']:,.0f} | {speed_cell(name, model)} |"
    )


def speed_cell(name: str, model: dict[str, Any]) -> str:
    """How many times as fast as the dense model, with the confidence interval of that."""
    if name == "dense":
        return ""
    lower, upper = model["ratio_interval"]
    return f"{model['ratio_to_dense']:.2f}x ({lower:.2f} to {upper:.2f})"


def accuracy_row(text: str, arm: dict[str, Any]) -> str:
    """One arm of the experiment."""
    seeds = ", ".join(percent(value) for value in arm["top1"])
    masked, gain = "", ""
    if "gain" in arm:
        masked = percent(arm["masked_untrained_top1_median"])
        gain = ", ".join(percent(value) for value in arm["gain"])
    return f"| {text} | {percent(arm['top1_median'])} | {seeds} | {masked} | {gain} |"


def percent(value: float) -> str:
    """A percentage to one decimal."""
    return f"{value:.1f}"


# What is no code says in one line here what it is.
FILES = {
    "Makefile": "set-up, run, test, quality, results: `make help`",
    "pyproject.toml": "packaging, extras, and the settings of the tools",
    "constraints.txt": "the tested stack, pinned",
    "requirements-dev.txt": "what `make` installs",
    "CONTRIBUTING.md": "the map of the house and its rules",
    "CHANGELOG.md": "what users notice",
    "CITATION.cff": "how to cite the paper and the software",
    "LICENSE": "Apache-2.0",
    ".ci/run": "what continuous integration runs",
    ".github/workflows/ci.yml": "the same for forks",
    ".pre-commit-config.yaml": "checks before a commit",
    "hf_nose/assets/digits-vit.json": "the small ViT of the embedded default",
    "hf_nose/assets/card.md.j2": "the template of model cards",
    "hf_nose/assets/published.csv": "the paper's figures, never in one column with ours",
    "hf_nose/py.typed": "says that the package has types",
    "model_cards/results/": "measured JSON and pictures, a folder an experiment",
}


def file_tree(root: Path) -> str:
    """Every file with one line on what it is: the first of its documentation where it has some."""
    lines = ["```"]
    folders = (
        ("hf_nose", "**/*.py"),
        ("hf_nose/recipes", "*.yaml"),
        ("scripts", "*.py"),
        ("scripts/accelerate", "*.yaml"),
        ("tests", "**/*.py"),
    )
    for folder, pattern in folders:
        lines.append(f"{folder}/")
        for path in sorted((root / folder).glob(pattern)):
            lines.append(f"  {path.relative_to(root / folder).as_posix():<38} {first_line(path)}")
    lines += [f"{name:<40} {text}" for name, text in FILES.items()]
    return "\n".join([*lines, "```", ""])


def first_line(path: Path) -> str:
    """What a file says it is: the first line of its docstring, or its first comment."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        return text.splitlines()[0].removeprefix("# ")
    return (ast.get_docstring(ast.parse(text)) or "").splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
