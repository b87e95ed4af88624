"""Score a set of attention layers: run the model with them masked and compare with the model as it is.

One pass under the current set yields every block's input; each candidate recomputes only from its own block on (the
prefix cache). The results are those of the naive search; what may change their last digits is an option.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from .contributions import Contributions
from .criteria import CRITERIA, SIGNS, Evidence
from .entropy import evaluating
from .modeling_nose_vit import MASK_GAINS, nose_vit
from .prefixes import LayerSet, MaskedForwards, extend
from .processes import Batch, Batches, deal, merge_across_processes, place


Target = str | Callable[[Any], torch.Tensor]
Found = TypeVar("Found", Evidence, Contributions)


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
        stack_candidates (`bool`, *optional*, defaults to `False`): run the candidates as one growing batch, for a GPU
            that a single batch does not fill; rounding differs.
        state_cache_gib (`float`, *optional*, defaults to 0): block inputs of up to so many GiB are kept on the model's
            device from one round of a greedy search to the next, which then costs the blocks behind the last choice.
        class_token_tail (`bool`, *optional*, defaults to `False`): compute nothing but the class token from the last
            attention on, where the model's config allows it too; off, scores have the bits of a stock ViT's forward.
        bf16 (`bool`, *optional*, defaults to `False`): forwards under bfloat16 autocast; `precision` tells the error.
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
        stack_candidates: bool = False,
        state_cache_gib: float = 0.0,
        class_token_tail: bool = False,
        bf16: bool = False,
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
        if not 0 <= state_cache_gib < float("inf"):
            raise ValueError(f"state_cache_gib must be 0 or more, got {state_cache_gib}.")
        self.class_token_tail, self.bf16 = class_token_tail, bf16
        self.forwards = MaskedForwards(self.vit, self._outputs, mask, stack_candidates, int(state_cache_gib * 2**30))
        self.num_images = 0
        self.dense: Evidence | None = None
        self._found: dict[LayerSet, Evidence] = {}
        self._dense_logits: dict[int, torch.Tensor] = {}

    @property
    def block_forwards(self) -> int:
        """Blocks that this process ran, times the batches that it ran each of them on."""
        return self.forwards.block_forwards

    def score(self, layers: Iterable[int]) -> Score:
        """The score of one set."""
        return self.expand(layers, [])[0]

    def expand(self, base: Iterable[int], candidates: Sequence[int]) -> tuple[Score, dict[int, Score]]:
        """The score of `base` itself and of `base` with each one of `candidates` added, from one pass per batch."""
        base = tuple(sorted(base))
        if self.dense is None and base:
            self.expand((), [])
        sets = [base, *(extend(base, layer) for layer in candidates)]
        # A round's base is what the round before picked: it has been seen.
        found = {layers: self._found[layers] for layers in sets[:1] if layers in self._found}
        wanted = {layers: Evidence() for layers in sets if layers not in found}
        if wanted:
            found |= self._gather(*self._pass(base, candidates, wanted), Evidence)
        self._found = found
        if self.dense is None:
            self.dense = found[base]
            self.num_images = self.dense.num_images
        # Scored from the base's own evidence, so the empty set needs no pass of its own.
        scores = {layers: self.score_of(evidence, self.dense) for layers, evidence in found.items()}
        return scores[base], {layer: scores[extend(base, layer)] for layer in candidates}

    def contributions(
        self, base: Iterable[int], candidates: Sequence[int], numbers: range
    ) -> dict[LayerSet, Contributions]:
        """
        What the batches of `numbers` give, image by image, for `base` with each of `candidates` added, and for the
        dense model where that is the base.
        """
        base = tuple(sorted(base))
        sets = [*([] if base else [()]), *(extend(base, layer) for layer in candidates)]

        def empty() -> Contributions:
            return Contributions(self.criterion.image_sum)

        return self._gather(*self._pass(base, candidates, {layers: empty() for layers in sets}, numbers), empty)

    def score_of(self, found: Evidence, dense: Evidence) -> Score:
        """The score of what a set left, against what the dense model did."""
        value = self.criterion.score(dense, found)
        return Score(value, self.criterion.cost(value, self.sign))

    @torch.no_grad()
    def _pass(
        self,
        base: LayerSet,
        candidates: Sequence[int],
        found: dict[LayerSet, Found],
        numbers: range | None = None,
    ) -> tuple[dict[LayerSet, Found], FloatingPointError | None]:
        """
        One pass over this rank's batches, or those of them in `numbers`, which fills `found`. What is not finite ends
        it, for all ranks to raise together.
        """
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            stack.enter_context(torch.autocast(self.vit.device.type, torch.bfloat16, enabled=self.bf16))
            if not self.class_token_tail:
                stack.enter_context(self.vit.all_tokens())
            for index, batch in deal(self.batches, self.rank, self.world_size, numbers):
                batch = {name: tensor.to(self.vit.device) for name, tensor in batch.items()}
                see = partial(self._see, found, batch, index)
                try:
                    self.forwards.run(index, batch["pixel_values"], base, candidates, see, base in found)
                except FloatingPointError as error:
                    return found, FloatingPointError(f"Calibration batch {index}: {error}")
        return found, None

    def _outputs(self, pixel_values: torch.Tensor) -> Any:
        """The whole model where logits are asked for, the bare ViT where its class token is."""
        wants_logits = self.criterion.needs_logits or self.target != "features"
        return self.model(pixel_values) if wants_logits else self.vit(pixel_values, class_token_only=True)

    def _see(self, found: dict[LayerSet, Found], batch: Batch, index: int, layers: LayerSet, outputs: Any) -> None:
        """Adds what one forward of the `index`-th batch gave."""
        found[layers].num_images += len(batch["pixel_values"])
        if not self.criterion.needs_logits:
            found[layers].see_target(self._target(outputs))
            return
        if self.criterion.needs_labels and "labels" not in batch:
            raise ValueError(f"criterion {self.criterion.name!r} needs `labels` in every batch.")
        if not torch.isfinite(outputs.logits).all():
            raise FloatingPointError("logits hold NaN or infinity.")
        labels = batch["labels"] if self.criterion.needs_labels else None
        dense = None
        if self.criterion.name == "prediction_kl":
            if not layers:
                self._dense_logits[index] = outputs.logits.cpu()
            dense = self._dense_logits[index].to(outputs.logits.device)
        found[layers].see_predictions(outputs.logits, labels, dense)

    def _target(self, outputs: Any) -> torch.Tensor:
        if self.target == "logits":
            return outputs.logits
        if self.target == "features":
            return outputs.last_hidden_state[:, 0]
        return self.target(outputs)  # type: ignore[operator]

    def _gather(
        self, found: dict[LayerSet, Found], failure: FloatingPointError | None, empty: Callable[[], Found]
    ) -> dict[LayerSet, Found]:
        """What all ranks found, the same bits on each, so that all pick the same layer."""
        merged = merge_across_processes(found, empty, failure)
        if not next(iter(merged.values())).num_images:
            raise ValueError("batches is empty: give calibration images.")
        return merged
