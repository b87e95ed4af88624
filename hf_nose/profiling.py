"""What a model costs: its parameters and its multiply-accumulates; what it was measured on."""

from __future__ import annotations

import copy
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageClassification, PretrainedConfig
from transformers.models.vit.modeling_vit import ViTAttention

from .attention_nose_vit import NoseViTAttention
from .shapes import LAYER_NORM_MACS_PER_ELEMENT


def count_parameters(model: nn.Module, only_trainable: bool = False) -> int:
    """
    Number of parameters, or of those that are not frozen, each counted once where it is shared; buffers (the mask M)
    are none.
    """
    return sum(item.numel() for item in model.parameters() if item.requires_grad or not only_trainable)


def trainable_line(model: nn.Module) -> str:
    """How many parameters are trained, in words."""
    trainable, total = count_parameters(model, only_trainable=True), count_parameters(model)
    return f"Trainable parameters: {trainable:,} of {total:,} ({trainable / total:.2%})"


def count_macs(
    config_or_model: PretrainedConfig | nn.Module,
    image_size: int | tuple[int, int] | None = None,
    class_token_tail: bool = False,
) -> dict[str, Any]:
    """
    Multiply-accumulates of one image (METHOD: per block 4 N d^2 + 2 N^2 d for the attention and 8 N d^2 for the MLP,
    plus patch embedding and head, a LayerNorm at 5 per element; softmax, activations and sums are not counted).

    One forward on the meta device, counted by hooks from the shapes that really pass: a block without attention, an
    attention that is not computed because M = 0, and tokens dropped on the way (a classifier's class-token tail) are
    all seen. Nothing is computed, and the weights of a model are neither copied nor touched.

    Args:
        config_or_model (`PretrainedConfig` or `nn.Module`):
            The configuration of an image classifier, or a model that takes `pixel_values` and has a `config`.
        image_size (`int` or `tuple[int, int]`, *optional*):
            Height and width in pixels; the config's by default. Another size interpolates the position embeddings.
        class_token_tail (`bool`, *optional*, defaults to `False`):
            Count what the model computes when it is asked for nothing but logits: a classifier that drops all but
            the class token behind its last attention has fewer. By default every token is carried to the end, as
            the published figures have it: the hidden states are asked for.

    Returns:
        `dict`: `total` (`int`) and `by_module` (the `int` of every module that has any, by its qualified name; the two
        products of an attention, q k^T and its rows times v, stand under the attention's own name).

    Raises:
        ValueError: where the model has no `Linear`, `Conv2d` or `LayerNorm`, so that there is nothing to count.

    Source: arXiv 2404.05657, Tables 1 and 8.
    """
    if isinstance(config_or_model, PretrainedConfig):
        with torch.device("meta"):
            model: Any = AutoModelForImageClassification.from_config(config_or_model)
    else:
        model = _meta_copy(config_or_model)
    model.eval()
    for module in model.modules():
        if isinstance(module, NoseViTAttention):
            # Three products or one cost the same, and the hooks know three.
            module.unfuse()
    config = model.config
    own_size = _height_and_width(config.image_size)
    size = own_size if image_size is None else _height_and_width(image_size)

    macs: dict[str, int] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, ViTAttention):
            handles += _attention_hooks(name, module, macs)
        elif isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm):
            handles.append(module.register_forward_hook(_leaf_hook(name, macs)))
    if not handles:
        raise ValueError(
            f"config_or_model: {type(model).__name__} has no Linear, Conv2d or LayerNorm to count. "
            "Give a Vision Transformer."
        )
    pixel_values = torch.empty(1, config.num_channels, *size, device="meta")
    # Who asks for hidden states gets all tokens.
    more = {} if class_token_tail else {"output_hidden_states": True}
    more |= {} if size == own_size else {"interpolate_pos_encoding": True}
    try:
        with torch.no_grad():
            model(pixel_values=pixel_values, **more)
    finally:
        for handle in handles:
            handle.remove()
    return {"total": sum(macs.values()), "by_module": macs}


def macs_by_part(by_module: dict[str, int]) -> dict[str, int]:
    """What [`count_macs`] found module by module, by the part of a ViT that it belongs to; the sum is the total."""
    parts = dict.fromkeys(("embeddings", "attention", "mlp", "norms", "head"), 0)
    for name, macs in by_module.items():
        path = name.split(".")
        part = next((part for part in ("attention", "mlp", "embeddings") if part in path), None)
        parts[part or ("norms" if "norm" in path[-1] else "head")] += macs
    return parts


def _height_and_width(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _meta_copy(model: nn.Module) -> nn.Module:
    """A deep copy with its tensors on the meta device: the memo answers for every tensor before it is read."""
    tensors: dict[int, Any] = {}
    for parameter in model.parameters():
        tensors[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in model.buffers():
        tensors[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, tensors).float()


def _leaf_hook(name: str, macs: dict[str, int]) -> Callable[..., None]:
    def add(module: nn.Module, _: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if isinstance(module, nn.Linear):
            cost = output.numel() * module.in_features
        elif isinstance(module, nn.Conv2d):
            cost = output.numel() * module.weight[0].numel()
        else:
            cost = output.numel() * LAYER_NORM_MACS_PER_ELEMENT
        macs[name] = macs.get(name, 0) + cost

    return add


def _attention_hooks(name: str, attention: ViTAttention, macs: dict[str, int]) -> list[Any]:
    """The two products of an attention have no module of their own: 2 x queries x keys x d, as projected."""
    queries: list[torch.Size] = []

    def remember(_: nn.Module, __: Any, output: torch.Tensor) -> None:
        queries.append(output.shape)

    def add(_: nn.Module, __: Any, output: torch.Tensor) -> None:
        num_keys = output.shape[-2]
        macs[name] = macs.get(name, 0) + 2 * queries.pop().numel() * num_keys

    return [attention.q_proj.register_forward_hook(remember), attention.k_proj.register_forward_hook(add)]


def hardware(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """
    What a number was measured on, for the record beside it. Holds no host name, user name or path.

    Args:
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): where the models ran.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): the dtype they ran in.

    Returns:
        `dict`: `device` (`"cpu"`, `"cuda"` or `"mps"`), `accelerator` (the GPU's name, `None` without one),
        `processor`, `system`, `cores` (those this process may use), `threads` (those torch uses), `dtype`,
        `float32_precision`.
    """
    kind = torch.device(device).type
    return {
        "device": kind,
        "accelerator": torch.cuda.get_device_name(device) if kind == "cuda" else None,
        "processor": _processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if platform.system() == "Linux" else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "float32_precision": torch.get_float32_matmul_precision(),
    }


def machine_name(hardware: dict[str, Any]) -> str:
    """What the machine of a [`hardware`] record is called: the GPU, or the processor and the threads of torch."""
    threads = f"{hardware['threads']} thread{'s' * (hardware['threads'] > 1)}"
    return hardware["accelerator"] or f"{hardware['processor']}, {threads}"


def hardware_slug(hardware: dict[str, Any]) -> str:
    """What the files of a machine's results are called: the GPU, or the processor and the threads of torch."""
    name = hardware["accelerator"] or f"{hardware['processor']} {hardware['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _processor() -> str:
    """The processor's model name where Linux tells it (not on every architecture), otherwise what Python knows."""
    if platform.system() == "Linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
