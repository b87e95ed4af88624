"""Forwards that share their prefixes, between rounds and as one batch: fewer of them, and the same results."""

import naive_search
import pytest
import torch
from reference_vit import NUM_BLOCKS, Calls, batches, nose, stock_vit

from hf_nose.criteria import CRITERIA
from hf_nose.modeling_nose_vit import NoseViTForImageClassification
from hf_nose.prefixes import block_inputs, joining, nearest
from hf_nose.scoring import SetScorer
from hf_nose.selection import select_attention_layers


PICKS = (3, 5, 1, 8, 7)
# A state of `nose`: 17 tokens of 24 channels in float32.
STATE_BYTES = 17 * 24 * 4


def expand_all(scorer: SetScorer, picks=PICKS, blocks: int = 12) -> list:
    """The rounds of a greedy search that picks `picks`."""
    rounds = []
    for size in range(len(picks)):
        candidates = [layer for layer in range(blocks) if layer not in picks[:size]]
        rounds.append(scorer.expand(picks[:size], candidates))
    return rounds


def deep() -> NoseViTForImageClassification:
    return NoseViTForImageClassification.from_vit(stock_vit(blocks=12))


def count(picks, blocks: int = 12) -> int:
    """
    Block forwards a batch with all states kept: the first round as ever; then nothing for the base, and for every
    candidate the blocks from the last choice on, or from its own where that is later.
    """
    total = blocks + sum(blocks - layer for layer in range(blocks))
    for size, last in enumerate(picks[:-1], start=1):
        total += sum(blocks - max(layer, last) for layer in range(blocks) if layer not in picks[:size])
    return total


# From round to round


def test_kept_states_save_what_the_rounds_share():
    """278 a batch instead of 367, and 612 naively."""
    model = deep()
    scorer = SetScorer(model, batches((2, 1)), state_cache_gib=1)
    with Calls(model.vit.layers) as calls, Calls([model.vit.embeddings]) as starts:
        expand_all(scorer)
    assert count(PICKS) == 278
    assert calls.count == scorer.block_forwards == 2 * 278
    assert starts.count == 2


