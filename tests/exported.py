"""Tiny checkpoints to export, in the states that a NoseViT can be in."""

import json
from pathlib import Path

from reference_vit import nose
from run_records import records, write_run
from transformers import ViTImageProcessorPil

from hf_nose.modeling_nose_vit import NoseViTForImageClassification
from hf_nose.surgery import fold


KINDS = ("dense", "half-diluted", "folded")
LAYERS = [1, 3, 4]


def made(kind: str) -> NoseViTForImageClassification:
    """A model of six blocks: dense, diluted at M = 0.37, or folded."""
    model = nose()
    if kind == "dense":
        return model
    model.dilute(LAYERS)
    model.set_mask(0.37 if kind == "half-diluted" else 0.0)
    return fold(model) if kind == "folded" else model


def processor() -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.4] * 3, image_std=[0.25] * 3)


def save(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


def checkpoint(folder: Path, kind: str = "folded") -> Path:
    """The folder of a checkpoint."""
    return save(made(kind), folder)


def made_run(folder: Path, **changes) -> Path:
    """The folder of a run with a folded model, a figure, and records in which `changes` replace parts of prepare."""
    content = records()
    for part, fields in changes.items():
        content["prepare"][part] |= fields
    write_run(folder, content)
    checkpoint(folder / "model")
    (folder / "figures").mkdir()
    (folder / "figures" / "trajectory.png").write_bytes(b"\x89PNG made")
    (folder / "settings.yaml").write_text("dataset: /home/someone/images\n")
    return folder


def change_json(path: Path, **fields) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
