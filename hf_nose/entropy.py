"""Entropy of a layer under a Gaussian assumption (Eq. 4-6), from moments that merge exactly."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .modeling_nose_vit import NoseViTModel, nose_vit
from .processes import Batches, deal, merge_across_processes, place


class Moments:
    """
    Count, mean and sum of squared deviations (M2) of a feature set, per channel, in float64.

    Batches and processes combine by Chan's formula, so no feature set is ever stored. Where the device has no float64
    the sums are taken on the CPU.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self.m2 = torch.zeros(0, dtype=torch.float64)
        self.dtype = torch.float64

    def update(self, features: torch.Tensor) -> "Moments":
        """
        Adds `features` of shape (..., channels); every leading dimension counts as samples. Returns self.

        Raises:
            `FloatingPointError`: where a value is not finite.
        """
        samples = features.detach().flatten(0, -2)
        if samples.shape[0] == 0:
            return self
        batch = Moments()
        batch.dtype = samples.dtype
        samples = in_float64(samples)
        batch.count = samples.shape[0]
        # Taken about the first sample, a constant channel has deviations of exactly zero.
        shifted = samples - samples[0]
        offset = shifted.mean(0)
        batch.mean = (samples[0] + offset).cpu()
        batch.m2 = (shifted - offset).square().sum(0).cpu()
        if not (torch.isfinite(batch.mean).all() and torch.isfinite(batch.m2).all()):
            raise FloatingPointError(f"features hold NaN or infinity (shape {tuple(features.shape)}).")
        return self.merge(batch)

    def merge(self, other: "Moments") -> "Moments":
        """Adds the samples of `other` as if they had been seen here. Returns self."""
        if other.count == 0:
            return self
        if self.count == 0:
            self.count, self.mean, self.m2, self.dtype = other.count, other.mean.clone(), other.m2.clone(), other.dtype
            return self
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"other must have {len(self.mean)} channels, got {len(other.mean)}.")
        total = self.count + other.count
        delta = other.mean - self.mean
        self.mean = self.mean + delta * (other.count / total)
        self.m2 = self.m2 + other.m2 + delta.square() * (self.count * other.count / total)
        self.count = total
        return self

    @property
    def floor(self) -> float:
        """The smallest positive normal number of the run's dtype: what a constant channel's deviation becomes."""
        return torch.finfo(self.dtype).tiny

    def std(self) -> torch.Tensor:
        """Population standard deviation per channel, float64, at least `floor`; `ValueError` without samples."""
        if self.count == 0:
            raise ValueError("No samples were seen: the calibration set is empty.")
        return (self.m2 / self.count).sqrt().clamp_min(self.floor)

    @property
    def constant_channels(self) -> int:
        """How many channels did not vary and so sit at the floor."""
        return int(((self.m2 / max(self.count, 1)).sqrt() <= self.floor).sum())

    def entropy(self) -> float:
        """`H(F) = sum_j log std_j(F)` in nats, up to the constants of a Gaussian (Eq. 6)."""
        return float(self.std().log().sum())


def in_float64(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in float64, on the CPU where its device has none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).to(torch.float64)