@pytest.mark.parametrize("mask", ["skip", "double"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_kept_states_change_no_bit(criterion, mask):
    options = {"criterion": criterion, "mask": mask}
    kept = select_attention_layers(nose(), batches(), 4, state_cache_gib=1, **options)
    fresh = select_attention_layers(nose(), batches(), 4, **options)
    assert kept.trace == fresh.trace and kept.reference == fresh.reference
    assert kept.block_forwards < fresh.block_forwards


@pytest.mark.parametrize("search", ["beam", "exhaustive", "random", "first"])
def test_other_searches_may_keep_states_too(search):
    kept, fresh = (
        select_attention_layers(nose(), batches(), 3, search=search, num_draws=4, state_cache_gib=gib)
        for gib in (1, 0)
    )
    assert kept.trace == fresh.trace and kept.block_forwards <= fresh.block_forwards


def test_bases_in_any_order():
    """A base that was not among the last sets, a smaller one, the same again: a start that is wrong would show."""
    warm, fresh = SetScorer(nose(), batches(), state_cache_gib=1), SetScorer(nose(), batches())
    for base in ((2,), (2,), (1, 2), (0, 4), (), (4,), (0, 2, 4), (1, 2, 3, 4, 5), (5,), (1, 3)):
        candidates = [layer for layer in range(NUM_BLOCKS) if layer not in base]
        assert warm.expand(base, candidates) == fresh.expand(base, candidates)


@pytest.mark.parametrize("stacks", [False, True])
def test_states_are_kept_only_while_they_fit(stacks):
    """Room for the first of three batches, of 4, 4 and 3 images."""
    states = NUM_BLOCKS + sum(NUM_BLOCKS - 1 - layer for layer in range(NUM_BLOCKS))
    budget = 4 * states * STATE_BYTES
    scorers = [
        SetScorer(nose(), batches(), state_cache_gib=size / 2**30, stack_candidates=stacks)
        for size in (0, budget - 1, budget, 3 * budget)
    ]
    found = [expand_all(scorer, (2, 4, 1), NUM_BLOCKS) for scorer in scorers]
    assert all(rounds == found[0] for rounds in found)
    counts = [scorer.block_forwards for scorer in scorers]
    # The last batch is smaller: where four images' states do not fit, three images' do.
    assert counts[0] > counts[1] == counts[2] > counts[3] == 3 * count((2, 4, 1), NUM_BLOCKS)
    for scorer, room in zip(scorers, (0, budget - 1, budget, 3 * budget), strict=True):
        paths = [path for kept in scorer.forwards._paths.values() for path in kept.values()]
        storages = {state.untyped_storage().data_ptr(): state.untyped_storage().nbytes() for p in paths for state in p}
        assert sum(storages.values()) <= room


def test_nearest():
    paths = {(): ["dense"] * 6, (4,): ["four"] * 6, (1,): ["one"] * 6, (2, 5): ["other"] * 6}
    assert nearest((1, 4), paths) == (4, paths[1,])
    assert nearest((1, 2), paths) == (2, paths[1,])
    assert nearest((0, 4), paths) == (0, paths[()])
    assert nearest((3,), paths) == (3, paths[()])
    # (2, 5) has the same first four inputs, but it is no subset: behind its last attention tokens may be missing.
    assert nearest((2, 4), paths) == (2, paths[()]) or nearest((2, 4), paths) == (2, paths[4,])
    assert nearest((2, 5), paths) == (5, paths[2, 5])
    assert nearest((1,), {}) == (0, [])


@pytest.mark.parametrize("gib", [-1, float("inf"), float("nan")])
def test_a_cache_size_out_of_range(gib):
    with pytest.raises(ValueError, match="state_cache_gib must be 0 or more, got"):
        SetScorer(nose(), batches(), state_cache_gib=gib)


# As one batch


@pytest.mark.parametrize("gib", [0, 1])
@pytest.mark.parametrize("mask", ["skip", "double"])
@pytest.mark.parametrize("criterion, target", [("transfer_entropy", "logits"), ("transfer_entropy", "features"),
                                               ("prediction_kl", "logits"), ("accuracy", "logits")])  # fmt: skip
def test_stacked_candidates_score_as_one_by_one(criterion, target, mask, gib):
    """In float64, where a larger batch rounds otherwise in the sixteenth digit."""
    model, images = nose(dtype=torch.float64), batches(dtype=torch.float64)
    options = {"criterion": criterion, "target": target, "mask": mask}
    stacked = select_attention_layers(model, images, 4, stack_candidates=True, state_cache_gib=gib, **options)
    single = select_attention_layers(model, images, 4, state_cache_gib=gib, **options)
    assert stacked.block_forwards == single.block_forwards
    for ours, theirs in zip(stacked.trace, single.trace, strict=True):
        assert ours["picked"] == theirs["picked"]
        assert ours["scores"] == pytest.approx(theirs["scores"], rel=1e-9, abs=1e-12)


def test_stacked_candidates_need_fewer_and_larger_calls():
    model, sizes = deep(), []
    hooks = [block.register_forward_hook(lambda *args: sizes.append(len(args[-1]))) for block in model.vit.layers]
    scorer = SetScorer(model, batches((2,)), stack_candidates=True)
    scorer.expand((), list(range(12)))
    for hook in hooks:
        hook.remove()
    # The base, each candidate's own block, and eleven blocks with one candidate more in front of each.
    assert len(sizes) == 12 + 12 + 11 and max(sizes) == 11 * 2
    assert sum(sizes) == 2 * scorer.block_forwards == 2 * (12 + 78)


def test_stacked_candidates_in_a_model_already_compressed():
    model = nose([2], dtype=torch.float64)
    model.dilute([4])
    model.set_mask(0.5)
    images = batches(dtype=torch.float64)
    stacked, single = (SetScorer(model, images, stack_candidates=stacks) for stacks in (True, False))
    for base, candidates in (((), [0, 1, 3, 5]), ((3,), [0, 1, 5]), ((1, 3), [0])):
        ours, theirs = stacked.expand(base, candidates), single.expand(base, candidates)
        for layer in candidates:
            assert ours[1][layer].value == pytest.approx(theirs[1][layer].value, rel=1e-9)


def test_stacked_candidates_with_eager_attention():
    model = nose(dtype=torch.float64)
    model.set_attn_implementation("eager")
    found = SetScorer(model, batches(dtype=torch.float64), stack_candidates=True).expand((1,), [0, 3, 5])[1]
    for layer, score in found.items():
        assert score.value == pytest.approx(naive_search.value((1, layer), "transfer_entropy"), rel=1e-3)


def tailed(dtype=torch.float64):
    return nose(dtype=dtype, class_token_tail=True)


@pytest.mark.parametrize("options", [{}, {"state_cache_gib": 1}, {"stack_candidates": True},
                                     {"stack_candidates": True, "state_cache_gib": 1}], ids=str)  # fmt: skip
@pytest.mark.parametrize("criterion, target", [("transfer_entropy", "logits"), ("transfer_entropy", "features"),
                                               ("prediction_kl", "logits")])  # fmt: skip
def test_the_tail_changes_no_score(criterion, target, options):
    """Down to one attention that is left, so that it begins everywhere."""
    images = batches(dtype=torch.float64)
    options = {"criterion": criterion, "target": target, **options}
    tail = select_attention_layers(tailed(), images, 5, class_token_tail=True, **options)
    whole = select_attention_layers(tailed(), images, 5, **options)
    assert tail.block_forwards == whole.block_forwards
    for ours, theirs in zip(tail.trace, whole.trace, strict=True):
        assert ours["picked"] == theirs["picked"]
        assert ours["scores"] == pytest.approx(theirs["scores"], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("stacks", [False, True])
@pytest.mark.parametrize("target", ["logits", "features"])
def test_the_tail_is_there_and_can_be_switched_off(target, stacks):
    tokens = {}
    for tail in (True, False):
        model, seen = tailed(), []
        model.vit.layernorm.register_forward_hook(lambda *args, seen=seen: seen.append(args[-1].shape[1]))
        options = {"class_token_tail": tail, "stack_candidates": stacks, "state_cache_gib": 1}
        select_attention_layers(model, batches(dtype=torch.float64), 3, target=target, **options)
        tokens[tail] = set(seen)
        assert model.config.class_token_tail is True
    assert tokens == {True: {1}, False: {17}}


def test_scores_without_the_tail_have_the_bits_of_a_model_without_it():
    with_tail, without = (nose(class_token_tail=tail) for tail in (True, False))
    assert (
        select_attention_layers(with_tail, batches(), 3).trace == select_attention_layers(without, batches(), 3).trace
    )


@pytest.mark.parametrize("stacks", [False, True])
def test_what_is_not_finite_leaves_the_model_as_it_was(stacks):
    model = nose()
    bad = batches()
    bad[1]["pixel_values"][0, 0, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="Calibration batch 1"):
        SetScorer(model, bad, stack_candidates=stacks).expand((), [0, 2])
    with torch.no_grad():
        # Only where candidate 2 is scored: its own block overflows.
        model.vit.layers[3].mlp.fc2.bias[0] = float("inf")
    with pytest.raises(FloatingPointError, match="Calibration batch 0"):
        SetScorer(model, batches(), stack_candidates=stacks).expand((), [0, 2])
    assert [block.gain for block in model.vit.layers] == [None] * NUM_BLOCKS
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.vit._start is None


def test_rows_join_in_front_of_a_module():
    layers = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity())
    long = torch.arange(12.0).reshape(2, 3, 2)
    with joining(list(layers), {1: long}), block_inputs(list(layers)) as inputs:
        assert torch.equal(layers(-long), torch.cat([-long, long]))
        # Where the class token is all that is left of those under way, it is all that joins.
        assert torch.equal(layers(-long[:, :1]), torch.cat([-long, long])[:, :1])
    assert [len(each) for each in inputs] == [2, 4, 2, 4]
    assert torch.equal(layers(long), long)
