"""Folders as `hf-nose export` leaves them: a tiny NoseViT with its code, its image processor and a card."""

import json
import shutil
from pathlib import Path

import torch
from transformers import ViTConfig

from hf_nose import NoseViTConfig, NoseViTForImageClassification, fold
from hf_nose.images import digits_processor


PACKAGE = Path(__file__).resolve().parents[1] / "hf_nose"
AUTO_MAP = {
    "AutoConfig": "configuration_nose_vit.NoseViTConfig",
    "AutoModel": "modeling_nose_vit.NoseViTModel",
    "AutoModelForImageClassification": "modeling_nose_vit.NoseViTForImageClassification",
    "AutoBackbone": "backbone_nose_vit.NoseViTBackbone",
}
CARD = """---
license: apache-2.0
base_model: facebook/deit-tiny-patch16-224
tags:
- mine
---
# A card of my own

It stays as it is: {{ config }}, {% raw %}.
"""


def tiny_nose_vit(kind: str) -> NoseViTForImageClassification:
    """`dense`, `diluted` (half way, M = 0.37) or `folded`; random weights, all of them, biases too."""
    torch.manual_seed({"dense": 0, "diluted": 1, "folded": 2}[kind])
    sizes = {"hidden_size": 12, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24}
    config = ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=10, initializer_range=0.3)
    model = NoseViTForImageClassification(NoseViTConfig.from_vit(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if kind != "dense":
        model.dilute([0, 2])
        model.set_mask(0.37 if kind == "diluted" else 0.0)
    return fold(model) if kind == "folded" else model


def exported(folder: Path, model: NoseViTForImageClassification) -> Path:
    """The folder of a model that loads without hf_nose."""
    model.save_pretrained(folder)
    digits_processor().save_pretrained(folder)
    for path in PACKAGE.glob("*_nose_vit.py"):
        shutil.copyfile(path, folder / path.name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": AUTO_MAP}))
    (folder / "README.md").write_text(CARD)
    (folder / "figures").mkdir(exist_ok=True)
    (folder / "figures" / "trajectory.png").write_bytes(b"\x89PNG not quite")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below the folder."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
