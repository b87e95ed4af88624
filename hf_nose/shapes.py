"""What a checkpoint's weights are called and what shape they have, read before any of them is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .configuration_nose_vit import NoseViTConfig
from .modeling_nose_vit import NoseViTForImageClassification


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Shapes = dict[str, tuple[int, ...]]


def read_shapes(folder: Path) -> Shapes:
    """
    The shape of every tensor in a folder's safetensors, from the headers of the files alone.

    Raises:
        `ValueError`: where there are none, a header is corrupt, or the index names a file outside the folder.
    """
    names = shard_names(folder / INDEX) if (folder / INDEX).is_file() else [WEIGHTS]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} holds no {missing[0]}: only safetensors are read, never pickled weights.")
    shapes: Shapes = {}
    for name in names:
        try:
            with safe_open(folder / name, framework="pt") as tensors:
                shapes |= {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"The weights {folder / name} are corrupt or truncated: {error}.") from error
    return shapes


def shard_names(index: Path) -> list[str]:
    """The files that an index names, each a plain name; `ValueError` otherwise."""
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of weights: expected a weight_map of file names.") from error
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} names {name!r}; a shard is a .safetensors file in the same folder.")
    return names


def check_shapes(found: Mapping[str, tuple[int, ...]], config: NoseViTConfig, name: str) -> None:
    """
    Compares what the headers of `name` say with the classifier that its `config` describes; nothing is allocated.

    Raises:
        `ValueError`: naming the first keys that are missing, that have no place, or that have another shape.
    """
    with torch.device("meta"):
        model = NoseViTForImageClassification(config)
    wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    missing, unexpected = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    other = [
        f"{key} {found[key]} for {wanted[key]}" for key in sorted(wanted) if found.get(key, wanted[key]) != wanted[key]
    ]
    if missing or unexpected or other:
        raise ValueError(
            f"The weights of {name} do not fit its config.json: {len(missing)} missing {missing[:3]}, "
            f"{len(unexpected)} without a place {unexpected[:3]}, {len(other)} of another shape {other[:3]}. "
            "Expected are those of a NoseViTForImageClassification; nothing was loaded."
        )
