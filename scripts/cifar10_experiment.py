#!/usr/bin/env python
"""
DeiT-T on CIFAR-10: attention removed in every way, every control beside it, into model_cards/results/.

A fixed subset trains, all test images evaluate. Every arm starts from the one dense model of its seed and trains for
as many epochs. It resumes: an arm whose JSON is there is not run again, and each JSON is written as its arm ends.

    python scripts/cifar10_experiment.py --model facebook/deit-tiny-patch16-224 --dataset uoft-cs/cifar10 --bf16

`--plan short` is the search for the short recipe, 64 px and a few epochs, for two cores; `--plan paper` is the paper's
Tables 2, 4, 5, 9 and 10 in small, 224 px and 100 epochs, for a GPU; scripts/cifar10_plans.py says what they hold.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from cifar10_plans import DENSE, NUM_RANDOM, PLANS
from cifar10_summary import page, summary

from hf_nose.command_line import parse_job, parse_settings
from hf_nose.context import choose_device
from hf_nose.data import load_image_data
from hf_nose.evaluation import evaluation_images
from hf_nose.files import read_json, write_json, write_text
from hf_nose.images import ImageBatches, load_processor
from hf_nose.profiling import count_macs, count_parameters, hardware
from hf_nose.records import RECORDS, public_id
from hf_nose.run import run_job
from hf_nose.selection import random_sets
from hf_nose.transfer import transfer_job
from hf_nose.transfer_settings import TransferSettings
from hf_nose.weights import load_classifier


RESULTS = Path(__file__).resolve().parent.parent / "model_cards" / "results"
FROM_PLAN = ("num_train", "image_size", "dense_epochs", "epochs")


def main(argv: list[str] | None = None) -> int:
    """Runs the arms that are missing, then writes the summary and its page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hub id or folder of DeiT-T")
    parser.add_argument("--dataset", required=True, help="CIFAR-10: a Hub id or a folder of parquet files")
    parser.add_argument("--base_model_id", default="facebook/deit-tiny-patch16-224", help="public name of the model")
    parser.add_argument("--dataset_id", default="uoft-cs/cifar10", help="public name of the data set")
    parser.add_argument("--plan", default="short", choices=PLANS, help="what is run")
    parser.add_argument("--transfer_dataset", help="other data for the arms of Table 2, left out without it")
    parser.add_argument("--transfer_label_column", help="column of its labels")
    parser.add_argument("--seeds", default="0,1", help="seeds, comma-separated")
    parser.add_argument("--arms", help="arms to run, comma-separated; all of the plan by default")
    parser.add_argument("--num_train", type=int, help="images of the fixed training subset")
    parser.add_argument("--image_size", type=int, help="sides of the images in pixels")
    parser.add_argument("--dense_epochs", type=float, help="epochs of the dense model")
    parser.add_argument("--epochs", type=float, help="epochs of every arm after it")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16")
    parser.add_argument("--work_dir", type=Path, help="where the runs go")
    parser.add_argument("--results", type=Path, help="where the JSON goes")
    parser.add_argument("--summary_only", action="store_true", help="write the summary of what is there")
    options = completed(parser.parse_args(argv))
    options.results.mkdir(parents=True, exist_ok=True)
    for seed in map(int, options.seeds.split(",")):
        for arm in [] if options.summary_only else (DENSE, *options.arms):
            path = options.results / f"{arm}-seed{seed}.json"
            if not path.is_file():
                write_json(path, run_arm(arm, seed, options))
    found = summary(options.results, options.plan)
    write_json(options.results / "summary.json", found)
    write_text(options.results / "README.md", page(found))
    return 0


def completed(options: argparse.Namespace) -> argparse.Namespace:
    """The options, with what was not given as the plan has it."""
    name, options.plan = options.plan, PLANS[options.plan]
    for key in FROM_PLAN:
        if getattr(options, key) is None:
            setattr(options, key, getattr(options.plan, key))
    folder = "cifar10-deit-tiny" if name == "short" else f"cifar10-deit-tiny-{name}"
    options.work_dir = options.work_dir or Path("runs") / folder
    options.results = options.results or RESULTS / folder
    arms = options.plan.arms
    can_run = [arm for arm in arms if options.transfer_dataset or "transfer_from" not in arms[arm]]
    options.arms = options.arms.split(",") if options.arms else can_run
    return options


def subset(options: argparse.Namespace) -> Path:
    """The folder of the fixed subset as parquet files, the same for every seed, made at first use."""
    folder = options.work_dir / f"data-{options.num_train}"
    if not (folder / "test.parquet").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        data = load_image_data(options.dataset, max_train_samples=options.num_train)
        for name, split in (("train", data.train), ("test", data.evaluation)):
            assert isinstance(split, datasets.Dataset)
            split.select_columns([data.image_column, data.label_column]).to_parquet(folder / f"{name}.parquet")
    return folder


