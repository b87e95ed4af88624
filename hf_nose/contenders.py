"""The models of a benchmark: a stock ViT, its dense NoseViT, and what is left after removal, from one description."""

from __future__ import annotations

import ctypes
import gc
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from .configuration_nose_vit import NoseViTConfig
from .conversion_nose_vit import load_vit, unsupported
from .modeling_nose_vit import NoseViTForImageClassification
from .profiling import count_macs, count_parameters, macs_by_part
from .records import public_name
from .shapes import SHAPE_FIELDS, SHAPES, removed_layers, shape_config, shape_name
from .surgery import fold
from .weights import load_classifier


# Behind the names of models that run once more in slices, or with q, k and v as one matrix product.
CHUNKED, FUSED = " chunked", " fused"
ATTENTIONS = {"eager": "eager", "sdpa": "sdpa", "flash": "flash_attention_2"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Contender:
    """
    One model of a benchmark, described by plain values so that another process can build it, too.

    Args:
        name (`str`): what it is called in tables.
        source (`str`): a named shape, which gets random weights, a folder or a Hub id.
        kind (`str`): `"stock"`, transformers' own class; `"nose"`, the same weights as a NoseViT, folded where
            `removed` says so; `"checkpoint"`, a NoseViT as it was saved.
        removed (`tuple[int, ...]`, *optional*): attention layers to fold away.
        chunk_size_feed_forward (`int`, *optional*, defaults to 0): tokens a slice of an MLP; 0 is off.
        chunk_size_attention (`int`, *optional*, defaults to 0): images a slice of an attention layer; 0 is off.
        fuse_qkv (`bool`, *optional*, defaults to `False`): q, k and v as one matrix product.
        variant_of (`str`, *optional*): the name of the same model without slices or fusion.
    """

    name: str
    source: str
    kind: str
    removed: tuple[int, ...] = ()
    chunk_size_feed_forward: int = 0
    chunk_size_attention: int = 0
    fuse_qkv: bool = False
    variant_of: str | None = None

    def config(self) -> ViTConfig:
        """The configuration of what [`Contender.build`] gives; nothing is built or read but a config.json."""
        config = source_config(self.source)
        if self.kind == "stock":
            return stock_config(config)
        chunks = {
            "chunk_size_feed_forward": self.chunk_size_feed_forward,
            "chunk_size_attention": self.chunk_size_attention,
        }
        if self.kind == "checkpoint":
            return NoseViTConfig.from_vit(config, **chunks)
        layers = list(self.removed)
        return NoseViTConfig.from_vit(
            stock_config(config), removed_attention_layers=layers, folded_attention_layers=layers, **chunks
        )

    def costs(self) -> dict[str, Any]:
        """
        `parameters`, `macs` of one image as the paper counts them, and `macs_computed`, what is really computed, with
        `macs_by_part`, where that is.
        """
        config = self.config()
        computed = count_macs(config, class_token_tail=True)
        return {
            "parameters": self.num_parameters(),
            "macs": count_macs(config)["total"],
            "macs_computed": computed["total"],
            "macs_by_part": macs_by_part(computed["by_module"]),
        }

    def num_parameters(self) -> int:
        """Counted on the meta device: nothing is built."""
        config = self.config()
        with torch.device("meta"):
            return count_parameters(AutoModelForImageClassification.from_config(config))

    def weights_bytes(self, dtype: torch.dtype) -> int:
        """Memory that the parameters take."""
        return self.num_parameters() * dtype.itemsize

    def build(self, device: torch.device, dtype: torch.dtype, attention: str) -> PreTrainedModel:
        """The model, in evaluation mode; random weights where there are no others, the same ones every time."""
        model = self._on_cpu()
        if isinstance(model, NoseViTForImageClassification) and self.fuse_qkv:
            model.fuse_qkv_projections()
        model.set_attn_implementation(ATTENTIONS[attention])
        nn.Module.to(model, device=device, dtype=dtype)
        model.eval()
        release()
        return model

    def _on_cpu(self) -> PreTrainedModel:
        chunks: dict[str, Any] = {
            "chunk_size_feed_forward": self.chunk_size_feed_forward,
            "chunk_size_attention": self.chunk_size_attention,
        }
        if self.kind == "checkpoint":
            return load_classifier(self.source, **chunks)
        stock = stock_model(self.source)
        if self.kind == "stock":
            return stock
        model = NoseViTForImageClassification.from_vit(stock, **chunks)
        if not self.removed:
            return model
        model.dilute(self.removed)
        model.set_mask(0.0)
        return fold(model)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `Contender(**values)` is the way back."""
        return asdict(self)


def source_config(source: str) -> ViTConfig:
    """The configuration of a shape or checkpoint; `ValueError` where it is no pre-norm ViT."""
    if source in SHAPES:
        return shape_config(source)
    config = AutoConfig.from_pretrained(source)
    if config.model_type not in ("vit", "nose_vit"):
        raise ValueError(f"model {source!r}: {unsupported(config.model_type)}")
    return config


def stock_config(config: ViTConfig) -> ViTConfig:
    """The configuration of the dense, stock ViT of the same shape."""
    names = set(ViTConfig().to_dict()) - {"model_type", "architectures", "transformers_version"}
    return ViTConfig(**{name: value for name, value in config.to_dict().items() if name in names})


def stock_model(source: str) -> PreTrainedModel:
    """transformers' own ViT: the checkpoint's, or with seeded random weights where there is none of that kind."""
    config = source_config(source)
    if source not in SHAPES and config.model_type == "vit":
        return load_vit(NoseViTForImageClassification, source, None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ViTForImageClassification(stock_config(config))


def contenders(
    sources: Sequence[str],
    removed: Sequence[str] = (),
    chunk_size_feed_forward: int = 0,
    chunk_size_attention: int = 0,
    fuse_qkv: bool = False,
) -> dict[str, list[Contender]]:
    """
    Who runs against whom: models of one dense shape are one group, in which transformers' own ViT comes first and is
    what the others are compared with, then the dense NoseViT, then what is left after every removal.

    Args:
        sources (`Sequence[str]`): shapes, folders, Hub ids; dense or compressed.
        removed (`Sequence[str]`, *optional*): what to take from dense ones, see [`~shapes.removed_layers`]; those that
            have lost layers already stay as they are.
        chunk_size_feed_forward (`int`, *optional*, defaults to 0): see [`Contender`]; where this or the next is
            given, every NoseViT runs in slices and whole.
        chunk_size_attention (`int`, *optional*, defaults to 0): see [`Contender`].
        fuse_qkv (`bool`, *optional*, defaults to `False`): see [`Contender`]; likewise.

    Returns:
        `dict[str, list[Contender]]`: by the shape's name, or that of the first source.

    Raises:
        ValueError: for a source given twice, no source, layers that cannot be removed, or no dense model for them.
    """
    if not sources or len(set(sources)) != len(sources):
        raise ValueError(f"model must name at least one model, none twice, got {list(sources)}.")
    chunks: dict[str, Any] = {
        "chunk_size_feed_forward": chunk_size_feed_forward,
        "chunk_size_attention": chunk_size_attention,
    }
    for name, size in chunks.items():
        if size < 0:
            raise ValueError(f"{name} must be 0 (off) or positive, got {size}.")
    groups: dict[tuple[str, ...], tuple[str, list[Contender]]] = {}
    for source in sources:
        config = source_config(source)
        key = tuple(str(getattr(config, field)) for field in SHAPE_FIELDS)
        _, group = groups.setdefault(key, (shape_name(config) or public_name(source), []))
        for contender in of_source(source, config, removed, is_first=not group):
            group.append(contender)
            if contender.kind == "stock":
                continue
            name = contender.name
            if any(chunks.values()):
                group.append(replace(contender, name=name + CHUNKED, variant_of=name, **chunks))
            if fuse_qkv:
                group.append(replace(contender, name=name + FUSED, variant_of=name, fuse_qkv=True))
    check_found([contender for _, group in groups.values() for contender in group], sources, removed)
    return dict(groups.values())


def check_found(found: Sequence[Contender], sources: Sequence[str], removed: Sequence[str]) -> None:
    """`ValueError` where nobody has the layers that are to be removed, or two models would have one name."""
    if removed and not any(contender.removed for contender in found):
        raise ValueError(
            f"removed {', '.join(removed)}: none of {', '.join(map(public_name, sources))} is dense. Leave it out, or "
            "give a dense model, too."
        )
    names = [contender.name for contender in found]
    if len(set(names)) != len(names):
        raise ValueError(f"Two models would have one name: {names}. Give every removal once, and folders names apart.")


def of_source(source: str, config: ViTConfig, removed: Sequence[str], is_first: bool) -> list[Contender]:
    """The models that one source gives; the first of a group gives the stock and the dense one in any case."""
    name = public_name(source)
    found = [Contender(f"{name} stock", source, "stock")] if is_first else []
    if is_first or config.model_type == "vit":
        found.append(Contender(f"{name} dense", source, "nose"))
    if config.model_type == "nose_vit":
        found.append(Contender(name, source, "checkpoint"))
        if config.removed_attention_layers:
            return found
    for text in map(str.strip, removed):
        found.append(Contender(f"{name} {text}", source, "nose", tuple(removed_layers(text, config))))
    return found


def release() -> None:
    """Gives memory that nobody holds any more back to the system, as far as glibc's allocator can be told to."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
