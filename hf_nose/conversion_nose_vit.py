"""From a dense ViT's weights to a NoseViT's: load, check both key sets, copy.

This file travels to the Hub beside the weights: it imports nothing but torch, transformers and its neighbours.
"""

from typing import Any, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel, ViTConfig, ViTForImageClassification, ViTModel

from .configuration_nose_vit import NoseViTConfig


def convert_vit(
    cls: type[PreTrainedModel],
    model_or_id: PreTrainedModel | str,
    removed_attention_layers: list[int],
    feature_compensation: bool,
    force: bool,
    num_labels: int | None,
    **config_fields,
) -> PreTrainedModel:
    """The work of [`NoseViTPreTrainedModel.from_vit`], where the arguments are described."""
    removed = removed_attention_layers
    if removed and feature_compensation and not force:
        raise ValueError(
            "feature_compensation=True doubles the stream at every removed layer, which weights that were never "
            "diluted do not survive (chance level). Dilute first, or pass force=True."
        )
    source = model_or_id if isinstance(model_or_id, PreTrainedModel) else load_vit(cls, str(model_or_id), num_labels)
    if source.config.model_type not in ("vit", "nose_vit"):
        raise ValueError(unsupported(source.config.model_type))
    state = base_names(source)
    has_pooler = "pooler.dense.weight" in state and cls.__name__ == "NoseViTModel"
    fields = {**config_fields, **layer_fields(source.config, removed, removed if feature_compensation else [])}
    old_labels = source.config.num_labels if "classifier.weight" in state else None
    if num_labels is not None and num_labels != old_labels:
        fields["num_labels"] = num_labels
    # Built in the source's dtype, not cast to it: M stays in float32.
    config = NoseViTConfig.from_vit(cast(ViTConfig, source.config), use_pooler=has_pooler, **fields)
    model = cls._from_config(config, dtype=source.dtype)
    own = base_names(model)
    # What may differ: the attention taken out, a pooler or head this class has no place for, a head asked to be new.
    gone = [f"layers.{layer}.{part}." for layer in removed for part in ("attention", "layernorm_before")]
    gone += [] if has_pooler else ["pooler."]
    is_new_head = "num_labels" in fields
    if is_new_head or "classifier.weight" not in own:
        gone.append("classifier.")
    new = ("classifier.",) if is_new_head else ()
    wanted = {name for name in own if not name.startswith(new)} if new else set(own)
    given = {name for name in state if not name.startswith(tuple(gone))} if gone else set(state)
    if wanted != given:
        raise ValueError(
            f"The weights do not fit: missing {sorted(wanted - given)[:4]}, unexpected {sorted(given - wanted)[:4]}. "
            "Pass num_labels=... for a new head; " + unsupported(source.config.model_type)
        )
    with torch.no_grad():
        for name in wanted:
            own[name].copy_(state[name])
    # Copying went past `load_state_dict`, whose hook sets whether diluted attention is computed.
    model.set_mask(state["dilution_mask"].tolist() if "dilution_mask" in state else 1.0)
    return model.train(source.training)


def load_vit(cls: type[PreTrainedModel], name: str, num_labels: int | None) -> PreTrainedModel:
    """
    Loads a stock ViT, or a NoseViT, by Hub id or folder. Stock classes do it because renaming old keys is bound to
    their names. Raises `ValueError` where the checkpoint is something else or leaves weights to chance.
    """
    model_type = PreTrainedConfig.get_config_dict(name)[0].get("model_type")
    if model_type not in ("vit", "nose_vit"):
        raise ValueError(unsupported(model_type))
    loader: type[PreTrainedModel] = cls
    if model_type == "vit":
        loader = ViTForImageClassification if cls.__name__.endswith("ForImageClassification") else ViTModel
    loaded: Any = loader.from_pretrained(name, output_loading_info=True)
    model, info = loaded
    chance = set(info["missing_keys"])
    if isinstance(model, ViTModel):
        if any(key.startswith("pooler.") for key in chance):
            model.pooler = None
        chance = {key for key in chance if not key.startswith("pooler.")}
    if num_labels is not None and chance == {"classifier.weight", "classifier.bias"}:
        model.classifier = torch.nn.Identity()
        chance = set()
    # A head or pooler that this class has no place for is left behind; anything else unknown would be lost in silence.
    left = (f"{model.base_model_prefix}.pooler.", "pooler.", "classifier.")
    unknown = {key for key in info["unexpected_keys"] if not key.startswith(left)}
    if chance or unknown or info["mismatched_keys"]:
        raise ValueError(
            f"{name} leaves {len(chance)} weights to chance ({sorted(chance)[:4]}), {len(unknown)} have no place "
            f"({sorted(unknown)[:4]}) and {len(info['mismatched_keys'])} have another shape. "
            "Pass num_labels=... for a new head; " + unsupported(model_type)
        )
    return model.eval()


def check_loading(model: PreTrainedModel, info: dict[str, Any]) -> None:
    """
    Refuses a loaded checkpoint whose keys are not those of its configuration: transformers only warns, and leaves the
    weights to chance. A head may be new or left behind, and a pooler too. `info` is what `from_pretrained` told.
    """
    base = f"{model.base_model_prefix}."
    heads = [name for name, _ in model.named_children()] if model.base_model is not model else []
    free = ("classifier.", "pooler.", f"{base}pooler.", *(f"{name}." for name in heads if f"{name}." != base))
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(free))
    unexpected = sorted(key for key in info["unexpected_keys"] if not key.startswith(free))
    if missing or unexpected:
        raise ValueError(
            f"The weights do not fit their configuration: {len(missing)} missing ({missing[:4]}), {len(unexpected)} "
            f"unexpected ({unexpected[:4]}). config.json and the weights come from different checkpoints, or one of "
            "them was changed; removed_attention_layers and diluted_attention_layers must be those of the weights."
        )


def layer_fields(config: PreTrainedConfig, removed: list[int], compensated: list[int]) -> dict[str, list[int]]:
    """The layer lists after removing `removed` from a model of `config`, dense or already compressed."""
    if config.model_type != "nose_vit":
        return {"removed_attention_layers": removed, "compensated_attention_layers": compensated}
    taken = {*config.removed_attention_layers, *config.diluted_attention_layers} & set(removed)
    if taken:
        raise ValueError(
            f"removed_attention_layers {sorted(taken)} are already removed or being diluted; a diluted layer is "
            "removed by set_mask(0.0) and fold."
        )
    return {
        "removed_attention_layers": [*config.removed_attention_layers, *removed],
        "compensated_attention_layers": [*config.compensated_attention_layers, *compensated],
    }


def base_names(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state dict with the base model's keys free of their prefix, so that heads and bare models compare."""
    prefix = f"{model.base_model_prefix}."
    return {name.removeprefix(prefix): tensor for name, tensor in model.state_dict().items()}


def unsupported(model_type: str | None) -> str:
    """What is supported, for errors."""
    return (
        f"model_type is {model_type!r}; supported are pre-norm Vision Transformers saved as 'vit' (ViT and DeiT "
        "without distillation token) or 'nose_vit'."
    )
