"""Searches against a naive search, on one process and two."""

import copy
import json
from itertools import combinations
from math import comb

import naive_search
import pytest
import torch
from process_pair import run_on_two
from reference_vit import NUM_BLOCKS, Calls, batches, nose, stock_vit

from hf_nose.criteria import CRITERIA
from hf_nose.entropy import layer_profile
from hf_nose.modeling_nose_vit import NoseViTForImageClassification
from hf_nose.selection import Selection, num_passes, random_sets, select_attention_layers


EVERY = [
    *[("transfer_entropy", mask, sign, target)
      for mask in ("skip", "double") for sign in ("absolute", "signed") for target in ("logits", "features")],
    *[(criterion, mask, "absolute", "features" if criterion in ("channelwise", "gaussian_kl") else "logits")
      for criterion in CRITERIA if criterion != "transfer_entropy" for mask in ("skip", "double")],
    ("accuracy", "skip", "signed", "logits"),
]  # fmt: skip


def costs(criterion: str, mask: str, size: int) -> dict[tuple[int, ...], float]:
    return {
        layers: naive_search.cost(naive_search.value(layers, criterion, mask), criterion, "absolute")
        for layers in combinations(range(NUM_BLOCKS), size)
    }


# Greedy


@pytest.mark.parametrize("criterion, mask, sign, target", EVERY)
def test_greedy_equals_the_naive_search(criterion, mask, sign, target):
    found = select_attention_layers(nose(), batches(), 3, criterion=criterion, mask=mask, sign=sign, target=target)
    expected = naive_search.greedy(3, criterion, mask, sign, target)
    assert found.layers == [step["picked"] for step in expected]
    assert [step["picked"] for step in found.trace] == found.layers
    for step, naive in zip(found.trace, expected, strict=True):
        assert list(step["scores"]) == list(naive["scores"])
        for layer, value in step["scores"].items():
            assert value == pytest.approx(naive["scores"][layer], rel=1e-9, abs=1e-13)
    assert (found.criterion, found.mask, found.sign, found.target) == (criterion, mask, sign, target)


def test_the_cases_above_tell_signs_masks_and_targets_apart():
    """Otherwise an option that is ignored would pass them."""
    picks = {case: tuple(step["picked"] for step in naive_search.greedy(3, *case)) for case in EVERY[:8]}
    for index in (1, 2, 3):
        for case, found in picks.items():
            others = [
                other
                for other in picks
                if all(a == b for i, (a, b) in enumerate(zip(case, other, strict=True)) if i != index)
            ]
            if any(picks[other] != found for other in others):
                break
        else:
            pytest.fail(f"no case depends on option {index}")


def test_greedy_does_the_forwards_that_method_counts():
    model = nose()
    with Calls(model.vit.layers) as calls:
        found = select_attention_layers(model, batches((2, 1)), 4)
    expected, picked = 0, []
    for layer in found.layers:
        expected += NUM_BLOCKS + sum(NUM_BLOCKS - index for index in range(NUM_BLOCKS) if index not in picked)
        picked.append(layer)
    assert calls.count == found.block_forwards == 2 * expected


def test_ties_go_to_the_lower_index():
    """Two layers whose attention adds nothing have the same TE, 0."""
    stock = copy.deepcopy(stock_vit())
    with torch.no_grad():
        for layer in (4, 2):
            stock.vit.layers[layer].attention.o_proj.weight.zero_()
            stock.vit.layers[layer].attention.o_proj.bias.zero_()
    model = NoseViTForImageClassification.from_vit(stock)
    found = select_attention_layers(model, batches(), 2)
    assert found.layers == [2, 4]
    assert found.trace[0]["scores"][2] == found.trace[0]["scores"][4] == 0.0
    for search, width in (("beam", 1), ("beam", 3), ("exhaustive", 1)):
        assert select_attention_layers(model, batches(), 1, search=search, beam_width=width).layers == [2]


def test_only_kept_layers_are_candidates():
    model = nose([1])
    model.dilute([4])
    found = select_attention_layers(model, batches(), 2)
    assert list(found.trace[0]["scores"]) == [0, 2, 3, 5]
    assert not {1, 4} & set(found.layers)


def test_what_a_selection_tells():
    found = select_attention_layers(nose(), batches((4, 4, 3)), 2)
    dense = torch.from_numpy(naive_search.outputs((), "skip")["logits"])
    assert found.reference["entropy"] == pytest.approx(float(dense.std(0, correction=0).log().sum()), rel=1e-9)
    assert found.reference["constant_channels"] == 0
    assert (found.search, found.num_images, found.num_processes) == ("greedy", 11, 1)
    assert found.seconds > 0
    assert select_attention_layers(nose(), batches(), 1, criterion="loss").reference["entropy"] is None
    assert select_attention_layers(nose(), batches(), 1, target=lambda out: out.logits).target == "custom"


