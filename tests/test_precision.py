"""Scoring in bfloat16, and what it says of its error."""

import pytest
import torch
from process_pair import run_on_two
from reference_vit import NUM_BLOCKS, Calls, batches, nose

from hf_nose.precision import CheckedScorer
from hf_nose.scoring import SetScorer
from hf_nose.selection import Selection, select_attention_layers


OPTIONS = [{}, {"criterion": "prediction_kl"}, {"target": "features"}, {"stack_candidates": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bfloat16_scores_differ_a_little(options):
    half = select_attention_layers(nose(), batches(), 2, bf16=True, **options)
    full = select_attention_layers(nose(), batches(), 2, **options)
    before = [value for step in full.trace[:1] for value in step["scores"].values()]
    after = [value for step in half.trace[:1] for value in step["scores"].values()]
    assert after != before and after == pytest.approx(before, rel=0.2, abs=0.2)
    assert full.precision is None


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_error_is_measured_on_the_first_batch(options):
    found = select_attention_layers(nose(), batches((6, 4)), 2, bf16=True, **options)
    pair = [SetScorer(nose(), batches((6, 4))[:1], bf16=bf16, **options) for bf16 in (True, False)]
    differences, same = [], []
    for base in ((), tuple(found.layers[:1])):
        candidates = [layer for layer in range(NUM_BLOCKS) if layer not in base]
        (ours, half), (exact, full) = (scorer.expand(base, candidates) for scorer in pair)
        differences += [abs(half[layer].value - full[layer].value) for layer in candidates]
        differences += [abs(ours.value - exact.value)] if base else []
        same.append(min(candidates, key=lambda i: half[i].cost) == min(candidates, key=lambda i: full[i].cost))
    assert found.precision == {
        "dtype": "bfloat16",
        "num_images": 6,
        "num_sets": 6 + 1 + 5,
        "largest_difference": max(differences),
        "mean_difference": pytest.approx(sum(differences) / len(differences), rel=1e-12),
        "rounds": 2,
        "rounds_of_same_pick": sum(same),
    }
    assert found.precision["largest_difference"] > 0


def test_a_model_in_bfloat16_already_is_off_by_nothing():
    """Then autocast changes nothing, and a difference of zero is told as such."""
    model = nose().to(torch.bfloat16)
    images = batches(dtype=torch.bfloat16)
    assert select_attention_layers(model, images, 2, bf16=True).precision["largest_difference"] == pytest.approx(
        0, abs=0.05
    )


@pytest.mark.parametrize("search", ["beam", "exhaustive", "first", "random", "racing"])
def test_every_search_measures_it(search):
    found = select_attention_layers(nose(), batches(), 2, search=search, bf16=True)
    assert found.precision["num_images"] == 4 and found.precision["num_sets"] > 0
    assert found.precision["largest_difference"] > 0


def test_the_comparison_counts_as_work():
    model = nose()
    scorer = CheckedScorer(model, batches())
    with Calls(model.vit.layers) as calls:
        scorer.expand((), [1, 3])
    # Three batches, and the first one twice again.
    assert calls.count == scorer.block_forwards == 5 * (6 + 5 + 3)


def test_batches_that_are_no_sequence():
    class Stream:
        def __iter__(self):
            return iter(batches())

    found = select_attention_layers(nose(), Stream(), 2, bf16=True)
    assert found.precision == select_attention_layers(nose(), batches(), 2, bf16=True).precision


def test_json_round_trip(tmp_path):
    found = select_attention_layers(nose(), batches(), 2, bf16=True)
    found.to_json(tmp_path / "selection.json")
    assert Selection.from_json(tmp_path / "selection.json") == found


def score_on_rank(rank: int, world_size: int) -> Selection:
    return select_attention_layers(nose(), batches(), 2, bf16=True, rank=rank, world_size=world_size)


@pytest.mark.slow
def test_two_processes_measure_the_same(tmp_path):
    one, both = score_on_rank(0, 1), run_on_two(score_on_rank, tmp_path)
    assert both[0].precision == both[1].precision == one.precision
