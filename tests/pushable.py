"""Folders as `hf-nose export` leaves them, of a tiny NoseViT, with a figure and a card of one's own."""

from pathlib import Path

import torch
from PIL import Image
from transformers import ViTConfig

from hf_nose import NoseViTConfig, NoseViTForImageClassification, fold
from hf_nose.export import export_folder
from hf_nose.images import digits_processor


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
    """The folder of a model that loads without hf_nose; the model as it was saved stands beside it."""
    source = folder.with_name(f"{folder.name}-source")
    model.save_pretrained(source)
    digits_processor().save_pretrained(source)
    (source / "figures").mkdir()
    Image.new("RGB", (8, 8)).save(source / "figures" / "trajectory.png")
    export_folder(source, folder)
    (folder / "README.md").write_text(CARD)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below the folder."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