def test_the_model_is_left_dense():
    model = nose()
    select_attention_layers(model, batches(), 2, mask="double")
    assert [block.gain for block in model.vit.layers] == [None] * NUM_BLOCKS
    assert model.config.removed_attention_layers == model.config.diluted_attention_layers == []


# Beam and exhaustive


@pytest.mark.parametrize("criterion", ["transfer_entropy", "prediction_kl", "accuracy"])
def test_a_beam_of_one_is_the_greedy_search(criterion):
    beam = select_attention_layers(nose(), batches(), 4, criterion=criterion, search="beam", beam_width=1)
    greedy = select_attention_layers(nose(), batches(), 4, criterion=criterion)
    assert beam.layers == sorted(greedy.layers)
    for size, (ours, theirs) in enumerate(zip(beam.trace, greedy.trace, strict=True)):
        before = greedy.layers[:size]
        assert ours["picked"] == sorted([*before, theirs["picked"]])
        assert ours["scores"] == {
            ",".join(map(str, sorted([*before, layer]))): value for layer, value in theirs["scores"].items()
        }


def test_a_beam_keeps_the_best_sets_of_each_size():
    found = select_attention_layers(nose(), batches(), 3, search="beam", beam_width=2)
    kept = [()]
    for size in (1, 2, 3):
        known = costs("transfer_entropy", "skip", size)
        reached = [layers for layers in known if any(set(base) < set(layers) for base in kept)]
        assert sorted(found.trace[size - 1]["scores"]) == sorted(",".join(map(str, layers)) for layers in reached)
        kept = sorted(reached, key=known.get)[:2]
        assert found.trace[size - 1]["picked"] == list(kept[0])
    assert found.layers == list(kept[0])


def test_a_beam_wide_enough_is_exhaustive():
    wide = select_attention_layers(nose(), batches(), 3, search="beam", beam_width=comb(NUM_BLOCKS, 3))
    assert wide.layers == select_attention_layers(nose(), batches(), 3, search="exhaustive").layers


@pytest.mark.parametrize(
    "criterion, mask", [("transfer_entropy", "skip"), ("transfer_entropy", "double"), ("loss", "skip")]
)
@pytest.mark.parametrize("size", [1, 3, 5])
def test_exhaustive_finds_the_optimum(criterion, mask, size):
    found = select_attention_layers(nose(), batches(), size, criterion=criterion, search="exhaustive", mask=mask)
    known = costs(criterion, mask, size)
    assert found.layers == list(min(known, key=known.get))
    (step,) = found.trace
    assert len(step["scores"]) == comb(NUM_BLOCKS, size)
    for layers in known:
        expected = naive_search.value(layers, criterion, mask)
        assert step["scores"][",".join(map(str, layers))] == pytest.approx(expected, rel=1e-9, abs=1e-13)


# Baselines


def test_first():
    found = select_attention_layers(nose([0]), batches(), 3, search="first")
    assert found.layers == [1, 2, 3] and list(found.trace[0]["scores"]) == ["1,2,3"]


def test_random_sets_repeat_by_seed_and_differ_between_seeds():
    kept = list(range(12))
    draws = [random_sets(kept, 5, 4, seed) for seed in range(20)]
    assert draws == [random_sets(kept, 5, 4, seed) for seed in range(20)]
    assert len({tuple(each) for each in draws}) == 20
    for each in draws:
        assert len(each) == 4
        for layers in each:
            assert len(set(layers)) == 5 and list(layers) == sorted(layers) and set(layers) <= set(kept)
    assert random_sets(kept, 5, 2, 3) == random_sets(kept, 5, 4, 3)[:2]
    assert {layer for each in draws for layers in each for layer in layers} == set(kept)


def test_random_selection_scores_every_draw():
    found = select_attention_layers(nose(), batches(), 2, search="random", num_draws=3, seed=5)
    draws = random_sets(list(range(NUM_BLOCKS)), 2, 3, 5)
    assert found.layers == list(draws[0])
    assert found.trace[0]["scores"] == {
        ",".join(map(str, layers)): pytest.approx(naive_search.value(layers, "transfer_entropy"), rel=1e-9)
        for layers in draws
    }
    assert found.layers == select_attention_layers(nose(), batches(), 2, search="random", seed=5).layers


# Bad options


@pytest.mark.parametrize("number", [0, -1, 6, 7])
def test_number_of_layers_out_of_range(number):
    with pytest.raises(ValueError, match=rf"num_layers must be in \[1, 5\], got {number}: .*sees no patch"):
        select_attention_layers(nose(), batches(), number)