def layer_profile(
    model: nn.Module,
    batches: Batches,
    tokens: str = "all",
    rank: int | None = None,
    world_size: int | None = None,
) -> list[dict[str, Any]]:
    """
    Entropy of every attention and MLP layer (Fig. 1): of `f_attn = Attn(LN1(x)) + x` and `f_mlp = MLP(LN2(f)) + f`
    (`stream`, Eq. 2 and 3), and of the two without the residual (`branch`).

    Args:
        model: holds one [`NoseViTModel`]; it is run in evaluation mode and left in the mode it was in.
        batches: dicts with `pixel_values` (batch, channels, height, width).
        tokens (`str`, *optional*, defaults to `"all"`): deviations over all tokens, or over the `"class"` token only.
        rank, world_size (`int`, *optional*): which of several processes this is, as accelerate says by default; whole
            batches are dealt, moments merged.

    Returns:
        One dict a block, in nats: `{"layer", "attention": {...}, "mlp": {...}}`, each with `stream`, `branch`, and
        beside them `*_scale_free` and `*_constant_channels` (how many channels did not vary). The branch of an
        attention that is not computed is `None`. *Scale-free* subtracts d ln s, s being what compensation has
        multiplied the stream by; raw values of a folded model have d ln s added back, so folded and unfolded models
        compare.
    """
    if tokens not in ("all", "class"):
        raise ValueError(f"tokens must be 'all' or 'class', got {tokens!r}.")
    vit = nose_vit(model)
    rank, world_size = place(rank, world_size)
    seen: dict[tuple[int, str, str], Moments] = {}
    for layer, block in enumerate(vit.blocks):
        for part in ("attention", "mlp"):
            if part == "mlp" or block.gain is None:
                seen[layer, part, "branch"] = Moments()
            seen[layer, part, "stream"] = Moments()
    failure = None
    with evaluating(model), recording(vit, seen, tokens), torch.no_grad():
        for index, batch in deal(batches, rank, world_size):
            try:
                vit(batch["pixel_values"].to(vit.device))
            except FloatingPointError as error:
                failure = FloatingPointError(f"Calibration batch {index}: {error}")
                break
    merged = merge_across_processes(seen, Moments, failure)
    if not next(iter(merged.values())).count:
        raise ValueError("batches is empty: give calibration images.")
    growth = stream_growth(vit)
    return [
        {
            "layer": layer,
            **{part: layer_entropies(vit, merged, layer, part, growth[layer]) for part in ("attention", "mlp")},
        }
        for layer in range(len(vit.layers))
    ]


def layer_entropies(
    vit: NoseViTModel, seen: dict[tuple[int, str, str], Moments], layer: int, part: str, growth: float
) -> dict[str, float | int | None]:
    """Raw and scale-free entropies in nats of one layer's stream and branch."""
    channels = vit.config.hidden_size
    row: dict[str, float | int | None] = {}
    for kind in ("stream", "branch"):
        moments = seen.get((layer, part, kind))
        raw = None if moments is None else moments.entropy() + channels * math.log(vit.config.stream_scale(layer))
        row[kind] = raw
        row[f"{kind}_scale_free"] = None if raw is None else raw - channels * math.log(growth)
        row[f"{kind}_constant_channels"] = None if moments is None else moments.constant_channels
    return row


def stream_growth(vit: NoseViTModel) -> list[float]:
    """Per block, the product of (2 - M) over the compensated layers up to it, folded ones included (M = 0 there)."""
    config, growth, product = vit.config, [], 1.0
    masks = dict(zip(config.diluted_attention_layers, vit.mask_values(), strict=True))
    for layer in range(config.num_hidden_layers):
        if layer in config.folded_attention_layers or layer in config.compensated_attention_layers:
            product *= 2.0 - masks.get(layer, 0.0)
        growth.append(product)
    return growth


@contextmanager
def recording(vit: NoseViTModel, seen: dict[tuple[int, str, str], Moments], tokens: str) -> Iterator[None]:
    """Feeds what flows through each block to the moments of `seen`, by forward hooks."""

    def record(key: tuple[int, str, str], features: torch.Tensor) -> None:
        seen[key].update(features[:, :1] if tokens == "class" else features)

    chunk_sizes = vit.config.chunk_size_feed_forward, vit.config.chunk_size_attention
    # Slices have no image dimension to find the class token in.
    vit.config.chunk_size_feed_forward = vit.config.chunk_size_attention = 0
    handles = []
    for layer, block in enumerate(vit.blocks):

        def attention(_module, _inputs, output, layer=layer):
            record((layer, "attention", "branch"), output[0])

        def stream(_module, inputs, layer=layer):
            record((layer, "attention", "stream"), inputs[0])

        def mlp(_module, _inputs, output, layer=layer):
            record((layer, "mlp", "branch"), output)

        def block_output(_module, _inputs, output, layer=layer):
            record((layer, "mlp", "stream"), output)

        if block.gain is None:
            handles.append(block.attention.register_forward_hook(attention))
        handles.append(block.layernorm_after.register_forward_pre_hook(stream))
        handles.append(block.mlp.register_forward_hook(mlp))
        handles.append(block.register_forward_hook(block_output))
    try:
        yield
    finally:
        vit.config.chunk_size_feed_forward, vit.config.chunk_size_attention = chunk_sizes
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within the context."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
