"""Runs of the main job on the digits that take seconds: a few steps of a small model, in this process."""

import json
from pathlib import Path

import pytest

from hf_nose.command_line import parse_settings
from hf_nose.context import RunContext
from hf_nose.images import digits_processor
from hf_nose.run import rerun_stage, run_job


NUM_BLOCKS = 4
CONFIG = {
    "model_type": "vit",
    "hidden_size": 12,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
    "initializer_range": 0.1,
}
TINY = {
    "recipe": "digits",
    "device": "cpu",
    "dense_steps": 4,
    "steps": 8,
    "num_removed": 2,
    "max_train_samples": 48,
    "max_eval_samples": 20,
    "num_calibration": 24,
    "calibration_batch_size": 8,
    "batch_size": 8,
    "eval_batch_size": 8,
    "save_steps": 4,
    "eval_steps": 4,
    "logging_steps": 2,
    "throughput_batch_size": 4,
    "throughput_rounds": 2,
    "random_controls": 2,
}


def tiny_model(folder: Path) -> Path:
    """A configuration to train from scratch, with the image processor beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    digits_processor().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder / "config.json"


def flags(folder: Path, *switches: str, **values: object) -> list[str]:
    """A command line: `TINY` with `values` instead, `None` taking a flag away, and `switches` behind."""
    values = {"output_dir": folder, **TINY, **values}
    if "model" not in values:
        values["model"] = tiny_model(folder.parent / "tiny-model")
    return [f"--{name}={value}" for name, value in values.items() if value is not None] + list(switches)


def run(folder: Path, *switches: str, **values: object) -> RunContext:
    """The main job."""
    return run_job(parse_settings(flags(folder, *switches, **values)))


def resume(folder: Path, *arguments: str) -> RunContext:
    """The main job continued, as typed by somebody who does not repeat the settings."""
    return run_job(parse_settings(["--resume", f"--output_dir={folder}", *arguments]))


def rerun(folder: Path, stage: str, *arguments: str) -> RunContext:
    """One stage of an existing run anew."""
    base = folder / "settings.yaml"
    return rerun_stage(parse_settings([f"--output_dir={folder}", *arguments], base=base), stage)


MADE: list[Path] = []


def finished_run(factory: pytest.TempPathFactory) -> Path:
    """The folder of a run through all stages, made once for all tests, which copy it or only read."""
    if not MADE:
        folder = factory.mktemp("runs") / "finished"
        run(folder)
        MADE.append(folder)
    return MADE[0]


def record(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def files(folder: Path) -> dict[str, bytes]:
    """Every file below the folder with its content, but the lock."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name != ".lock"}
