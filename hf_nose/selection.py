"""NOSE: search the combination of attention layers with the least transfer entropy to the output (Algorithm 1)."""

import time
from dataclasses import asdict, dataclass, field
from itertools import combinations
from math import comb
from pathlib import Path
from random import Random
from typing import Any

from torch import nn

from .files import read_json, write_json
from .modeling_nose_vit import nose_vit
from .precision import CheckedScorer
from .processes import Batches
from .racing import race
from .scoring import Score, SetScorer, Target


@dataclass
class Selection:
    """
    The layers picked and how: `layers` in the order picked, and `trace`, one dict a round with the raw value of every
    candidate (`{"picked": 3, "scores": {0: -58.4, ...}}`, the paper's Fig. 4). Rounds of a search over whole sets
    hold `picked` as a list and sets as keys: `{"picked": [1, 3], "scores": {"1,3": 12.9, ...}}`. Rounds of a race
    hold, beside the scores, the `images` that each rests on and the `margins`, in standard errors, by which those were
    beaten that dropped out; `confidence` is that of the race as a whole. `precision` tells what bfloat16 changed.
    """

    layers: list[int]
    criterion: str
    search: str
    mask: str
    sign: str
    target: str
    trace: list[dict[str, Any]] = field(default_factory=list)
    reference: dict[str, float | int | None] = field(default_factory=dict)
    num_images: int = 0
    num_processes: int = 1
    block_forwards: int = 0
    seconds: float = 0.0
    confidence: float | None = None
    precision: dict[str, Any] | None = None

    def to_json(self, path: str | Path, **record: Any) -> None:
        """Writes the selection, with further entries of `record` beside it."""
        write_json(path, {**asdict(self), "num_layers": len(self.layers), **record})

    @classmethod
    def from_json(cls, path: str | Path) -> "Selection":
        """Reads what `to_json` wrote; layer indices come back as integers."""
        record = read_json(path)
        # Records of before there were races lack what these leave.
        values = {name: record[name] for name in cls.__dataclass_fields__ if name in record}
        for step in values["trace"]:
            if isinstance(step["picked"], int):
                for name in {"scores", "images", "margins"} & set(step):
                    step[name] = {int(layer): value for layer, value in step[name].items()}
        return cls(**values)


def select_attention_layers(
    model: nn.Module,
    batches: Batches,
    num_layers: int,
    criterion: str = "transfer_entropy",
    search: str = "greedy",
    mask: str = "skip",
    sign: str = "absolute",
    target: Target = "logits",
    beam_width: int = 3,
    num_draws: int = 1,
    seed: int = 0,
    confidence: float = 0.99,
    stack_candidates: bool = False,
    state_cache_gib: float = 0.0,
    class_token_tail: bool = False,
    bf16: bool = False,
    rank: int | None = None,
    world_size: int | None = None,
) -> Selection:
    """
    Picks the `num_layers` attention layers that the output misses least.

    Args:
        model, batches, criterion, mask, sign, target, stack_candidates, state_cache_gib, class_token_tail, rank,
            world_size: see [`SetScorer`].
        num_layers (`int`): N, from 1 to one less than the attention layers there are.
        search (`str`, *optional*, defaults to `"greedy"`):
            `"greedy"` (Algorithm 1), `"racing"` (the same, on fewer images, see [`Race`]), `"beam"`,
            `"exhaustive"` (all sets), or the baselines `"first"` and `"random"`.
        beam_width (`int`, *optional*, defaults to 3): sets kept a round by the beam search.
        num_draws (`int`, *optional*, defaults to 1): random sets drawn and scored; `layers` is the first of them.
        seed (`int`, *optional*, defaults to 0): of the random sets.
        confidence (`float`, *optional*, defaults to 0.99): of the racing search, that its layers are the greedy one's.
        bf16 (`bool`, *optional*, defaults to `False`): scores under bfloat16 autocast, and what it changes measured
            against float32 on the first batch.

    Returns:
        [`Selection`], the same on every rank. Ties go to the lower index.

    Raises:
        `ValueError`: for an option out of range, see also [`SetScorer`].
    """
    kept = nose_vit(model).kept_attention_layers
    if not 1 <= num_layers < len(kept):
        raise ValueError(
            f"num_layers must be in [1, {len(kept) - 1}], got {num_layers}: {len(kept)} layers have attention, and "
            "without any the class token sees no patch."
        )
    if search not in SEARCHES:
        raise ValueError(f"search must be one of {sorted(SEARCHES)}, got {search!r}.")
    scorer = (CheckedScorer if bf16 else SetScorer)(
        model,
        batches,
        criterion=criterion,
        mask=mask,
        sign=sign,
        target=target,
        stack_candidates=stack_candidates,
        state_cache_gib=state_cache_gib,
        class_token_tail=class_token_tail,
        rank=rank,
        world_size=world_size,
    )
    options = {"beam_width": beam_width, "num_draws": num_draws, "seed": seed, "confidence": confidence}
    started = time.perf_counter()
    layers, trace = SEARCHES[search](scorer, kept, num_layers, options)
    dense = scorer.dense
    assert dense is not None
    has_moments = dense.moments.count > 0
    return Selection(
        layers=layers,
        criterion=criterion,
        search=search,
        mask=mask,
        sign=sign,
        target=target if isinstance(target, str) else "custom",
        trace=trace,
        reference={
            "entropy": dense.moments.entropy() if has_moments else None,
            "constant_channels": dense.moments.constant_channels if has_moments else None,
        },
        num_images=scorer.num_images,
        num_processes=scorer.world_size,
        block_forwards=scorer.block_forwards,
        seconds=time.perf_counter() - started,
        confidence=confidence if search == "racing" else None,
        precision=scorer.precision() if isinstance(scorer, CheckedScorer) else None,
    )


