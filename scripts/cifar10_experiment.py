#!/usr/bin/env python
"""
DeiT-T on CIFAR-10 at 64 px: 40 % of the attention removed, every control beside it, into model_cards/results/.

A fixed subset trains, all test images evaluate. Every arm starts from the one dense model of its seed and trains for
as many epochs. It resumes: an arm whose JSON is there is not run again, and each JSON is written as its arm ends.

    python scripts/cifar10_experiment.py --model facebook/deit-tiny-patch16-224 --dataset uoft-cs/cifar10
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from hf_nose.command_line import parse_job, parse_settings
from hf_nose.data import load_image_data
from hf_nose.files import read_json, write_json
from hf_nose.images import ImageBatches, ImageDataset, load_processor
from hf_nose.profiling import count_macs, count_parameters, hardware
from hf_nose.records import RECORDS, public_id
from hf_nose.run import run_job
from hf_nose.selection import random_sets
from hf_nose.transfer import transfer_job
from hf_nose.transfer_settings import TransferSettings
from hf_nose.weights import load_classifier


RESULTS = Path(__file__).resolve().parent.parent / "model_cards" / "results" / "cifar10-deit-tiny"
NUM_REMOVED = 5
NUM_RANDOM = 3
# How images are seen and weights moved, alike in every training.
TRAINING = {
    "batch_size": 128,
    "learning_rate": 2e-4,
    "min_learning_rate": 1e-6,
    "weight_decay": 0.05,
    "label_smoothing": 0.1,
    "flip": True,
    "shift": 4,
    "eval_batch_size": 250,
    "eval_steps": 10_000,
    "save_steps": 400,
    "logging_steps": 50,
    # All images of the experiment, at 64 px.
    "cache_gib": 4.0,
}
DENSE, CONTROL, SEARCH = "dense", "dense-trained-on", "nose-one-shot"
DILUTION = {"schedule": "linear", "decay": 0.6}
TEACHER = {"distillation_weight": 0.7, "distillation_temperature": 2.0}
# What each arm says beside the common settings; one without a set of layers takes NOSE's.
ARMS: dict[str, dict[str, Any]] = {
    SEARCH: {"schedule": "one_shot"},
    CONTROL: {"dense": True},
    "nose-dilution": {**DILUTION, "feature_compensation": False},
    "nose-dilution-compensated": {**DILUTION, "feature_compensation": True},
    "nose-one-shot-distilled": {"schedule": "one_shot", **TEACHER},
    "nose-dilution-distilled": {**DILUTION, "feature_compensation": False, **TEACHER},
    "first-one-shot": {"schedule": "one_shot", "layers": "first"},
    **{f"random-{draw}-one-shot": {"schedule": "one_shot", "layers": draw} for draw in range(NUM_RANDOM)},
    "nose-one-shot-short-decay": {"schedule": "linear", "decay": 0.2, "feature_compensation": False},
    "nose-one-shot-high-rate": {"schedule": "one_shot", "learning_rate": 5e-4},
    "kl-one-shot": {"schedule": "one_shot", "criterion": "prediction_kl"},
}


def main(argv: list[str] | None = None) -> int:
    """Runs the arms that are missing, then writes the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hub id or folder of DeiT-T")
    parser.add_argument("--dataset", required=True, help="CIFAR-10: a Hub id or a folder of parquet files")
    parser.add_argument("--base_model_id", default="facebook/deit-tiny-patch16-224", help="public name of the model")
    parser.add_argument("--dataset_id", default="uoft-cs/cifar10", help="public name of the data set")
    parser.add_argument("--seeds", default="0,1", help="seeds, comma-separated")
    parser.add_argument("--arms", default=",".join(ARMS), help="arms to run, comma-separated")
    parser.add_argument("--num_train", type=int, default=20_000, help="images of the fixed training subset")
    parser.add_argument("--image_size", type=int, default=64, help="sides of the images in pixels")
    parser.add_argument("--dense_epochs", type=float, default=5.0, help="epochs of the dense model")
    parser.add_argument("--epochs", type=float, default=7.0, help="epochs of every arm after it")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/cifar10-experiment"), help="where the runs go")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON goes")
    parser.add_argument("--summary_only", action="store_true", help="write the summary of what is there")
    options = parser.parse_args(argv)
    options.results.mkdir(parents=True, exist_ok=True)
    for seed in map(int, options.seeds.split(",")):
        for arm in [] if options.summary_only else (DENSE, *options.arms.split(",")):
            path = options.results / f"{arm}-seed{seed}.json"
            if not path.is_file():
                write_json(path, run_dense(seed, options) if arm == DENSE else run_arm(arm, seed, options))
    write_json(options.results / "summary.json", summary(options.results))
    return 0


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


