"""LoRA through peft: small matrices are trained beside frozen ones, carry M with them, and are merged at the end."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from torch import nn
from transformers.utils import cached_file

from .files import read_json, write_json
from .modeling_nose_vit import NoseViTForImageClassification, nose_vit
from .options import TrainingOptions


STATE = "dilution_state.json"


class NosePeftModel(PeftModel):
    """
    A [`~peft.PeftModel`] of a NoseViT. Peft saves no buffers and nothing of the model's configuration, so an adapter
    of a diluted model would come back around another function. This one writes the diluted layers and M beside the
    adapter and takes them back, in `from_pretrained` as in the Trainer's resume:

        model = NoseViTForImageClassification.from_pretrained("runs/me/dense")
        model = NosePeftModel.from_pretrained(model, "runs/me/training/dilution/checkpoint-500")
    """

    def save_pretrained(self, save_directory: str, is_main_process: bool = True, **kwargs: Any) -> None:  # type: ignore[override]
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            write_json(Path(save_directory) / STATE, self._dilution_state())

    def load_adapter(self, model_id: str | os.PathLike, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """
        As peft's, with the diluted layers and M that were saved with the adapter. Raises `ValueError` where the model
        is diluted in other layers, `OSError` where the adapter has no such file because plain peft wrote it.
        """
        hub = {name: kwargs[name] for name in ("revision", "subfolder", "token", "cache_dir") if name in kwargs}
        saved = read_json(str(cached_file(model_id, STATE, **hub)))
        wanted, found = ({name: state[name] for name in LAYERS} for state in (saved, self._dilution_state()))
        if found != wanted and any(found.values()):
            raise ValueError(f"The adapter belongs to a model with {wanted}, this one has {found}.")
        result = super().load_adapter(model_id, adapter_name, *args, **kwargs)
        vit = nose_vit(self)
        if found != wanted:
            compensated = set(wanted["compensated"])
            for layers in (compensated, set(wanted["diluted"]) - compensated):
                vit.dilute(sorted(layers), feature_compensation=layers is compensated)
        vit.set_mask(saved["mask"])
        return result

    def create_or_update_model_card(self, output_dir: str) -> None:
        """None: peft's is an empty form with the path of the model on this machine."""

    def _dilution_state(self) -> dict[str, Any]:
        vit = nose_vit(self)
        diluted = list(vit.config.diluted_attention_layers)
        compensated = [layer for layer in diluted if layer in vit.config.compensated_attention_layers]
        return {"diluted": diluted, "compensated": compensated, "mask": vit.mask_values()}


LAYERS = ("diluted", "compensated")


def add_lora(
    model: NoseViTForImageClassification, rank: int, alpha: int, dropout: float, targets: Sequence[str]
) -> NosePeftModel:
    """
    Freezes `model` and puts LoRA matrices beside those of its matrices that `targets` names. The head is trained
    whole.

    Args:
        model ([`NoseViTForImageClassification`]): dense, diluted or compressed; changed in place.
        rank (`int`): rank of the update, at least 1.
        alpha (`int`): the update is scaled by alpha / rank.
        dropout (`float`): dropout in front of the matrices, in [0, 1).
        targets (`Sequence[str]`): names of matrices in the blocks, such as `q_proj` or `fc1`.

    Raises:
        `ValueError`: naming the targets that match nothing, and what there is.
    """
    blocks = nose_vit(model).layers
    names = {name.rpartition(".")[2] for name, module in blocks.named_modules() if isinstance(module, nn.Linear)}
    unknown = [target for target in targets if target not in names]
    if unknown or not targets:
        raise ValueError(f"lora_targets must be among {', '.join(sorted(names))}, got {','.join(targets)!r}.")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(targets),
        modules_to_save=["classifier"],
        # Empty instead of a path of this machine.
        base_model_name_or_path="",
    )
    return NosePeftModel(model, config)


def lora_of(model: NoseViTForImageClassification, settings: TrainingOptions) -> NosePeftModel:
    """[`add_lora`] as the settings say."""
    return add_lora(model, settings.lora_rank, settings.lora_alpha, settings.lora_dropout, settings.lora_target_list)


def merge_lora(model: NosePeftModel) -> NoseViTForImageClassification:
    """The ordinary model, all of it trainable, with the LoRA updates added to its weights. `ValueError` on NaN."""
    merged: NoseViTForImageClassification = model.merge_and_unload(safe_merge=True)
    return merged.requires_grad_(True)
