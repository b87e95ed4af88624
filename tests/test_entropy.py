"""Moments merge exactly; the layer profile against one written here."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from process_pair import run_on_two
from reference_vit import NUM_BLOCKS, batches, nose, reference, stock_vit

from hf_nose.entropy import Moments, evaluating, layer_profile, stream_growth
from hf_nose.modeling_nose_vit import NoseViTModel
from hf_nose.surgery import fold


PARTS = ("attention", "mlp")
features = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 40), st.integers(1, 5)),
    elements=st.floats(-1e3, 1e3, allow_subnormal=False).map(lambda value: round(value, 6)),
)


# Moments


@given(values=features, data=st.data())
def test_moments_merge_in_any_split_and_order(values, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(values)), max_size=6)))
    parts = [Moments().update(torch.from_numpy(part)) for part in np.split(values, cuts)]
    parts = data.draw(st.permutations(parts))
    while len(parts) > 1:
        # Any tree of merges, not only a chain.
        left, right = data.draw(st.permutations(range(len(parts))))[:2]
        merged = Moments().merge(parts[left]).merge(parts[right])
        parts = [part for index, part in enumerate(parts) if index not in (left, right)] + [merged]
    whole = parts[0]
    scale = max(1.0, np.abs(values).max())
    assert whole.count == len(values)
    np.testing.assert_allclose(whole.mean.numpy(), values.mean(0), rtol=1e-12, atol=1e-12 * scale)
    np.testing.assert_allclose((whole.m2 / whole.count).numpy(), values.var(0), rtol=1e-12, atol=1e-12 * scale**2)
    varies = values.std(0) > 1e-6 * scale
    np.testing.assert_allclose(whole.std().numpy()[varies], values.std(0)[varies], rtol=1e-9)


def test_moments_of_a_large_mean_and_a_small_deviation():
    """Where a sum of squares loses everything."""
    values = 1e8 + np.random.default_rng(0).standard_normal((1000, 3)) * 1e-3
    moments = Moments()
    for part in np.split(values, [100, 450, 451]):
        moments.update(torch.from_numpy(part))
    np.testing.assert_allclose(moments.std().numpy(), values.std(0), rtol=1e-5)


def test_moments_accumulate_in_float64():
    values = torch.randn(5000, 2, generator=torch.Generator().manual_seed(0)) + 1000
    moments = Moments()
    for part in values.split(7):
        moments.update(part)
    np.testing.assert_allclose(moments.std().numpy(), values.double().numpy().std(0), rtol=1e-12)


def test_every_leading_dimension_counts_as_samples():
    values = torch.randn(3, 4, 5, 2, dtype=torch.float64)
    moments = Moments().update(values)
    assert moments.count == 60
    np.testing.assert_allclose(moments.std().numpy(), values.reshape(60, 2).numpy().std(0), rtol=1e-12)


def test_the_deviation_is_that_of_the_population():
    assert Moments().update(torch.tensor([[0.0], [2.0]])).std().tolist() == [1.0]


def test_entropy_is_the_sum_of_log_deviations():
    moments = Moments().update(torch.tensor([[0.0, 0.0], [2.0, 2 * math.e**3]], dtype=torch.float64))
    assert moments.entropy() == pytest.approx(0.0 + 3.0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_constant_channel_floors_and_is_counted(dtype):
    """0.1 is no binary fraction: its sums must not leave a deviation behind."""
    moments = Moments()
    for size in (7, 1, 5):
        part = torch.stack([torch.full((size,), 0.1), torch.arange(size) + float(size)], 1).to(dtype)
        moments.update(part)
    tiny = torch.finfo(dtype).tiny
    assert moments.constant_channels == 1
    assert moments.floor == tiny and moments.std()[0] == tiny
    varying = float(moments.std()[1])
    assert moments.entropy() == pytest.approx(math.log(tiny) + math.log(varying))
    assert math.isfinite(moments.entropy())


def test_one_sample_is_constant():
    moments = Moments().update(torch.randn(1, 3))
    assert moments.constant_channels == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("row", [0, 2])
def test_what_is_not_finite_raises(bad, row):
    values = torch.zeros(3, 2)
    values[row, 1] = bad
    moments = Moments().update(torch.ones(2, 2))
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        moments.update(values)
    assert moments.count == 2


def test_no_samples_have_no_entropy():
    for empty in (Moments(), Moments().update(torch.zeros(0, 3)), Moments().merge(Moments())):
        assert empty.count == 0
        with pytest.raises(ValueError, match="calibration set is empty"):
            empty.entropy()


def test_other_channels_do_not_merge():
    with pytest.raises(ValueError, match="must have 2 channels, got 3"):
        Moments().update(torch.zeros(2, 2)).update(torch.zeros(2, 3))


def test_merging_leaves_the_other_alone():
    left, right = Moments().update(torch.randn(4, 2)), Moments().update(torch.randn(3, 2))
    before = right.mean.clone(), right.m2.clone(), right.count
    Moments().merge(right).merge(left)
    assert torch.equal(right.mean, before[0]) and torch.equal(right.m2, before[1]) and right.count == before[2]


@pytest.mark.parametrize("mode", [True, False])
def test_evaluating_gives_the_mode_back(mode):
    model = nose().train(mode)
    with pytest.raises(KeyError), evaluating(model):
        assert not model.vit.layers[0].training
        raise KeyError
    assert model.training == model.vit.layers[0].training == mode


# The layer profile, against features collected whole


def naive_profile(rules=None, tokens: str = "all") -> list[dict]:
    """H of every layer from the features of all batches at once, by numpy."""
    stock = stock_vit(dtype=torch.float64)
    collected: dict[tuple, list] = {}
    for batch in batches(dtype=torch.float64):
        for layer, block in enumerate(reference(stock, batch["pixel_values"], rules)["blocks"]):
            for part in PARTS:
                for kind, name in (("stream", part), ("branch", f"{part}_branch")):
                    if block[name] is not None:
                        chosen = block[name][:, :1] if tokens == "class" else block[name]
                        collected.setdefault((layer, part, kind), []).append(chosen.reshape(-1, 24).numpy())

    def entropy(key):
        return np.log(np.concatenate(collected[key]).std(0)).sum() if key in collected else None

    return [
        {part: {kind: entropy((layer, part, kind)) for kind in ("stream", "branch")} for part in PARTS}
        for layer in range(NUM_BLOCKS)
    ]


def assert_profile(profile, expected):
    assert [row["layer"] for row in profile] == list(range(NUM_BLOCKS))
    for row, naive in zip(profile, expected, strict=True):
        for part in PARTS:
            for kind in ("stream", "branch"):
                wanted = naive[part][kind]
                assert row[part][kind] == (None if wanted is None else pytest.approx(wanted, rel=1e-9)), (row, kind)
                assert row[part][f"{kind}_constant_channels"] == (None if wanted is None else 0)


@pytest.mark.parametrize("tokens", ["all", "class"])
def test_profile_of_a_dense_model(tokens):
    profile = layer_profile(nose(dtype=torch.float64), batches(dtype=torch.float64), tokens)
    assert_profile(profile, naive_profile(tokens=tokens))
    for row in profile:
        for part in PARTS:
            assert row[part]["stream_scale_free"] == row[part]["stream"]
            assert row[part]["branch_scale_free"] == row[part]["branch"]


def test_profile_in_float32_is_close():
    profile = layer_profile(nose(), batches())
    for row, naive in zip(profile, naive_profile(), strict=True):
        assert row["mlp"]["stream"] == pytest.approx(naive["mlp"]["stream"], rel=1e-4)


def test_profile_of_a_model_with_layers_removed():
    profile = layer_profile(nose([1, 4], dtype=torch.float64), batches(dtype=torch.float64))
    assert_profile(profile, naive_profile({1: (0, 1), 4: (0, 1)}))
    assert profile[1]["attention"]["branch"] is None and profile[1]["attention"]["branch_scale_free"] is None


def diluted(value: float, compensation: bool = True):
    model = nose(dtype=torch.float64)
    model.dilute([1, 3], feature_compensation=compensation)
    model.set_mask(value)
    return model


@pytest.mark.parametrize("value", [0.5, 0.0])
@pytest.mark.parametrize("compensation", [True, False])
def test_profile_of_a_diluted_model(value, compensation):
    model = diluted(value, compensation)
    gain = 2 - value if compensation else 1
    profile = layer_profile(model, batches(dtype=torch.float64))
    rule = (value, gain) if value else (0, int(gain))
    assert_profile(profile, naive_profile({1: rule, 3: rule}))
    for layer, row in enumerate(profile):
        growth = gain ** sum(index <= layer for index in (1, 3))
        for part in PARTS:
            for kind in ("stream", "branch"):
                raw, free = row[part][kind], row[part][f"{kind}_scale_free"]
                assert free == (None if raw is None else pytest.approx(raw - 24 * math.log(growth), rel=1e-12))


def test_growth_is_the_product_of_two_minus_m():
    model = nose([0], feature_compensation=True, force=True)
    model.dilute([2, 4])
    model.dilute([5], feature_compensation=False)
    model.set_mask([0.25, 0.5, 0.75])
    assert stream_growth(model.vit) == [2.0, 2.0, 3.5, 3.5, 5.25, 5.25]


@pytest.mark.parametrize("tokens", ["all", "class"])
def test_folded_and_unfolded_profiles_are_the_same(tokens):
    model = diluted(0.0)
    before = layer_profile(model, batches(dtype=torch.float64), tokens)
    after = layer_profile(fold(model), batches(dtype=torch.float64), tokens)
    for one, other in zip(before, after, strict=True):
        for part in PARTS:
            for name, value in one[part].items():
                assert other[part][name] == (None if value is None else pytest.approx(value, rel=1e-9, abs=1e-9))


def test_slices_do_not_disturb_the_class_token():
    model = nose(dtype=torch.float64, chunk_size_feed_forward=7, chunk_size_attention=2)
    assert_profile(layer_profile(model, batches(dtype=torch.float64), "class"), naive_profile(tokens="class"))
    assert (model.config.chunk_size_feed_forward, model.config.chunk_size_attention) == (7, 2)


def test_a_profile_leaves_mode_and_hooks_as_they_were():
    model = nose(drop_path_rate=0.5).train()
    profile = layer_profile(model, batches())
    assert model.training and not any(module._forward_hooks for module in model.modules())
    assert profile == layer_profile(nose(), batches())


def test_a_bare_model_has_a_profile():
    bare = NoseViTModel.from_vit(stock_vit())
    assert layer_profile(bare, batches()) == layer_profile(nose(), batches())


def test_unknown_tokens_and_empty_batches():
    with pytest.raises(ValueError, match="tokens must be 'all' or 'class', got 'patch'"):
        layer_profile(nose(), batches(), "patch")
    with pytest.raises(ValueError, match="batches is empty"):
        layer_profile(nose(), [])


def test_nan_in_features_stops_the_profile():
    bad = batches()
    bad[1]["pixel_values"][0, 0, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError):
        layer_profile(nose(), bad)


# Two processes


def profile_on_rank(rank: int, world_size: int):
    return layer_profile(nose(), batches((4, 4, 3)), "all", rank, world_size)


@pytest.mark.slow
def test_two_processes_give_the_profile_of_one(tmp_path):
    both = run_on_two(profile_on_rank, tmp_path)
    assert both[0] == both[1]
    for one, other in zip(layer_profile(nose(), batches((4, 4, 3))), both[0], strict=True):
        for part in PARTS:
            assert other[part] == pytest.approx(one[part], rel=1e-9)
