"""The paper's authors' released checkpoints (.pth, timm's names, removed attention in them) as folded NoseViTs."""

from __future__ import annotations

import argparse
import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, ViTConfig

from .card_records import card_record, model_record
from .card_text import CARD, marked
from .cards import render_card
from .configuration_nose_vit import NoseViTConfig
from .files import whole_folder, write_json, write_text
from .images import load_processor
from .manifests import sha256
from .modeling_nose_vit import NoseViTForImageClassification
from .plan import parse_layers
from .published import BASES, HEAD_SIZE, IMAGENET, checkpoint_name, published_figures
from .remote_code import auto_map, copy_travelling_files
from .shapes import SHAPES
from .surgery import fold


# In the layout that timm gives its ViTs; what stands in a block, and at the ends.
BLOCK_NAMES = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.o_proj",
    "norm2": "layernorm_after",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
OTHER_NAMES = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj.weight": "vit.embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "vit.embeddings.patch_embeddings.projection.bias",
    "norm.weight": "vit.layernorm.weight",
    "norm.bias": "vit.layernorm.bias",
    "head.weight": "classifier.weight",
    "head.bias": "classifier.bias",
}
LAYER_NORM_EPS = 1e-6
SIZES = {"base": "b", "small": "s", "tiny": "t"}


def convert_checkpoint(
    file: Path, output_dir: Path | None = None, layers: str | None = None, base_model: str | None = None
) -> Path:
    """
    Write a released checkpoint as a folded NoseViT with its image processor and a card that says who trained it.

    The file is read by torch's restricted unpickler (`weights_only=True`), which builds tensors and plain containers
    and runs nothing. Removed layers doubled the stream in training, so they are folded.

    Args:
        file (`Path`): such as `base_01346.pth`: the size, and the removed layers in one run of digits.
        output_dir (`Path`, *optional*): the new folder; `deit-b-nose40`, as recipe and card are called, by default.
        layers (`str`, *optional*): the removed layers, such as `0,1,3,4,6`, where the file's name does not tell.
        base_model (`str`, *optional*): where the names of the classes and the image processor come from, a folder or a
            Hub id; DeiT of that size by default, on the Hub.

    Returns:
        `Path`: the folder.

    Raises:
        `ValueError`: where the file is no such checkpoint, its tensors do not fit, or the folder is there already.
    """
    size, removed = named(file.stem) if layers is None else (size_of(file.stem), parse_layers(layers))
    base_id = next(name for name, base in BASES.items() if base.size == SIZES[size])
    state = read_state(file)
    name = checkpoint_name(base_id, len(removed), num_blocks(state))
    folder = Path(name) if output_dir is None else output_dir
    if folder.exists():
        raise ValueError(f"output_dir {folder} is there already: name another, or delete it.")
    source = base_model or base_id
    config = released_config(state, removed, base_id, PreTrainedConfig.get_config_dict(source)[0])
    processor = load_processor(source)
    model = NoseViTForImageClassification(config)
    translated, ignored = renamed(state, removed)
    check_shapes(model, translated)
    model.load_state_dict(translated)
    folded = fold(model.eval())
    source_record = {
        "file": file.name,
        "sha256": sha256(file),
        "removed_attention_layers": folded.config.removed_attention_layers,
        "ignored_tensors": ignored,
    }
    record = card_record(
        folder.resolve().name,
        model_record(folded.config, chosen_by="the set in the file's name"),
        trained_by="authors",
        base_model=base_id,
        base_model_id=base_id,
        dataset=IMAGENET,
        dataset_id=IMAGENET,
        published=published_figures(base_id, IMAGENET, len(removed)),
        source=source_record,
    )
    folded.config.auto_map = auto_map()
    with whole_folder(folder) as staging:
        folded.save_pretrained(staging)
        copy_travelling_files(staging)
        processor.save_pretrained(staging)
        write_json(staging / "conversion.json", source_record)
        write_text(staging / CARD, marked(render_card(record)))
    return folder


def named(stem: str) -> tuple[str, list[int]]:
    """Size and removed layers from a name such as `base_013469`; the layers ascend, so 10 and 11 can be told."""
    size, digits = size_of(stem), re.fullmatch(r"[A-Za-z]+_(\d+)", stem)
    readings = [] if digits is None else ascending(digits.group(1))
    if len(readings) != 1:
        raise ValueError(f"layers cannot be read from the name {stem!r}: give them, such as --layers 0,1,3,4,6.")
    return size, readings[0]


