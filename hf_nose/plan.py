"""What a run starts from and what it will remove: both known, and refused, before anything is trained."""

from __future__ import annotations

import json
import math
from importlib import resources
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, ViTConfig
from transformers.image_processing_backends import PilBackend

from .configuration_nose_vit import NoseViTConfig
from .conversion_nose_vit import unsupported
from .distillation import check_blocks, check_pair
from .images import digits_processor, load_processor
from .modeling_nose_vit import NoseViTForImageClassification
from .options import Options
from .settings import Settings
from .weights import load_classifier


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
        # A dry run shows what a recipe costs on a model of its shape.
        if not settings.dense_steps and not settings.dry_run:
            raise ValueError("A model from a configuration has random weights: set dense_steps to train it first.")
        return NoseViTForImageClassification(config), processor
    if count is not None and not has_head(settings.model):
        depth["num_labels"] = count
        check_head(settings, "no head", count)
    # Weights of half precision would be trained without loss scaling.
    model = load_classifier(settings.model, **depth).float()
    if "num_labels" in depth:
        name_classes(model.config, class_names or [])
    elif count is not None and count != model.num_labels:
        model = new_head(model, settings, class_names or [])
    return model, load_processor(settings.model)


def has_head(model: str) -> bool:
    """Whether the configuration of a checkpoint says that it is a classifier."""
    names = PreTrainedConfig.get_config_dict(model)[0].get("architectures") or []
    return not names or any(name.endswith("ForImageClassification") for name in names)


def stochastic_depth(settings: Options) -> dict[str, Any]:
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
    check_head(settings, f"{model.num_labels} classes", len(class_names))
    depth = stochastic_depth(settings)
    model = NoseViTForImageClassification.from_vit(model, num_labels=len(class_names), **depth)
    name_classes(model.config, class_names)
    return model


def check_head(settings: Settings, has: str, count: int) -> None:
    """`ValueError` where a new head, needed because of what the model has, would not be trained."""
    if not settings.dense_steps:
        raise ValueError(
            f"The model has {has}, the data set {count}: the new head has random weights. Set dense_steps to train it "
            "first."
        )


def other_names(config: NoseViTConfig, class_names: list[str] | None) -> str | None:
    """A note where the model calls its classes otherwise than the data set does; as many of them have the same ids."""
    if class_names is None:
        return None
    names: dict[Any, str] = dict(config.id2label or {})
    for label, name in enumerate(class_names):
        known = names.get(label)
        # A model that was given no names calls them LABEL_0, ...
        if known is not None and known not in (name, f"LABEL_{label}"):
            return f"Class {label} is {known!r} to the model, {name!r} in the data set: its head and names are kept."
    return None


def check_plan(settings: Settings, config: NoseViTConfig) -> None:
    """`ValueError` where what is planned for later stages cannot be, before anything is trained for them."""
    _, count = planned_layers(settings, config)
    kept = config.num_hidden_layers - len(config.removed_attention_layers)
    if "evaluate" in settings.stage_list and settings.random_controls > math.comb(kept, count):
        raise ValueError(
            f"random_controls must be at most {math.comb(kept, count)}, the sets of {count} among {kept} layers, got "
            f"{settings.random_controls}."
        )
    settings.check_decay(count)


def name_classes(config: NoseViTConfig, class_names: list[str]) -> None:
    """Writes the names of the classes into a configuration."""
    config.id2label = dict(enumerate(class_names))
    config.label2id = {name: index for index, name in enumerate(class_names)}


def check_teacher(settings: Settings, config: NoseViTConfig, processor: PilBackend) -> None:
    """`ValueError` where the settings' teacher cannot teach a model of `config` on images from `processor`."""
    options = distillation_options(settings)
    check_blocks(options["features"], options["blocks"], config)
    if settings.has_own_teacher:
        return
    teacher = AutoConfig.from_pretrained(str(settings.teacher))
    if teacher.model_type not in ("vit", "nose_vit"):
        raise ValueError(f"teacher {settings.teacher}: {unsupported(teacher.model_type)}")
    check_pair(NoseViTConfig.from_vit(teacher), config, settings.distillation_features)
    expected = load_processor(str(settings.teacher))
    for name in ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"):
        values = [getattr(each, name) for each in (expected, processor)]
        if values[0] != values[1]:
            raise ValueError(
                f"teacher {settings.teacher} expects pixels with {name} {values[0]}, but would see the model's, with "
                f"{values[1]}. Train the teacher on such images, or start from a model with its processor."
            )


def distillation_options(settings: Settings) -> dict[str, Any]:
    """The options of the [`Distiller`] that the settings ask for."""
    blocks = settings.distillation_blocks
    return {
        "weight": settings.distillation_weight,
        "temperature": settings.distillation_temperature,
        "features": settings.distillation_features,
        "blocks": [] if blocks is None else parse_layers(blocks, "distillation_blocks"),
        "feature_weight": settings.distillation_feature_weight,
    }


def parse_layers(text: str, name: str = "layers") -> list[int]:
    """`"0,1,3"` as a list; `ValueError` naming the setting for anything else."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{name} must be indices such as 0,1,3,4,6, got {text!r}.") from error


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
