"""What a checkpoint is, told by its configuration and the header of its weights: nothing is executed or loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, is_offline_mode, snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import apply_renamings

from .backbone_nose_vit import NoseViTBackbone
from .configuration_nose_vit import NoseViTConfig
from .conversion_nose_vit import unsupported
from .headers import DTYPES, INDEX, MASK, WEIGHTS, Header, local_header, remote_header, summary
from .modeling_nose_vit import NoseViTForImageClassification, NoseViTModel, NoseViTPreTrainedModel
from .profiling import count_macs, count_parameters
from .records import public_name


# The keys of a checkpoint are those of one of these, by the architecture that its configuration names.
CLASSES: dict[str, type[NoseViTPreTrainedModel]] = {
    "NoseViTForImageClassification": NoseViTForImageClassification,
    "NoseViTModel": NoseViTModel,
    "NoseViTBackbone": NoseViTBackbone,
    "ViTForImageClassification": NoseViTForImageClassification,
    "ViTModel": NoseViTModel,
}


def check_weights(folder: Path) -> dict[str, Any]:
    """
    Hold the weights in `folder` against its configuration: every tensor that the model needs is there in the right
    shape, and no other. Only the header is read, and M where layers are diluted; a pooler may be left over.

    Args:
        folder (`Path`): a folder with `config.json` of a `nose_vit` or a `vit`, and safetensors, whole or in shards.

    Returns:
        `dict`: `files` (names), `bytes`, `tensors`, `parameters` (numbers in the file), `dtypes`, and `mask` (the M of
        each diluted layer, in ascending order).

    Raises:
        `ValueError`: where the configuration is refused, the weights are missing, corrupt or truncated, in pickles, or
            not those of the configuration.
    """
    folder = Path(folder)
    config, architecture = read_config(str(folder))
    header = local_header(folder)
    compare(config, architecture, header)
    size = sum((folder / name).stat().st_size for name in {tensor.file for tensor in header.values()})
    return {**summary(header), "bytes": size, "mask": mask_of(config, folder, header)}


def inspect_checkpoint(source: str, revision: str | None = None) -> dict[str, Any]:
    """
    What a checkpoint is. Of one on the Hub only the configuration and the header of the weights are fetched; the
    weights too where M has to be read.

    Args:
        source (`str`): a folder or a Hub id.
        revision (`str`, *optional*): a branch, tag or commit of the Hub id.

    Returns:
        `dict`: sizes, `layers` by the state of their attention, `mask`, `state` in words, `parameters` and `macs` of
        the model and of its `dense_twin`, and `weights`.

    Raises:
        `ValueError`: as [`check_weights`] does.
        `OSError`: where the Hub cannot be reached or does not know the id.
    """
    folder = Path(source)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision belongs to a Hub id, but {folder.name} is a folder: leave it out.")
    elif is_offline_mode():
        wanted = ["config.json", WEIGHTS, INDEX, "model-*.safetensors"]
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=wanted, local_files_only=True))
    if folder.is_dir():
        weights = check_weights(folder)
        config, architecture = read_config(str(folder))
    else:
        config, architecture = read_config(source, revision)
        header = remote_header(source, revision)
        compare(config, architecture, header)
        weights = {**summary(header), "mask": []}
        if config.diluted_attention_layers:
            (key,) = [name for name in header if name.endswith(MASK)]
            path = Path(hf_hub_download(source, header[key].file, revision=revision))
            weights["mask"] = mask_of(config, path.parent, header)
    mask = weights.pop("mask")
    # At M = 0 diluted attention is not computed: it costs what removed attention costs.
    is_zero = bool(mask) and not any(mask)
    gone = [*config.removed_attention_layers, *config.diluted_attention_layers]
    computed = NoseViTConfig.from_vit(config, **layers(removed=gone)) if is_zero else config
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size", "num_labels")
    kept = [layer for layer in range(config.num_hidden_layers) if layer not in gone]
    lists = {name.removesuffix("_attention_layers"): getattr(config, name) for name in layers()}
    return {
        "source": public_name(source),
        "revision": revision,
        "architecture": architecture,
        **{name: getattr(config, name) for name in names},
        "layers": {"kept": kept, **lists},
        "mask": mask,
        "state": state_of(config, mask),
        "parameters": count_parameters(on_meta(config, architecture)),
        "macs": count_macs(computed)["total"],
        "dense_twin": {
            "parameters": count_parameters(on_meta(dense(config), architecture)),
            "macs": count_macs(dense(config))["total"],
        },
        "weights": weights,
        "format_version": config.format_version,
        "hf_nose_version": config.hf_nose_version,
    }


def read_config(source: str, revision: str | None = None) -> tuple[NoseViTConfig, str]:
    """The configuration in a folder or under a Hub id (a `vit`'s as a NoseViT's), and whose keys the weights have."""
    values = config_values(source, revision)
    if values.get("model_type") not in ("vit", "nose_vit"):
        raise ValueError(unsupported(values.get("model_type")))
    try:
        if values["model_type"] == "nose_vit":
            config = NoseViTConfig.from_dict(values)
        else:
            dropped = ("model_type", "architectures", "auto_map", "transformers_version")
            config = NoseViTConfig.from_dict({name: values[name] for name in values if name not in dropped})
    except StrictDataclassError as error:
        raise ValueError(f"config.json is refused: {' '.join(str(error).split())}") from error
    architectures = values.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1 or architectures[0] not in CLASSES:
        raise ValueError(f"architectures must be one of {sorted(CLASSES)} in a list, got {str(architectures)[:80]}.")
    config.use_pooler = config.use_pooler and architectures[0] == "NoseViTModel"
    return config, architectures[0]


def config_values(source: str, revision: str | None) -> dict[str, Any]:
    """What config.json says; `ValueError` where it is missing in a folder, or no JSON object."""
    is_folder = Path(source).is_dir()
    path = (
        Path(source) / "config.json" if is_folder else Path(hf_hub_download(source, "config.json", revision=revision))
    )
    if not path.is_file():
        raise ValueError(f"{path.parent.name} is no checkpoint: it holds no config.json.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"config.json is not JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"config.json must hold an object, got {type(values).__name__}.")
    return values


def compare(config: NoseViTConfig, architecture: str, header: Header) -> None:
    """Refuses tensors that are missing, unexpected, or of a shape or dtype that the model does not have."""
    renamings = [] if architecture.startswith("Nose") else get_checkpoint_conversion_mapping("ViTModel")
    found = {apply_renamings(key, renamings): tensor for key, tensor in header.items()}
    model = on_meta(config, architecture)
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    missing = sorted(set(expected) - set(found))
    # A pooler that this model has no place for may be left over.
    unexpected = sorted(
        key for key in set(found) - set(expected) if not key.removeprefix("vit.").startswith("pooler.")
    )
    if missing or unexpected:
        raise ValueError(
            f"The weights do not fit config.json: {len(missing)} missing ({missing[:4]}), {len(unexpected)} "
            f"unexpected ({unexpected[:4]}). removed_attention_layers {config.removed_attention_layers} and "
            f"diluted_attention_layers {config.diluted_attention_layers} must be those of the weights."
        )
    for key, shape in expected.items():
        if found[key].shape != shape:
            raise ValueError(
                f"{key} has shape {list(found[key].shape)} in the weights, config.json says {list(shape)}."
            )
        if found[key].dtype not in DTYPES:
            raise ValueError(f"{key} is {found[key].dtype} in the weights, expected one of {', '.join(DTYPES)}.")


def on_meta(config: NoseViTConfig, architecture: str) -> NoseViTPreTrainedModel:
    """The model without its numbers."""
    with torch.device("meta"):
        return CLASSES[architecture](config)


def layers(removed: list[int] | None = None) -> dict[str, list[int]]:
    """The lists of layers of a configuration whose `removed` layers lost their attention and do not double."""
    states = ("diluted", "compensated", "folded")
    return {"removed_attention_layers": removed or [], **{f"{state}_attention_layers": [] for state in states}}


def dense(config: NoseViTConfig) -> NoseViTConfig:
    """The same model with all its attention."""
    return NoseViTConfig.from_vit(config, **layers())


def mask_of(config: NoseViTConfig, folder: Path, header: Header) -> list[float]:
    """M of the diluted layers; `ValueError` where one is outside [0, 1]."""
    if not config.diluted_attention_layers:
        return []
    (key,) = [name for name in header if name.endswith(MASK)]
    with safe_open(folder / header[key].file, "pt") as file:
        values = file.get_tensor(key).double().tolist()
    if not all(0.0 <= value <= 1.0 for value in values):
        raise ValueError(f"{key} must hold numbers in [0, 1], got {values}.")
    return values


def state_of(config: NoseViTConfig, mask: list[float]) -> str:
    """In words, how far the removal has come."""
    removed, diluted = config.removed_attention_layers, config.diluted_attention_layers
    if not removed and not diluted:
        return "dense: every layer has its attention"
    if diluted and any(mask):
        return f"in dilution: M is {', '.join(f'{value:g}' for value in mask)} in layers {words(diluted)}"
    if diluted:
        return "diluted to M = 0: that attention is not computed, fold removes it"
    if config.compensated_attention_layers:
        return f"removed, not folded: layers {words(config.compensated_attention_layers)} still double the stream"
    if config.folded_attention_layers:
        return "folded: removed, and the doubling divided out of the weights"
    return "removed without compensation: nothing doubles, nothing to fold"


def words(layers: Sequence[int]) -> str:
    """Indices for people."""
    return ", ".join(map(str, layers)) or "none"


def described(record: dict[str, Any]) -> str:
    """A record of [`inspect_checkpoint`] for people."""
    weights, twin = record["weights"], record["dense_twin"]
    lines = [
        f"{record['source']}: {record['architecture']}, {record['num_hidden_layers']} blocks of "
        f"{record['hidden_size']}, {record['num_attention_heads']} heads, image {record['image_size']}, patch "
        f"{record['patch_size']}, {record['num_labels']} classes",
        f"State       {record['state']}",
        *(f"{name.capitalize():<12}{words(found)}" for name, found in record["layers"].items()),
    ]
    if record["mask"]:
        lines.append(f"M           {', '.join(f'{value:g}' for value in record['mask'])}")
    for name, unit, scale in (("parameters", "M", 1e6), ("macs", "G", 1e9)):
        ours, theirs = record[name], twin[name]
        title = "MACs" if name == "macs" else "Parameters"
        change = f"{100 * (ours / theirs - 1):+.1f} %"
        lines.append(f"{title:<12}{ours / scale:.3f} {unit}, dense {theirs / scale:.3f} {unit} ({change})")
    lines.append(
        f"Weights     {weights['tensors']} tensors in {', '.join(weights['files'])}, {', '.join(weights['dtypes'])}; "
        "they fit the configuration"
    )
    lines.append(f"Format      {record['format_version']}, written by hf_nose {record['hf_nose_version']}")
    return "\n".join(lines)
