"""What bfloat16 changes in the scores of sets, measured beside the search on the first batch."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from .contributions import Contributions
from .prefixes import LayerSet
from .processes import Batches
from .scoring import Score, SetScorer


class CheckedScorer(SetScorer):
    """
    A [`SetScorer`] under bfloat16 autocast that scores every set on the first batch in float32 as well.

    Arguments are those of [`SetScorer`] but `bf16`, by name.
    """

    def __init__(self, model: nn.Module, batches: Batches, **options: Any):
        super().__init__(model, batches, bf16=True, **options)
        first = [batch for batch, _ in zip(batches, range(1), strict=False)]
        options["state_cache_gib"] = 0.0
        self._pair = [SetScorer(model, first, bf16=bf16, **options) for bf16 in (True, False)]
        self._differences: list[float] = []
        self._same_picks: list[bool] = []

    @property
    def block_forwards(self) -> int:
        """See [`SetScorer`]; those of the comparison count, too."""
        return super().block_forwards + sum(scorer.block_forwards for scorer in self._pair)

    def expand(self, base: Iterable[int], candidates: Sequence[int]) -> tuple[Score, dict[int, Score]]:
        """See [`SetScorer`]."""
        found = super().expand(base, candidates)
        self._compare(base, candidates)
        return found

    def contributions(
        self, base: Iterable[int], candidates: Sequence[int], numbers: range
    ) -> dict[LayerSet, Contributions]:
        """See [`SetScorer`]."""
        found = super().contributions(base, candidates, numbers)
        if 0 in numbers:
            self._compare(base, candidates)
        return found

    def precision(self) -> dict[str, Any]:
        """
        On how many images and sets bfloat16 was compared, by how much the criterion's values differ from float32's at
        most and in the mean, and in how many rounds both would pick the same layer there.
        """
        return {
            "dtype": "bfloat16",
            "num_images": self._pair[0].num_images,
            "num_sets": len(self._differences),
            "largest_difference": max(self._differences),
            "mean_difference": sum(self._differences) / len(self._differences),
            "rounds": len(self._same_picks),
            "rounds_of_same_pick": sum(self._same_picks),
        }

    def _compare(self, base: Iterable[int], candidates: Sequence[int]) -> None:
        (ours, half), (exact, full) = (scorer.expand(base, candidates) for scorer in self._pair)
        if tuple(base):
            self._differences.append(abs(ours.value - exact.value))
        self._differences += [abs(half[layer].value - full[layer].value) for layer in candidates]
        if candidates:
            picks = [min(scores, key=lambda layer: (scores[layer].cost, layer)) for scores in (half, full)]
            self._same_picks.append(picks[0] == picks[1])