def flags(options: argparse.Namespace, folder: Path, seed: int, **values: Any) -> list[str]:
    """A command line of one job: what all have in common, and `values`."""
    common = {"dataset": subset(options), "dataset_id": options.dataset_id, "bf16": options.bf16, **TRAINING}
    words = {**common, "seed": seed, "output_dir": folder, "base_model_id": options.base_model_id, **values}
    return [*(f"--{name}={value}" for name, value in words.items()), "--resume"]


def run_dense(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The seed's dense model: fine-tuned at the experiment's size."""
    folder = options.work_dir / f"seed{seed}" / DENSE
    words = {"model": options.model, "image_size": options.image_size, "epochs": options.dense_epochs}
    transfer_job(parse_job(TransferSettings, flags(options, folder, seed, **words)))
    record = read_json(folder / RECORDS["transfer"])
    return {**start(DENSE, seed, options, folder / "model"), "training": brief(record["training"])}


def run_arm(arm: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One arm: what it removes, its training, and which test images it then gets right."""
    folder, dense = options.work_dir / f"seed{seed}" / arm, options.work_dir / f"seed{seed}" / DENSE / "model"
    values = dict(ARMS[arm])
    if values.pop("dense", False):
        words = {"model": dense, "epochs": options.epochs}
        transfer_job(parse_job(TransferSettings, flags(options, folder, seed, **words)))
        record = read_json(folder / RECORDS["transfer"])
        return {**start(arm, seed, options, folder / "model"), "training": brief(record["training"])}
    if values.get("criterion") is None and arm != SEARCH:
        values["layers"] = ",".join(map(str, layers_of(values.get("layers"), seed, options)))
    else:
        values["num_removed"] = NUM_REMOVED
    words = {"model": dense, "epochs": options.epochs, "stages": "prepare,select,dilute,fold", **values}
    run_job(parse_settings(flags(options, folder, seed, **words)))
    selection, dilution = read_json(folder / RECORDS["select"]), read_json(folder / RECORDS["dilute"])
    masked = load_classifier(dense)
    with masked.masked_attention(selection["layers"]):
        untrained = correct(masked, dense, options)
    names = ("schedule", "decay", "feature_compensation", "distillation")
    return {
        **start(arm, seed, options, folder / "model"),
        "layers": selection["layers"],
        "calibration": selection["calibration"],
        "training": {**{name: dilution[name] for name in names}, **brief(dilution)},
        "masked_untrained_top1": untrained.mean(),
    }


def layers_of(kind: str | int | None, seed: int, options: argparse.Namespace) -> list[int]:
    """The set an arm removes: NOSE's, the first N, or the random set of a number, none of which is NOSE's."""
    nose = read_json(options.results / f"{SEARCH}-seed{seed}.json")["layers"]
    if kind is None:
        return nose
    if kind == "first":
        return list(range(NUM_REMOVED))
    known = [tuple(sorted(nose)), tuple(range(NUM_REMOVED))]
    draws = random_sets(list(range(12)), NUM_REMOVED, NUM_RANDOM + len(known), seed)
    return list([draw for draw in draws if draw not in known][int(kind)])


def start(arm: str, seed: int, options: argparse.Namespace, model: Path) -> dict[str, Any]:
    """What every record begins with: whose it is, and what the model in the folder `model` can do at what cost."""
    loaded = load_classifier(model)
    hits = correct(loaded, model, options)
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
        "hardware": hardware(),
    }


