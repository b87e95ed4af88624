#!/usr/bin/env python
"""
The digits experiment: three seeds and every control, into model_cards/results/digits/.

Every arm starts from the seed's one dense model and trains for as many steps. It resumes: an arm whose JSON is there
is not run again, and each JSON is written as its arm ends.

    python scripts/digits_experiment.py            # about half an hour on one core
"""

import argparse
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from hf_nose.files import read_json, write_json
from hf_nose.records import RECORDS
from hf_nose.run import run_job
from hf_nose.settings import parse_settings


RESULTS = Path(__file__).resolve().parent.parent / "model_cards" / "results" / "digits"
BASE = "nose-5-dilution"
# What each arm changes in the recipe `digits`.
ARMS = {
    BASE: [],
    "nose-5-no-compensation": ["--feature_compensation", "false"],
    "nose-5-one-shot": ["--schedule", "one_shot"],
    "first-5-dilution": ["--layers", "0,1,2,3,4"],
    "nose-9-dilution": ["--num_removed", "9"],
    "nose-9-one-shot": ["--num_removed", "9", "--schedule", "one_shot"],
}
# The dense model, its profile and their checkpoints do not depend on the arm.
SHARED = ("dense", RECORDS["prepare"], RECORDS["profile"])


def main(argv: list[str] | None = None) -> int:
    """Runs the arms that are missing, then writes the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2", help="seeds, comma-separated")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/digits-experiment"), help="where the runs go")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON goes")
    parser.add_argument("--arms", default=",".join(ARMS), help="arms to run, comma-separated")
    options, flags = parser.parse_known_args(argv)
    options.results.mkdir(parents=True, exist_ok=True)
    for seed in map(int, options.seeds.split(",")):
        for arm in options.arms.split(","):
            path = options.results / f"{arm}-seed{seed}.json"
            if not path.is_file():
                write_json(path, run_arm(arm, seed, options.work_dir, flags))
    write_json(options.results / "summary.json", summary(options.results))
    return 0


def run_arm(arm: str, seed: int, work_dir: Path, flags: list[str]) -> dict[str, Any]:
    """Runs one arm of one seed and returns what is worth keeping of it."""
    folder = work_dir / f"seed{seed}" / arm
    base = work_dir / f"seed{seed}" / BASE
    if arm != BASE and not (folder / RECORDS["prepare"]).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        for name in SHARED:
            copy = shutil.copytree if (base / name).is_dir() else shutil.copy2
            copy(base / name, folder / name)
    control = ["--control", str(arm == BASE)]
    common = ["--recipe", "digits", "--seed", str(seed), "--output_dir", str(folder), "--resume", *control]
    run_job(parse_settings([*common, *ARMS[arm], *flags]))
    metrics, selection = read_json(folder / RECORDS["evaluate"]), read_json(folder / RECORDS["select"])
    dilution = read_json(folder / RECORDS["dilute"])
    training = {name: dilution[name] for name in ("schedule", "decay", "feature_compensation", "steps", "threads")}
    return {
        "arm": arm,
        "seed": seed,
        "layers": selection["layers"],
        "search": selection["search"],
        "training": training,
        "settings": dilution["settings"],
        "dense_steps": read_json(folder / RECORDS["prepare"])["settings"]["dense_steps"],
        "models": {name: accuracy_of(model) for name, model in metrics["models"].items()},
        "controls": metrics["controls"],
        "hardware": metrics["hardware"],
    }


def accuracy_of(model: dict[str, Any]) -> dict[str, Any]:
    """Accuracy and cost; speed is left out, because arms do not run on an idle machine."""
    return {name: model[name] for name in ("top1", "top5", "loss", "num_images", "parameters", "macs")}


def summary(results: Path) -> dict[str, Any]:
    """Per arm, top-1 in percent and what training gained over masking alone, with medians over the seeds."""
    arms: dict[str, Any] = {}
    for arm in ARMS:
        records = [read_json(path) for path in sorted(results.glob(f"{arm}-seed*.json"))]
        if not records:
            continue
        top1 = [100 * record["models"]["compressed"]["top1"] for record in records]
        masked = [100 * record["controls"][0]["top1"] for record in records]
        gain = [after - before for after, before in zip(top1, masked, strict=True)]
        arms[arm] = {
            "seeds": [record["seed"] for record in records],
            "layers": [record["layers"] for record in records],
            "top1": top1,
            "top1_median": statistics.median(top1),
            "masked_untrained_top1": masked,
            "masked_untrained_top1_median": statistics.median(masked),
            "gain": gain,
            "gain_median": statistics.median(gain),
        }
    base = [read_json(path) for path in sorted(results.glob(f"{BASE}-seed*.json"))]
    arms["dense"] = medians([record["models"]["dense"]["top1"] for record in base])
    arms["dense-trained-on"] = medians([record["models"]["dense_control"]["top1"] for record in base])
    for name in ("First-5", "random"):
        found = [item["top1"] for record in base for item in record["controls"] if item["name"].startswith(name)]
        arms[f"{name.lower()}-masked-untrained"] = medians(found)
    return {
        "arms": arms,
        "num_images": base[0]["models"]["dense"]["num_images"],
        "parameters": {name: base[0]["models"][name]["parameters"] for name in ("dense", "compressed")},
        "macs": {name: base[0]["models"][name]["macs"] for name in ("dense", "compressed")},
        "steps": {"dense": base[0]["dense_steps"], "after": base[0]["training"]["steps"]},
    }


def medians(fractions: list[float]) -> dict[str, Any]:
    """Percentages and their median."""
    top1 = [100 * value for value in fractions]
    return {"top1": top1, "top1_median": statistics.median(top1)}


if __name__ == "__main__":
    sys.exit(main())