def size_of(stem: str) -> str:
    """`base`, `small` or `tiny`, with which a name begins."""
    size = stem.split("_")[0].lower()
    if size not in SIZES:
        raise ValueError(f"The file's name must begin with one of {', '.join(SIZES)} and _, got {stem!r}.")
    return size


def ascending(digits: str, least: int = 0, last: int = 11) -> list[list[int]]:
    """Every way to read digits as ascending indices up to `last`."""
    if not digits:
        return [[]]
    readings = []
    for length in (1, 2):
        part = digits[:length]
        if len(part) == length and str(int(part)) == part and least <= int(part) <= last:
            readings += [[int(part), *rest] for rest in ascending(digits[length:], int(part) + 1, last)]
    return readings


def read_state(file: Path) -> dict[str, torch.Tensor]:
    """The weights in a .pth, alone or under `model`, as DeiT's training script saves them."""
    try:
        # Such files carry the training's command line; a Namespace holds values and runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{file.name} is no checkpoint of tensors, or damaged; nothing in it was run: {reason}"
        ) from error
    state = content.get("model", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(item, torch.Tensor) for item in state.values()):
        raise ValueError(f"{file.name} must hold tensors by name, alone or under 'model'.")
    missing = [name for name in OTHER_NAMES if name not in state]
    if missing or not num_blocks(state):
        raise ValueError(f"{file.name} is not in timm's layout of a ViT: it lacks {missing or ['blocks.0']}.")
    return dict(state)


def num_blocks(state: Mapping[str, torch.Tensor]) -> int:
    """How many blocks the names tell of."""
    found = {match.group(1) for match in (re.match(r"blocks\.(\d+)\.", name) for name in state) if match}
    return len(found)


def released_config(
    state: Mapping[str, torch.Tensor], removed: list[int], base_id: str, base: Mapping[str, Any]
) -> NoseViTConfig:
    """The configuration of the unfolded model: sizes from the tensors, names of the classes from the base model's."""
    classes, hidden = state["head.weight"].shape
    expected, _ = SHAPES[BASES[base_id].shape]
    if hidden != expected:
        raise ValueError(f"The file's name says {base_id}, of width {expected}; its tensors {hidden}.")
    patch = state["patch_embed.proj.weight"].shape[-1]
    side = math.isqrt(state["pos_embed"].shape[1] - 1)
    labels = base.get("id2label")
    if labels is None or len(labels) != classes:
        raise ValueError(f"base_model must name {classes} classes, got {0 if labels is None else len(labels)}.")
    dense = ViTConfig(
        hidden_size=hidden,
        num_hidden_layers=num_blocks(state),
        num_attention_heads=hidden // HEAD_SIZE,
        intermediate_size=state["blocks.0.mlp.fc1.weight"].shape[0],
        image_size=side * patch,
        patch_size=patch,
        layer_norm_eps=LAYER_NORM_EPS,
        id2label={int(key): name for key, name in labels.items()},
        label2id={name: int(key) for key, name in labels.items()},
    )
    lists = {f"{name}_attention_layers": removed for name in ("removed", "compensated")}
    return NoseViTConfig.from_vit(dense, **lists)


def renamed(state: Mapping[str, torch.Tensor], removed: list[int]) -> tuple[dict[str, torch.Tensor], int]:
    """The tensors under our names, and how many of removed attention were left out."""
    found, ignored = {}, 0
    for name, tensor in state.items():
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name)
        if match is None:
            found[OTHER_NAMES.get(name, name)] = tensor
            continue
        layer, part, kind = int(match.group(1)), match.group(2), match.group(3)
        if layer in removed and part in ("norm1", "attn.qkv", "attn.proj"):
            ignored += 1
            continue
        block = f"vit.layers.{layer}"
        if part == "attn.qkv":
            for letter, piece in zip("qkv", tensor.chunk(3), strict=True):
                found[f"{block}.attention.{letter}_proj.{kind}"] = piece
        else:
            found[f"{block}.{BLOCK_NAMES.get(part, part)}.{kind}"] = tensor
    return found, ignored


def check_shapes(model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Refuses tensors that are missing, unknown or of another shape."""
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    wrong = sorted(
        name for name in {*own, *state} if name not in own or name not in state or own[name] != state[name].shape
    )
    if wrong:
        raise ValueError(f"{len(wrong)} tensors are missing, unknown or of another shape: {wrong[:4]}.")