@torch.no_grad()
def correct(model: torch.nn.Module, folder: Path, options: argparse.Namespace) -> np.ndarray:
    """Which test images `model` gets right, in float32, with the image processor of `folder`: booleans (images,)."""
    data = load_image_data(str(subset(options)), evaluation_only=True)
    images = ImageDataset(data.evaluation, load_processor(folder), data.image_column, data.label_column)
    hits = [
        model(batch["pixel_values"]).logits.argmax(-1) == batch["labels"]
        for batch in ImageBatches(images, TRAINING["eval_batch_size"])
    ]
    return torch.cat(hits).numpy()


def brief(training: dict[str, Any]) -> dict[str, Any]:
    """A training without its log."""
    return {name: training[name] for name in ("steps", "seconds", "resumed_from", "threads")}


def summary(results: Path) -> dict[str, Any]:
    """
    Per arm the top-1 of every seed, and its gap to the dense model trained as long, to removal in one shot, and to the
    mean of the random sets: paired by image, in points, with a 95 % interval.
    """
    records = {path.stem: read_json(path) for path in sorted(results.glob("*-seed*.json"))}
    seeds = sorted({record["seed"] for record in records.values()})
    hits = {name: unpacked(record) for name, record in records.items()}

    def mean_hits(arms: list[str]) -> np.ndarray | None:
        """Hits of every image, averaged over `arms`, the seeds in a row; `None` where a run is missing."""
        if not all(f"{arm}-seed{seed}" in hits for arm in arms for seed in seeds):
            return None
        return np.concatenate([np.mean([hits[f"{arm}-seed{seed}"] for arm in arms], axis=0) for seed in seeds])

    randoms = [arm for arm in ARMS if arm.startswith("random")]
    rivals = {"dense_trained_on": [CONTROL], "one_shot": [SEARCH], "random": randoms}
    whole = [arm for arm in (DENSE, *ARMS) if mean_hits([arm]) is not None]
    table: dict[str, Any] = {}
    for arm in whole:
        found = [records[f"{arm}-seed{seed}"] for seed in seeds]
        gaps: dict[str, Callable[[], Any]] = {
            name: partial(paired_gap, mean_hits([arm]), mean_hits(rival)) for name, rival in rivals.items()
        }
        table[arm] = {
            "top1": [100 * record["top1"] for record in found],
            "top1_mean": 100 * float(np.mean([record["top1"] for record in found])),
            "layers": [record.get("layers") for record in found],
            "masked_untrained_top1": [100 * record.get("masked_untrained_top1", record["top1"]) for record in found],
            "parameters": found[0]["parameters"],
            "macs": found[0]["macs"],
            "gap": {name: gap() for name, gap in gaps.items()},
        }
    first = next(iter(records.values()))
    return {
        "seeds": seeds,
        "arms": table,
        "random_top1_mean": None if mean_hits(randoms) is None else 100 * float(np.mean(mean_hits(randoms))),
        **{name: first[name] for name in ("model", "dataset", "num_train", "num_images", "image_size", "bf16")},
    }


def unpacked(record: dict[str, Any]) -> np.ndarray:
    """Which test images a record says were right, as 0.0 and 1.0 (images,)."""
    packed = np.frombuffer(bytes.fromhex(record["correct"]), dtype=np.uint8)
    return np.unpackbits(packed, count=record["num_images"]).astype(float)


def paired_gap(ours: np.ndarray | None, theirs: np.ndarray | None) -> dict[str, float] | None:
    """The mean difference in points, with the 95 % interval of the differences image by image (normal)."""
    if ours is None or theirs is None:
        return None
    differences = 100 * (ours - theirs)
    mean, error = float(differences.mean()), float(differences.std(ddof=1) / np.sqrt(len(differences)))
    return {"points": mean, "low": mean - 1.96 * error, "high": mean + 1.96 * error}


if __name__ == "__main__":
    sys.exit(main())