def test_number_of_layers_counts_only_those_kept():
    with pytest.raises(ValueError, match=r"in \[1, 3\], got 4"):
        select_attention_layers(nose([0, 1]), batches(), 4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"search": "genetic"}, "search must be one of .*got 'genetic'"),
        ({"search": "beam", "beam_width": 0}, "beam_width must be at least 1, got 0"),
        ({"search": "random", "num_draws": 0}, r"num_draws must be in \[1, \d+\], got 0"),
        ({"criterion": "entropy"}, "criterion must be one of"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        select_attention_layers(nose(), batches(), 2, **options)


def test_batches_that_cannot_be_read_twice():
    with pytest.raises(ValueError, match="batches is empty"):
        select_attention_layers(nose(), iter(batches()), 2)


# Files


def test_a_record_of_before_there_were_races(tmp_path):
    found = select_attention_layers(nose(), batches(), 2)
    found.to_json(tmp_path / "selection.json")
    record = json.loads((tmp_path / "selection.json").read_text())
    del record["confidence"], record["precision"]
    (tmp_path / "selection.json").write_text(json.dumps(record))
    assert Selection.from_json(tmp_path / "selection.json") == found


@pytest.mark.parametrize("search", ["greedy", "beam", "exhaustive", "first", "random"])
def test_json_round_trip(tmp_path, search):
    found = select_attention_layers(nose(), batches(), 2, search=search)
    found.to_json(tmp_path / "selection.json", calibration={"num_images": 11})
    assert Selection.from_json(tmp_path / "selection.json") == found
    record = json.loads((tmp_path / "selection.json").read_text())
    assert record["num_layers"] == 2 and record["calibration"] == {"num_images": 11}
    assert record["schema"] == 1 and "torch" in record["versions"]


# Two processes


def select_on_rank(rank: int, world_size: int) -> list[Selection]:
    return [
        select_attention_layers(
            nose(), batches((4, 4, 3)), 3, criterion=criterion, search=search, rank=rank, world_size=world_size
        )
        for criterion in CRITERIA
        for search in ("greedy", "beam")
    ]


@pytest.mark.slow
def test_two_processes_select_the_layers_of_one(tmp_path):
    one, both = select_on_rank(0, 1), run_on_two(select_on_rank, tmp_path)
    for alone, first, second in zip(one, *both, strict=True):
        assert first.layers == second.layers == alone.layers
        # The same bits on every rank, and those of one process to 1e-9.
        assert first.trace == second.trace and first.reference == second.reference
        assert (first.num_images, first.num_processes) == (11, 2)
        assert first.block_forwards + second.block_forwards == alone.block_forwards
        for ours, theirs in zip(first.trace, alone.trace, strict=True):
            assert ours["picked"] == theirs["picked"]
            assert ours["scores"] == pytest.approx(theirs["scores"], rel=1e-9, abs=1e-13)


def more_ranks_than_batches(rank: int, world_size: int) -> Selection:
    return select_attention_layers(nose(), batches((4,)), 2, rank=rank, world_size=world_size)


@pytest.mark.slow
def test_a_rank_without_batches(tmp_path):
    both = run_on_two(more_ranks_than_batches, tmp_path)
    alone = more_ranks_than_batches(0, 1)
    assert [each.layers for each in both] == [alone.layers] * 2
    assert both[0].trace == both[1].trace == alone.trace


def test_random_draws_are_all_different_and_no_more_than_there_are():
    assert sorted(random_sets([0, 1, 2], 2, 3, seed=5)) == [(0, 1), (0, 2), (1, 2)]
    with pytest.raises(ValueError, match=r"num_draws must be in \[1, 3\], got 4"):
        random_sets([0, 1, 2], 2, 4, seed=5)


class CountedBatches(list):
    """Counts how often its first batch is taken: once a pass."""

    passes = 0

    def __getitem__(self, index):
        self.passes += index == 0
        return super().__getitem__(index)


@pytest.mark.parametrize("num_layers", [1, 2, 3, NUM_BLOCKS - 1])
@pytest.mark.parametrize("search", ["greedy", "beam", "exhaustive", "first", "random"])
def test_number_of_passes(search, num_layers):
    counted = CountedBatches(batches())
    select_attention_layers(nose(), counted, num_layers, search=search, beam_width=2, num_draws=3)
    assert counted.passes == num_passes(search, NUM_BLOCKS, num_layers, beam_width=2, num_draws=3)


def nan_on_rank_one(rank: int, world_size: int) -> list[str]:
    bad = batches((4, 4, 3))
    bad[1]["pixel_values"][0, 0, 0, 0] = float("nan")
    messages = []
    for work in (
        lambda: select_attention_layers(nose(), bad, 2, rank=rank, world_size=world_size),
        lambda: select_attention_layers(nose(), bad, 2, criterion="loss", rank=rank, world_size=world_size),
        lambda: layer_profile(nose(), bad, rank=rank, world_size=world_size),
    ):
        with pytest.raises(FloatingPointError) as caught:
            work()
        messages.append(str(caught.value))
    return messages


@pytest.mark.slow
def test_nan_on_one_rank_stops_both(tmp_path):
    first, second = run_on_two(nan_on_rank_one, tmp_path)
    assert first == second
    assert all(message.startswith("Calibration batch 1: ") and "NaN" in message for message in first)
