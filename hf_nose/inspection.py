"""What a checkpoint says it is, read from its configuration and the headers of its weights: no weight is loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import ViTConfig, ViTForImageClassification

from .configuration_nose_vit import NoseViTConfig
from .modeling_nose_vit import NoseViTForImageClassification, NoseViTModel


INDEX = "model.safetensors.index.json"
MODELS = {model.__name__: model for model in (NoseViTForImageClassification, NoseViTModel)}


def check_weights(folder: str | os.PathLike[str]) -> None:
    """
    Refuses a NoseViT's folder, or a plain ViT's, whose weights are not those of its configuration.

    Raises:
        `ValueError`: naming the keys that are missing, unexpected or of another shape, or the file that is damaged.
        [`~huggingface_hub.errors.StrictDataclassError`]: where the configuration has a wrong type or value.
    """
    folder = Path(folder)
    if json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type") == "vit":
        return check_plain_weights(folder)
    config = NoseViTConfig.from_pretrained(folder)
    name = (config.architectures or [""])[0]
    if name not in MODELS:
        raise ValueError(f"{folder / 'config.json'}: architectures must name one of {list(MODELS)}, got {name!r}.")
    with torch.device("meta"):
        expected = {key: list(value.shape) for key, value in MODELS[name](config).state_dict().items()}
    found = weight_shapes(folder)
    wrong = sorted(key for key in expected.keys() & found.keys() if expected[key] != found[key])
    for what, keys in (
        ("missing", sorted(expected.keys() - found.keys())),
        ("unexpected", sorted(found.keys() - expected.keys())),
        ("of another shape", wrong),
    ):
        if keys:
            raise ValueError(
                f"The weights in {folder} are not those of its config.json: {what} {', '.join(keys[:4])}."
            )


def check_plain_weights(folder: Path) -> None:
    """[`check_weights`] of a plain ViT, whose files name its weights otherwise than its code: by shapes alone."""
    config = ViTConfig.from_pretrained(folder)
    # Refuses sizes before anything is built.
    NoseViTConfig.from_vit(config)
    if config.architectures != [ViTForImageClassification.__name__]:
        raise ValueError(
            f"{folder / 'config.json'}: architectures must be a classifier's, got {config.architectures}."
        )
    with torch.device("meta"):
        expected = [list(value.shape) for value in ViTForImageClassification(config).state_dict().values()]
    found = list(weight_shapes(folder).values())
    if sorted(expected) != sorted(found):
        raise ValueError(f"The weights in {folder} are not those of its config.json: {len(found)}, of other shapes.")


def weight_shapes(folder: Path) -> dict[str, list[int]]:
    """Key to shape of all weights, from the headers; `ValueError` naming the file where it is damaged or not there."""
    names = ["model.safetensors"]
    if (folder / INDEX).is_file():
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    shapes: dict[str, list[int]] = {}
    for name in names:
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise ValueError(f"{folder} lacks its weights: there is no {name} in it.")
        try:
            with safe_open(path, "pt") as weights:
                shapes |= {key: weights.get_slice(key).get_shape() for key in weights.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path} is corrupt or truncated: {error}.") from error
    return shapes