def run_arm(arm: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One arm, and which test images its model then gets right."""
    runs, values = options.work_dir / f"seed{seed}", dict({DENSE: {}, **options.plan.arms}[arm])
    if arm == DENSE:
        words = {"model": options.model, "image_size": options.image_size, "epochs": options.dense_epochs}
        return transferred(arm, seed, options, words)
    words = {"model": runs / DENSE / "model", "epochs": options.epochs}
    if values.pop("dense", False):
        return transferred(arm, seed, options, words)
    if "transfer_from" in values:
        words["model"] = runs / values.pop("transfer_from") / "model"
        words |= {"dataset": options.transfer_dataset, "dataset_id": public_id(options.transfer_dataset)}
        words |= {"label_column": options.transfer_label_column} if options.transfer_label_column else {}
        return transferred(arm, seed, options, {**words, **values})
    return removed(arm, seed, options, {**words, **values})


def flags(folder: Path, seed: int, options: argparse.Namespace, values: dict[str, Any]) -> list[str]:
    """A command line of one job: what all have in common, and `values`."""
    common = {"dataset": subset(options), "dataset_id": options.dataset_id, "bf16": options.bf16}
    words = {**common, **options.plan.training, "base_model_id": options.base_model_id, **values}
    words |= {"seed": seed, "output_dir": folder, "recipe": "none"}
    return [*(f"--{name}={value}" for name, value in words.items() if value is not None), "--resume"]


def transferred(arm: str, seed: int, options: argparse.Namespace, values: dict[str, Any]) -> dict[str, Any]:
    """An arm that removes nothing: the dense model, the same trained on, or a model on other data."""
    folder = options.work_dir / f"seed{seed}" / arm
    settings = parse_job(TransferSettings, flags(folder, seed, options, values))
    transfer_job(settings)
    record = read_json(folder / RECORDS["transfer"])
    return {
        **start(arm, seed, options, folder / "model", settings.dataset, settings.label_column),
        "dataset": public_id(settings.dataset, settings.dataset_id),
        "training": brief(record["training"]),
    }


def removed(arm: str, seed: int, options: argparse.Namespace, values: dict[str, Any]) -> dict[str, Any]:
    """An arm that removes attention: what it removes, its training, and the model masked but not trained."""
    folder, data = options.work_dir / f"seed{seed}" / arm, str(subset(options))
    if "criterion" in values or arm == options.plan.search_arm(arm):
        values["num_removed"] = options.plan.removed(arm)
    else:
        values.pop("num_removed", None)
        values["layers"] = ",".join(map(str, layers_of(arm, seed, options)))
    values["stages"] = "prepare,select,dilute,fold"
    run_job(parse_settings(flags(folder, seed, options, values)))
    selection, dilution = read_json(folder / RECORDS["select"]), read_json(folder / RECORDS["dilute"])
    masked = load_classifier(values["model"])
    with masked.masked_attention(selection["layers"]):
        untrained = correct(masked, values["model"], data)
    names = ("schedule", "decay", "feature_compensation", "distillation")
    return {
        **start(arm, seed, options, folder / "model", data),
        "layers": selection["layers"],
        "calibration": selection["calibration"],
        "training": {**{name: dilution[name] for name in names}, **brief(dilution)},
        "masked_untrained_top1": float(untrained.mean()),
    }


def layers_of(arm: str, seed: int, options: argparse.Namespace) -> list[int]:
    """The set an arm removes: NOSE's, the first N, or the random set of a number, none of which is NOSE's."""
    kind, count = options.plan.arms[arm].get("layers"), options.plan.removed(arm)
    nose = read_json(options.results / f"{options.plan.search_arm(arm)}-seed{seed}.json")["layers"]
    if kind is None:
        return nose
    if kind == "first":
        return list(range(count))
    known = [tuple(sorted(nose)), tuple(range(count))]
    draws = random_sets(list(range(12)), count, NUM_RANDOM + len(known), seed)
    return list([draw for draw in draws if draw not in known][int(kind)])


def start(
    arm: str, seed: int, options: argparse.Namespace, model: Path, dataset: str, label_column: str | None = None
) -> dict[str, Any]:
    """What every record begins with: whose it is, and what the model in the folder `model` can do at what cost."""
    loaded = load_classifier(model)
    hits = correct(loaded, model, dataset, label_column)
    return {
        "arm": arm,
        "seed": seed,
        "model": public_id(options.model, options.base_model_id),
        "dataset": public_id(options.dataset, options.dataset_id),
        "num_train": options.num_train,
        "image_size": options.image_size,
        "bf16": options.bf16,
        "top1": float(hits.mean()),
        "num_images": len(hits),
        "correct": np.packbits(hits).tobytes().hex(),
        "parameters": count_parameters(loaded),
        "macs": count_macs(loaded)["total"],
        "hardware": hardware(choose_device("auto")),
    }


@torch.no_grad()
def correct(model: torch.nn.Module, folder: Path, dataset: str, label_column: str | None = None) -> np.ndarray:
    """Which test images `model` gets right, in float32, with the image processor of `folder`: booleans (images,)."""
    images, _ = evaluation_images(dataset, load_processor(folder), label_column=label_column)
    device = choose_device("auto")
    model.to(device)
    hits = [
        model(batch["pixel_values"].to(device)).logits.argmax(-1).cpu() == batch["labels"]
        for batch in ImageBatches(images, 250)
    ]
    return torch.cat(hits).numpy()


def brief(training: dict[str, Any]) -> dict[str, Any]:
    """A training without its log."""
    return {name: training[name] for name in ("steps", "seconds", "resumed_from", "threads")}


if __name__ == "__main__":
    sys.exit(main())
