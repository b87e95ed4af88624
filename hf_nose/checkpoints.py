"""Whole checkpoints: written beside their place, hashed, moved into it, and checked before they are resumed."""

import os
import shutil
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .files import read_json
from .manifests import MANIFEST_NAME, manifest_error, write_manifest


logger = logging.get_logger(__name__)

STAGING = ".staging"
PREFIX = "checkpoint-"


def stage(folder: Path) -> Path:
    """An empty staging folder inside `folder`; what a killed save left there is dropped."""
    staging = folder / STAGING
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    return staging


def publish(folder: Path, step: int, **record: Any) -> Path:
    """Hashes the staged checkpoint of `step` (with `record` in its manifest) and moves it into place in one step."""
    staged, final = folder / STAGING / f"{PREFIX}{step}", folder / f"{PREFIX}{step}"
    write_manifest(staged, step=step, **record)
    if final.exists():
        # Written by a run that was resumed from an earlier step, so it is this one's equal or damaged.
        shutil.rmtree(final)
    os.replace(staged, final)
    (folder / STAGING).rmdir()
    return final


def steps_from_last(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, from the highest step down."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)), reverse=True)


def latest_whole_checkpoint(folder: Path) -> Path | None:
    """
    The highest checkpoint in `folder` whose files are all there and unchanged, `None` without one. Damaged ones are
    passed over, with a warning that names the file.
    """
    for checkpoint in steps_from_last(folder):
        error = manifest_error(checkpoint)
        if error is None:
            return checkpoint
        logger.warning(f"Passing over {checkpoint.name}: {error}")
    return None


def checkpoint_record(checkpoint: Path) -> dict[str, Any]:
    """What was recorded in the manifest of `checkpoint`."""
    return read_json(checkpoint / MANIFEST_NAME)


def check_resume(checkpoint: Path, world_size: int, threads: int) -> None:
    """Warns where `checkpoint` was trained with other threads; `ValueError` where by other processes or GPUs."""
    record = checkpoint_record(checkpoint)
    if record["world_size"] != world_size:
        raise ValueError(
            f"Training ran on {record['world_size']} processes or GPUs and cannot go on with {world_size}: a step "
            "would take other images, and an epoch other steps. Resume with as many, or start anew with --overwrite."
        )
    if record["threads"] != threads:
        logger.warning(
            f"Resuming with threads = {threads} what ran with {record['threads']}: some bits of the result differ."
        )
