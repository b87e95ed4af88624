"""The prefix cache does what the naive way does."""

import naive_search
import pytest
import torch
from reference_vit import NUM_BLOCKS, Calls, batches, logits, nose, reference, stock_vit
from torch import nn

from hf_nose.criteria import CRITERIA
from hf_nose.modeling_nose_vit import NoseViTForImageClassification, NoseViTModel
from hf_nose.prefixes import block_inputs
from hf_nose.scoring import SetScorer


@pytest.mark.parametrize("mask", ["skip", "double"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_one_set_scores_as_the_naive_forward(criterion, mask):
    scorer = SetScorer(nose(), batches(), criterion, mask)
    for layers in ((), (3,), (5, 0), (1, 2, 4)):
        score = scorer.score(layers)
        expected = naive_search.value(layers, criterion, mask)
        assert score.value == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert score.cost == pytest.approx(naive_search.cost(expected, criterion, "absolute"), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("target", ["logits", "features"])
def test_expanding_scores_the_base_and_every_candidate(target):
    scorer = SetScorer(nose(), batches(), target=target)
    base, scores = scorer.expand([4, 1], [0, 2, 5])
    assert base.value == pytest.approx(naive_search.value([1, 4], "transfer_entropy", target=target), rel=1e-9)
    assert list(scores) == [0, 2, 5]
    for layer, score in scores.items():
        expected = naive_search.value([1, 4, layer], "transfer_entropy", target=target)
        assert score.value == pytest.approx(expected, rel=1e-9)


def test_the_first_expansion_scores_against_the_dense_model():
    fresh, warm = SetScorer(nose(), batches()), SetScorer(nose(), batches())
    warm.score(())
    assert fresh.expand([2], [3]) == warm.expand([2], [3])


def test_a_target_of_ones_own():
    own = SetScorer(nose(), batches(), target=lambda outputs: outputs.logits)
    assert own.score([2]) == SetScorer(nose(), batches()).score([2])


@pytest.mark.parametrize("target", ["logits", "features"])
def test_the_prefix_cache_does_the_forwards_that_method_counts(target):
    """METHOD section 3: 367 per batch for five of 12 when [3, 5, 1, 8, 7] are picked, against 612 naively."""
    model = NoseViTForImageClassification.from_vit(stock_vit(blocks=12))
    scorer = SetScorer(model, batches((2, 1)), target=target)
    picked: list[int] = []
    expected = 0
    with Calls(model.vit.layers) as calls, Calls([model.vit.embeddings]) as starts:
        for layer in (3, 5, 1, 8, 7):
            candidates = [index for index in range(12) if index not in picked]
            scorer.expand(picked, candidates)
            expected += 12 + sum(12 - index for index in candidates)
            picked.append(layer)
    assert expected == 367
    assert calls.count == scorer.block_forwards == 2 * 367
    assert starts.count == 2 * 5


def test_masked_candidates_compute_no_attention():
    model = nose()
    scorer = SetScorer(model, batches((2,)))
    scorer.score(())
    with Calls([block.attention for block in model.vit.layers]) as calls:
        scorer.expand([1, 4], [0, 3])
    # The base: 4 of 6; candidate 0: blocks 0-5 without 0, 1, 4; candidate 3: blocks 3-5 without 3, 4.
    assert calls.count == 4 + 3 + 1


def test_images_are_counted_once():
    scorer = SetScorer(nose(), batches((4, 4, 3)))
    scorer.expand((), [1])
    scorer.expand([1], [2])
    assert scorer.num_images == 11


def test_scoring_runs_in_evaluation_mode_and_leaves_the_model_as_it_was():
    model = nose(drop_path_rate=0.5).train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    score = SetScorer(model, batches()).score([2])
    assert score == SetScorer(nose(), batches()).score([2])
    assert model.training and all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert [block.gain for block in model.vit.layers] == [None] * NUM_BLOCKS


def test_a_model_already_compressed_is_scored_from_where_it_stands():
    scorer = SetScorer(nose([2]), batches())
    assert scorer.score(()).value == 0.0
    dense, masked = naive_search.outputs((2,), "skip")["logits"], naive_search.outputs((2, 4), "skip")["logits"]
    expected = sum(float(torch.tensor(each.std(0)).log().sum()) * sign for each, sign in ((dense, 1), (masked, -1)))
    assert scorer.score([4]).value == pytest.approx(expected, rel=1e-9)


def test_block_inputs_are_in_order():
    model = nose()
    pixel_values = batches()[0]["pixel_values"]
    with block_inputs(model.vit.layers) as inputs:
        logits(model, pixel_values)
    expected = [block["input"] for block in reference(stock_vit(), pixel_values)["blocks"]]
    assert all(torch.equal(a, b) for a, b in zip(inputs, expected, strict=True))
    logits(model, pixel_values)
    assert len(inputs) == NUM_BLOCKS


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_a_wrapper_changes_nothing():
    assert SetScorer(Wrapper(nose()), batches()).expand([1], [3]) == SetScorer(nose(), batches()).expand([1], [3])


def test_features_need_no_head():
    bare = NoseViTModel.from_vit(stock_vit())
    expected = SetScorer(nose(), batches(), target="features").score([1])
    assert SetScorer(bare, batches(), target="features").score([1]) == expected


@pytest.mark.parametrize(
    "option, value",
    [("criterion", "entropy"), ("mask", "triple"), ("sign", "negative"), ("target", "pixels")],
)
def test_unknown_options_name_the_known_ones(option, value):
    with pytest.raises(ValueError, match=f"{option} must be .*got {value!r}"):
        SetScorer(nose(), batches(), **{option: value})


@pytest.mark.parametrize("criterion", ["loss", "accuracy"])
def test_labels_must_be_there_where_they_are_needed(criterion):
    bare = [{"pixel_values": batch["pixel_values"]} for batch in batches()]
    with pytest.raises(ValueError, match=f"criterion '{criterion}' needs `labels` in every batch"):
        SetScorer(nose(), bare, criterion).score([1])
    SetScorer(nose(), bare, "prediction_kl").score([1])


@pytest.mark.parametrize("nothing", [[], iter(())], ids=["list", "spent iterator"])
def test_no_batches(nothing):
    with pytest.raises(ValueError, match="batches is empty"):
        SetScorer(nose(), nothing).score(())


@pytest.mark.parametrize("criterion", ["transfer_entropy", "loss", "prediction_kl"])
def test_nan_names_the_batch(criterion):
    bad = batches()
    bad[1]["pixel_values"][0, 0, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="Calibration batch 1"):
        SetScorer(nose(), bad, criterion).score(())
