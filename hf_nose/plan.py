"""What a run starts from and what it will remove: both known, and refused, before anything is trained."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import ViTConfig

from .configuration_nose_vit import NoseViTConfig
from .images import digits_processor, load_processor
from .modeling_nose_vit import NoseViTForImageClassification
from .settings import Settings


EMBEDDED_MODEL = "digits-vit"


def dense_model(settings: Settings, class_names: list[str] | None) -> tuple[NoseViTForImageClassification, Any]:
    """The model that selection starts from, with its image processor."""
    count = None if class_names is None else len(class_names)
    depth = stochastic_depth(settings)
    if is_scratch(settings.model):
        is_embedded = settings.model == EMBEDDED_MODEL
        path = resources.files("hf_nose") / "assets" / "digits-vit.json" if is_embedded else Path(settings.model)
        values = read_model_config(Path(str(path)))
        if count is not None:
            values["id2label"] = dict(enumerate(class_names or []))
            values["label2id"] = {name: index for index, name in enumerate(class_names or [])}
        config = NoseViTConfig.from_vit(ViTConfig(**values), **depth)
        processor = digits_processor() if is_embedded else load_processor(Path(settings.model).parent)
        if not settings.dense_steps and not settings.dry_run:
            raise ValueError("A model from a configuration has random weights: set dense_steps to train it first.")
        return NoseViTForImageClassification(config), processor
    try:
        model = NoseViTForImageClassification.from_vit(settings.model, **depth)
        if count is not None and count != model.num_labels:
            model = new_head(model, settings, class_names or [])
    except SafetensorError as error:
        raise ValueError(f"The weights of {settings.model} are corrupt or truncated: {error}.") from error
    return model, load_processor(settings.model)


def stochastic_depth(settings: Settings) -> dict[str, Any]:
    """Its fields of the model's configuration."""
    return {name: getattr(settings, name) for name in ("drop_path_rate", "drop_path_schedule")}


def read_model_config(path: Path) -> dict[str, Any]:
    """The values of a ViT's config.json; `ValueError` naming the file where it holds something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(values, dict) or values.get("model_type") != "vit":
        raise ValueError(f"{path} is not the configuration of a ViT: it must be a JSON object with model_type 'vit'.")
    return values


def is_scratch(model: str) -> bool:
    """Whether the model is a configuration to be trained from random weights."""
    return model == EMBEDDED_MODEL or model.endswith(".json")


def new_head(
    model: NoseViTForImageClassification, settings: Settings, class_names: list[str]
) -> NoseViTForImageClassification:
    """The model with a new head for the data set's classes, which has to be trained."""
    if not settings.dense_steps and not settings.dry_run:
        raise ValueError(
            f"The model has {model.num_labels} classes, the data set {len(class_names)}: the new head has "
            "random weights. Set dense_steps to train it first."
        )
    depth = stochastic_depth(settings)
    model = NoseViTForImageClassification.from_vit(model, num_labels=len(class_names), **depth)
    model.config.id2label = dict(enumerate(class_names))
    model.config.label2id = {name: index for index, name in enumerate(class_names)}
    return model


def parse_layers(text: str) -> list[int]:
    """`"0,1,3"` as a list; `ValueError` for anything else."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"layers must be indices such as 0,1,3,4,6, got {text!r}.") from error


def planned_layers(settings: Settings, config: NoseViTConfig) -> tuple[list[int] | None, int]:
    """The layers to remove (`None` where they are to be searched) and how many; an error where they cannot go."""
    if settings.layers is not None:
        layers = sorted(parse_layers(settings.layers))
        NoseViTConfig.from_vit(config, diluted_attention_layers=layers)
        return layers, len(layers)
    count, kept = num_layers(settings, config), config.num_hidden_layers - len(config.removed_attention_layers)
    if count >= kept:
        raise ValueError(
            f"num_removed must be in [1, {kept - 1}], got {count}: {kept} layers have attention, and without any the "
            "class token sees no patch."
        )
    return None, count


def num_layers(settings: Settings, config: NoseViTConfig) -> int:
    """N: as given, or round(ratio x blocks)."""
    if settings.ratio is not None:
        count = round(settings.ratio * config.num_hidden_layers)
        if count == 0:
            raise ValueError(f"ratio {settings.ratio} of {config.num_hidden_layers} blocks rounds to no layer.")
        return count
    if settings.num_removed is None:
        raise ValueError("Say how much to remove: num_removed, ratio or layers.")
    return settings.num_removed
