"""Score a set of attention layers: run the model with them masked and compare with the model as it is.

Masking layer i changes nothing before block i. So one pass under the current set yields every block's input, and each
candidate recomputes only from its own block on (the prefix cache). The results are those of the naive search.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .criteria import CRITERIA, SIGNS, Evidence
from .entropy import evaluating
from .modeling_nose_vit import MASK_GAINS, nose_vit
from .processes import Batches, deal, merge_across_processes, place


Target = str | Callable[[Any], torch.Tensor]
LayerSet = tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """The raw value of a criterion (TE is signed here) and the cost that a search minimises."""

    value: float
    cost: float


class SetScorer:
    """
    Scores sets of masked attention layers on calibration images.

    Args:
        model ([`~torch.nn.Module`]): holds one [`NoseViTModel`], with any head around it.
        batches: a sequence or re-iterable of dicts with `pixel_values` (batch, channels, height, width), and `labels`
            (batch,) where the criterion needs them; the same batches on every rank.
        criterion (`str`): one of `CRITERIA`.
        mask (`str`): `"skip"` (f = x) or `"double"` (f = 2x).
        sign (`str`): `"absolute"` minimises |TE|, `"signed"` TE itself.
        target (`str` or callable): whose entropy counts: `"logits"`, `"features"` (the class token after the last
            norm), or a function from the model's outputs to (samples, channels).
        rank, world_size (`int`, *optional*): which of several processes this is; as accelerate says by default.

    Raises:
        `ValueError`: for an unknown option, a criterion whose labels are absent, or an empty set of batches.
        `FloatingPointError`: where the target is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        criterion: str = "transfer_entropy",
        mask: str = "skip",
        sign: str = "absolute",
        target: Target = "logits",
        rank: int | None = None,
        world_size: int | None = None,
    ):
        for name, value, known in (
            ("criterion", criterion, CRITERIA),
            ("mask", mask, MASK_GAINS),
            ("sign", sign, SIGNS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {sorted(known)}, got {value!r}.")
        if isinstance(target, str) and target not in ("logits", "features"):
            raise ValueError(f"target must be 'logits', 'features' or a callable, got {target!r}.")
        self.model, self.vit, self.batches = model, nose_vit(model), batches
        self.criterion, self.mask, self.sign, self.target = CRITERIA[criterion], mask, sign, target
        self.rank, self.world_size = place(rank, world_size)
        self.block_forwards = 0
        self.num_images = 0
        self.dense: Evidence | None = None
        self._dense_logits: list[torch.Tensor] = []

    def score(self, layers: Iterable[int]) -> Score:
        """The score of one set."""
        return self.expand(layers, [])[0]

    def expand(self, base: Iterable[int], candidates: Sequence[int]) -> tuple[Score, dict[int, Score]]:
        """The score of `base` itself and of `base` with each one of `candidates` added, from one pass per batch."""
        base = tuple(sorted(base))
        if self.dense is None and base:
            self.expand((), [])
        evidence = self._gather(*self._pass(base, candidates))
        if self.dense is None:
            self.dense = evidence[base]
            self.num_images = self.dense.num_images
        # Scored from the base's own evidence, so the empty set needs no pass of its own.
        scores = {layers: self._score(found) for layers, found in evidence.items()}
        return scores[base], {layer: scores[tuple(sorted((*base, layer)))] for layer in candidates}

    def _score(self, found: Evidence) -> Score:
        assert self.dense is not None
        value = self.criterion.score(self.dense, found)
        return Score(value, self.criterion.cost(value, self.sign))

    @torch.no_grad()
    def _pass(
        self, base: LayerSet, candidates: Sequence[int]
    ) -> tuple[dict[LayerSet, Evidence], FloatingPointError | None]:
        """
        One pass over this rank's batches: the base set from the start, each candidate from its own block on. What is
        not finite ends it, for all ranks to raise together.
        """
        is_dense = self.dense is None
        evidence = {base: Evidence(), **{tuple(sorted((*base, layer))): Evidence() for layer in candidates}}
        # All tokens, so that scores are to the bit those of a stock ViT's forward.
        with evaluating(self.model), self.vit.masked_attention(base, self.mask), self.vit.all_tokens():
            for number, (index, batch) in enumerate(deal(self.batches, self.rank, self.world_size)):
                batch = {name: tensor.to(self.vit.device) for name, tensor in batch.items()}
                with block_inputs(self.vit.blocks) as inputs:
                    outputs = self._outputs(batch)
                self.block_forwards += len(self.vit.layers)
                if is_dense and self.criterion.name == "prediction_kl":
                    self._dense_logits.append(outputs.logits.cpu())
                try:
                    self._see(evidence[base], outputs, batch, number)
                    for layer in candidates:
                        with (
                            self.vit.masked_attention([layer], self.mask),
                            self.vit.starting_at(layer, inputs[layer]),
                        ):
                            outputs = self._outputs(batch)
                        self.block_forwards += len(self.vit.layers) - layer
                        self._see(evidence[tuple(sorted((*base, layer)))], outputs, batch, number)
                except FloatingPointError as error:
                    return evidence, FloatingPointError(f"Calibration batch {index}: {error}")
        return evidence, None

    def _outputs(self, batch: dict[str, torch.Tensor]) -> Any:
        """The whole model where logits are asked for, the bare ViT where its class token is."""
        wants_logits = self.criterion.needs_logits or self.target != "features"
        return self.model(batch["pixel_values"]) if wants_logits else self.vit(batch["pixel_values"])

    def _see(self, evidence: Evidence, outputs: Any, batch: dict[str, torch.Tensor], number: int) -> None:
        """Adds what one forward gave; `number` counts this rank's batches."""
        evidence.num_images += len(batch["pixel_values"])
        if not self.criterion.needs_logits:
            evidence.moments.update(self._target(outputs))
            return
        if self.criterion.needs_labels and "labels" not in batch:
            raise ValueError(f"criterion {self.criterion.name!r} needs `labels` in every batch.")
        if not torch.isfinite(outputs.logits).all():
            raise FloatingPointError("logits hold NaN or infinity.")
        labels = batch["labels"] if self.criterion.needs_labels else None
        dense = self._dense_logits[number].to(outputs.logits.device) if self._dense_logits else None
        evidence.see_predictions(outputs.logits, labels, dense)

    def _target(self, outputs: Any) -> torch.Tensor:
        if self.target == "logits":
            return outputs.logits
        if self.target == "features":
            return outputs.last_hidden_state[:, 0]
        return self.target(outputs)  # type: ignore[operator]

    def _gather(
        self, evidence: dict[LayerSet, Evidence], failure: FloatingPointError | None
    ) -> dict[LayerSet, Evidence]:
        """The evidence of all ranks, the same bits on each, so that all pick the same layer."""
        merged = merge_across_processes(evidence, Evidence, failure)
        if not next(iter(merged.values())).num_images:
            raise ValueError("batches is empty: give calibration images.")
        return merged


@contextmanager
def block_inputs(blocks: Sequence[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """The input of every block, in order, as a forward within the context meets it."""
    inputs: list[torch.Tensor] = []
    handles = [block.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for block in blocks]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