def greedy(
    scorer: SetScorer, kept: list[int], num_layers: int, options: dict[str, Any]
) -> tuple[list[int], list[dict]]:
    """Algorithm 1: from the empty set, N times, keep the layer with the least cost."""
    picked: list[int] = []
    trace = []
    for _ in range(num_layers):
        _, scores = scorer.expand(picked, [layer for layer in kept if layer not in picked])
        best = min(scores, key=lambda layer: (scores[layer].cost, layer))
        picked.append(best)
        trace.append({"picked": best, "scores": {layer: score.value for layer, score in scores.items()}})
    return picked, trace


def beam(scorer: SetScorer, kept: list[int], num_layers: int, options: dict[str, Any]) -> tuple[list[int], list[dict]]:
    """Keeps the best `beam_width` sets of each size; width 1 is the greedy search."""
    if options["beam_width"] < 1:
        raise ValueError(f"beam_width must be at least 1, got {options['beam_width']}.")
    sets: list[tuple[int, ...]] = [()]
    trace = []
    for _ in range(num_layers):
        scores: dict[tuple[int, ...], Score] = {}
        for base in sets:
            fresh = [layer for layer in kept if layer not in base and tuple(sorted((*base, layer))) not in scores]
            _, found = scorer.expand(base, fresh)
            scores.update({tuple(sorted((*base, layer))): score for layer, score in found.items()})
        sets = cheapest(scores)[: options["beam_width"]]
        trace.append(round_of_sets(sets[0], scores))
    return list(sets[0]), trace


def exhaustive(
    scorer: SetScorer, kept: list[int], num_layers: int, options: dict[str, Any]
) -> tuple[list[int], list[dict]]:
    """All C(l, N) sets; those that share all but their last layer share one pass."""
    scores: dict[tuple[int, ...], Score] = {}
    for base in combinations(kept, num_layers - 1):
        last = [layer for layer in kept if not base or layer > base[-1]]
        if last:
            _, found = scorer.expand(base, last)
            scores.update({(*base, layer): score for layer, score in found.items()})
    best = cheapest(scores)[0]
    return list(best), [round_of_sets(best, scores)]


def first(
    scorer: SetScorer, kept: list[int], num_layers: int, options: dict[str, Any]
) -> tuple[list[int], list[dict]]:
    """Baseline: the first N."""
    layers = tuple(kept[:num_layers])
    return list(layers), [round_of_sets(layers, {layers: scorer.score(layers)})]


def random(
    scorer: SetScorer, kept: list[int], num_layers: int, options: dict[str, Any]
) -> tuple[list[int], list[dict]]:
    """Baseline: `num_draws` random sets, all scored; the first is the selection."""
    draws = random_sets(kept, num_layers, options["num_draws"], options["seed"])
    return list(draws[0]), [round_of_sets(draws[0], {layers: scorer.score(layers) for layers in draws})]


SEARCHES = {"greedy": greedy, "racing": race, "beam": beam, "exhaustive": exhaustive, "first": first, "random": random}


def num_passes(search: str, num_kept: int, num_layers: int, beam_width: int = 3, num_draws: int = 1) -> int:
    """How many passes over the calibration images a search makes, for progress bars; of the beam, at most."""
    return {
        "greedy": num_layers,
        # At most.
        "racing": num_layers + 1,
        "beam": 1 + sum(min(beam_width, comb(num_kept, size)) for size in range(1, num_layers)),
        # Beside one for every set that has a successor, one for the dense model.
        "exhaustive": comb(num_kept - 1, num_layers - 1) + (num_layers > 1),
        "first": 2,
        "random": num_draws + 1,
    }[search]


def random_sets(kept: list[int], num_layers: int, num_draws: int, seed: int) -> list[tuple[int, ...]]:
    """`num_draws` different sorted sets of `num_layers` of the layers in `kept`, the same for the same seed."""
    if not 1 <= num_draws <= comb(len(kept), num_layers):
        raise ValueError(f"num_draws must be in [1, {comb(len(kept), num_layers)}], got {num_draws}.")
    generator = Random(seed)
    draws: list[tuple[int, ...]] = []
    while len(draws) < num_draws:
        draw = tuple(sorted(generator.sample(kept, num_layers)))
        if draw not in draws:
            draws.append(draw)
    return draws


def cheapest(scores: dict[tuple[int, ...], Score]) -> list[tuple[int, ...]]:
    """Sets from the least cost on; ties by their indices."""
    return sorted(scores, key=lambda layers: (scores[layers].cost, layers))


def round_of_sets(picked: tuple[int, ...], scores: dict[tuple[int, ...], Score]) -> dict[str, Any]:
    """One entry of a trace whose candidates are sets."""
    return {
        "picked": list(picked),
        "scores": {",".join(map(str, layers)): score.value for layers, score in scores.items()},
    }
