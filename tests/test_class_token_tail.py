"""The class-token tail: what it leaves out changes no logit and no gradient, and nobody who asks misses it."""

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference_vit import NUM_BLOCKS, batches, images, logits, nose, stock_vit
from torch import nn
from transformers import ViTConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_nose import NoseViTBackbone, NoseViTConfig, NoseViTForImageClassification, NoseViTModel
from hf_nose.distillation import Distiller
from hf_nose.entropy import layer_profile
from hf_nose.profiling import count_macs
from hf_nose.scoring import SetScorer, block_inputs
from hf_nose.stream_nose_vit import class_token_mask
from hf_nose.surgery import fold


TOKENS = 17
LAST = NUM_BLOCKS - 1
KEPT, GONE = [1, 3], [3, LAST]
some_layers = st.sets(st.integers(0, LAST), min_size=1, max_size=LAST)
tolerances = pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-9)])


def tailed(*arguments, **options) -> NoseViTForImageClassification:
    return nose(*arguments, class_token_tail=True, **options)


def compressed(state: str, layers: list[int], **options) -> NoseViTForImageClassification:
    """A model in one of the states in which attention may be, by default with stochastic depth."""
    options = {"drop_path_rate": 0.3, "drop_path_schedule": "constant", **options}
    if state == "removed":
        return tailed(layers, **options)
    model = tailed(**options)
    if state != "dense":
        model.dilute(layers)
        model.set_mask(0.4 if state == "diluted" else 0.0)
    return fold(model) if state == "folded" else model


def with_tail(model, tail: bool):
    model = copy.deepcopy(model)
    model.config.class_token_tail = tail
    return model


def step(model, training: bool, dtype=torch.float32, **inputs):
    """Logits, gradients, and where the random numbers stand afterwards."""
    torch.manual_seed(0)
    output = model.train(training)(images(8, dtype=dtype), labels=torch.tensor([0, 1, 2, 4] * 2), **inputs)
    output.loss.backward()
    return output.logits.detach(), {n: p.grad for n, p in model.named_parameters()}, torch.get_rng_state()


def close(made: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    return bool((made - expected).norm() <= tolerance * expected.norm())


def assert_same_step(made, expected, tolerance: float) -> None:
    assert close(made[0], expected[0], tolerance)
    assert torch.equal(made[2], expected[2])
    whole = torch.stack([grad.norm() for grad in expected[1].values() if grad is not None]).norm()
    assert made[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        if grad is None:
            assert made[1][name] is None, name
        elif name.endswith("k_proj.bias"):
            # Softmax ignores what this adds to every score: its gradient is rounding (eager's softmax is in float32).
            assert max(made[1][name].norm(), grad.norm()) <= max(tolerance, 1e-7) * whole
        else:
            assert close(made[1][name], grad, tolerance), name


def block_tokens(model, call) -> list[int]:
    """How many tokens each block gave."""
    seen: list[int] = []
    handles = [block.register_forward_hook(lambda *args: seen.append(args[2].shape[1])) for block in model.vit.layers]
    try:
        with torch.no_grad():
            call()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def tail_of(model, start: int, call=None) -> bool:
    """Whether the tail begins in block `start`, and blocks before it give all tokens."""
    seen = block_tokens(model, call or (lambda: model(images())))
    return seen == [TOKENS] * start + [1] * (NUM_BLOCKS - start)


# The same function


@tolerances
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layers", [KEPT, GONE], ids=["last kept", "last gone"])
@pytest.mark.parametrize("state", ["dense", "diluted", "at zero", "removed", "folded"])
def test_no_logit_and_no_gradient_changes(state, layers, training, dtype, tolerance):
    model = compressed(state, layers, dtype=dtype)
    on, off = with_tail(model, True), with_tail(model, False)
    made, expected = step(on, training, dtype), step(off, training, dtype)
    assert_same_step(made, expected, tolerance)
    start = 4 if layers == GONE and state not in ("dense", "diluted") else LAST
    assert tail_of(on, start) and tail_of(off, NUM_BLOCKS)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("state", ["dense", "folded"])
def test_under_gradient_checkpointing(state, implementation):
    model = compressed(state, GONE, dtype=torch.float64)
    model.set_attn_implementation(implementation)
    expected = step(with_tail(model, False), True, torch.float64)
    model.activation_checkpointing_enable()
    assert_same_step(step(model, True, torch.float64), expected, 1e-9)


def test_under_autocast():
    model = compressed("diluted", KEPT).train()
    made = []
    for tail in (True, False):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            made.append(with_tail(model, tail)(images()).logits.detach())
    assert close(*made, 0.02)


@pytest.mark.parametrize("layers", [KEPT, GONE], ids=["last kept", "last gone"])
def test_every_parameter_has_a_part_in_every_step(layers):
    """Otherwise data-parallel training would wait for gradients that never come."""
    _, gradients, _ = step(compressed("removed", layers, drop_path_rate=0.0), True)
    assert [name for name, grad in gradients.items() if grad is None or not grad.any()] == []


# What is computed


@pytest.mark.parametrize("layers, start", [(KEPT, LAST), (GONE, 4), ([3, 4, LAST], 2)])
def test_the_last_attention_has_one_query_and_what_follows_one_token(layers, start):
    model = tailed(layers)
    seen: dict[str, list[int]] = {}
    for name, module in model.vit.named_modules():
        if isinstance(module, nn.Linear | nn.LayerNorm):
            module.register_forward_hook(lambda *args, name=name: seen.setdefault(name, []).append(args[2].shape[1]))
    logits(model, images())
    for layer in range(NUM_BLOCKS):
        full, later = (f"layers.{layer}.layernorm_before", "attention.k_proj", "attention.v_proj"), "mlp.fc1"
        names = [full[0], *(f"layers.{layer}.{name}" for name in full[1:])]
        if layer in layers:
            assert not any(name in seen for name in names)
        else:
            assert all(seen[name] == [TOKENS] for name in names)
            assert seen[f"layers.{layer}.attention.q_proj"] == [TOKENS if layer < start else 1]
            assert seen[f"layers.{layer}.attention.o_proj"] == [TOKENS if layer < start else 1]
        for name in ("layernorm_after", later, "mlp.fc2"):
            assert seen[f"layers.{layer}.{name}"] == [TOKENS if layer < start else 1]
    assert seen["layernorm"] == [1]


@pytest.mark.parametrize("mask", ["skip", "double"])
@given(layers=some_layers)
def test_masked_is_removed_bit_for_bit(mask, layers):
    model, removed = tailed(), tailed(layers, feature_compensation=mask == "double", force=True)
    start = max(set(range(NUM_BLOCKS)) - layers)
    with model.masked_attention(layers, mask):
        masked = logits(model, images())
        assert tail_of(model, start)
    assert torch.equal(masked, logits(removed, images())) and tail_of(removed, start)


@given(layers=some_layers, compensation=st.booleans())
def test_at_zero_is_removed_bit_for_bit(layers, compensation):
    model = tailed()
    model.dilute(layers, feature_compensation=compensation)
    assert tail_of(model, LAST)
    model.set_mask(0.0)
    made = logits(model, images())
    assert torch.equal(made, logits(tailed(layers, feature_compensation=compensation, force=True), images()))
    assert torch.equal(made, logits(fold(model), images()))
    assert tail_of(model, max(set(range(NUM_BLOCKS)) - layers))


def test_without_any_attention_only_the_class_token_goes_on():
    model = tailed()
    with model.masked_attention(range(NUM_BLOCKS)):
        assert tail_of(model, 0)
        made = logits(model, images())
        with model.all_tokens():
            assert torch.allclose(made, logits(model, images()), atol=1e-6)


@pytest.mark.parametrize("size, removed", [("T", []), ("B", [0, 1, 3, 4, 6]), ("S", [9, 11])])
def test_macs_of_the_tail(size, removed):
    hidden, heads = {"T": (192, 3), "S": (384, 6), "B": (768, 12)}[size]
    shape = {"hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": 4 * hidden, "num_labels": 1000}
    on, off = (
        count_macs(NoseViTConfig(removed_attention_layers=removed, class_token_tail=tail, **shape))["total"]
        for tail in (True, False)
    )
    others, last = 196, max(set(range(12)) - set(removed))
    # Queries, products and output of the last attention; MLP and norm of every block from there on; the last norm.
    attention = 2 * others * hidden**2 + 2 * others * 197 * hidden
    assert off - on == attention + (12 - last) * others * (8 * hidden**2 + 5 * hidden) + 5 * others * hidden
    if size == "B":
        # METHOD: what the arithmetic allows 40 % over a stock ViT.
        assert round(count_macs(ViTConfig(**shape))["total"] / on, 2) == 1.28


# Whoever asks sees all tokens


ASKING = {
    "all hidden states": {"output_hidden_states": True},
    "one hidden state": {"output_hidden_states": [2]},
    "attentions": {"output_attentions": True},
}


@pytest.mark.parametrize("by_config", [False, True], ids=["argument", "config"])
@pytest.mark.parametrize("asked", ASKING.values(), ids=ASKING)
def test_the_tail_is_absent_where_states_or_attentions_are_asked_for(asked, by_config):
    model, plain = tailed([LAST]), nose([LAST])
    for each in (model, plain):
        each.set_attn_implementation("eager")
        for name, value in asked.items() if by_config else ():
            setattr(each.config, name, value)
    given_ = {} if by_config else asked
    with torch.no_grad():
        made, expected = model(images(), **given_), plain(images(), **given_)
    assert torch.equal(made.logits, expected.logits)
    for name in ("hidden_states", "attentions"):
        pairs = zip(made[name] or (), expected[name] or (), strict=True) if name in made else ()
        assert all(a is b is None or torch.equal(a, b) for a, b in pairs)
    assert tail_of(model, NUM_BLOCKS, lambda: model(images(), **given_))
    if by_config:
        refused = dict.fromkeys(asked, False)
        assert tail_of(model, LAST - 1, lambda: model(images(), **refused))


def test_the_bare_model_and_the_backbone_give_all_tokens():
    model = tailed([LAST])
    assert tail_of(model, NUM_BLOCKS, lambda: model.vit(images()))
    assert model.vit(images()).last_hidden_state.shape[1] == TOKENS
    bare = NoseViTModel.from_vit(model)
    assert bare.config.class_token_tail and bare(images()).last_hidden_state.shape[1] == TOKENS
    on, off = (
        NoseViTBackbone.from_vit(stock_vit(), [LAST], out_indices=[1, NUM_BLOCKS], class_token_tail=tail)
        for tail in (True, False)
    )
    assert tail_of(on, NUM_BLOCKS, lambda: on(images()))
    maps = zip(on(images()).feature_maps, off(images()).feature_maps, strict=True)
    assert all(torch.equal(*pair) for pair in maps)


@pytest.mark.parametrize("name", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_draws_what_it_drew_without_the_tail(name):
    model = tailed(**{name: 0.2})
    on, off = with_tail(model, True), with_tail(model, False)
    made, expected = step(on, True), step(off, True)
    assert torch.equal(made[0], expected[0]) and torch.equal(made[2], expected[2])
    assert all(torch.equal(grad, expected[1][name]) for name, grad in made[1].items())
    assert tail_of(on.train(), NUM_BLOCKS) and tail_of(on.eval(), LAST)


def test_switched_off_within_a_context():
    model = tailed()
    with pytest.raises(KeyError), model.all_tokens():
        assert tail_of(model, NUM_BLOCKS)
        raise KeyError
    assert tail_of(model, LAST)
    plain = nose()
    with plain.all_tokens():
        pass
    assert tail_of(plain, NUM_BLOCKS)


@pytest.mark.parametrize("tail", [True, False])
def test_the_switch_is_saved(tmp_path, tail):
    model = with_tail(tailed(), tail)
    model.save_pretrained(tmp_path)
    loaded = NoseViTForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.class_token_tail is tail and tail_of(loaded, LAST if tail else NUM_BLOCKS)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    asked = NoseViTForImageClassification.from_pretrained(tmp_path, class_token_tail=not tail)
    assert tail_of(asked, NUM_BLOCKS if tail else LAST)


def test_checkpoints_from_before_have_a_tail(tmp_path):
    nose().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    record = json.loads(file.read_text())
    del record["class_token_tail"]
    file.write_text(json.dumps(record))
    assert tail_of(NoseViTForImageClassification.from_pretrained(tmp_path), LAST)


# Masks of tokens


def token_masks() -> dict[str, torch.Tensor]:
    padding = torch.ones(3, TOKENS, dtype=torch.long)
    padding[0, 3:] = padding[2, 9:] = 0
    by_row = torch.ones(3, 1, TOKENS, TOKENS).tril().bool()
    by_row[:, :, 0, :5] = True
    bias = torch.randn(3, 1, TOKENS, TOKENS, generator=torch.Generator().manual_seed(0))
    return {"padding": padding, "by row": by_row, "one for all images": by_row[:1], "bias": bias}


@pytest.mark.parametrize("slices", [0, 2])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["padding", "by row", "one for all images", "bias"])
def test_the_class_tokens_row_of_a_mask(kind, implementation, slices):
    mask = token_masks()[kind]
    if implementation == "eager" and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    on, off = tailed([2], chunk_size_attention=slices), nose([2])
    for model in (on, off):
        model.set_attn_implementation(implementation)
    with torch.no_grad():
        made, expected = (model(images(), attention_mask=mask).logits for model in (on, off))
    assert close(made, expected, 1e-5)
    assert not close(logits(on, images()), expected, 1e-3)
    assert tail_of(on, LAST, lambda: on(images(), attention_mask=mask)) == (slices in (0, 2))


def test_any_attention_kernel_gets_one_query_and_its_own_kind_of_mask():
    seen = []

    def kernel(module, query, key, value, attention_mask, **kwargs):
        seen.append((query.shape[2], key.shape[2], value.shape[2], kwargs["dropout"], kwargs["scaling"]))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("recorded", kernel)
    try:
        model = tailed()
        model.set_attn_implementation("recorded")
        assert torch.equal(logits(model, images()), logits(tailed(), images()))
    finally:
        del ALL_ATTENTION_FUNCTIONS._global_mapping["recorded"]
    same = (TOKENS, TOKENS, 0.0, 8**-0.5)
    assert seen == [(TOKENS, *same)] * LAST + [(1, *same)]
    # Flash attention takes the padding of the keys, whatever the queries.
    config, padding = model.config, token_masks()["padding"]
    config._attn_implementation_internal = "flash_attention_2"
    assert torch.equal(class_token_mask(config, torch.zeros(3, TOKENS, 24), padding), padding.bool())
    assert class_token_mask(config, torch.zeros(3, TOKENS, 24), None) is None


# Those who look inside


def test_what_a_block_was_fed_starts_it_again():
    model = tailed([2])
    with block_inputs(model.vit.layers) as inputs:
        expected = logits(model, images())
    for layer, state in enumerate(inputs):
        with model.vit.starting_at(layer, state):
            assert torch.equal(logits(model, torch.zeros(3, 3, 16, 16)), expected)


def test_a_class_token_alone_cannot_start_an_attention():
    model = tailed()
    with block_inputs(model.vit.layers) as inputs, model.masked_attention([LAST]):
        masked = logits(model, images())
    assert [state.shape[1] for state in inputs] == [TOKENS] * LAST + [1]
    with pytest.raises(ValueError, match=r"starting_at\(5\) got hidden_states of the class token alone.*all_tokens"):
        with model.vit.starting_at(LAST, inputs[LAST]):
            logits(model, images())
    with model.vit.starting_at(LAST, inputs[LAST]), model.masked_attention([LAST]):
        assert torch.equal(logits(model, images()), masked)


@pytest.mark.parametrize("features", ["none", "class_token", "patches", "both"])
def test_distillation_sees_the_same_features(features):
    made = []
    for tail in (True, False):
        student, teacher = (with_tail(compressed(*which), tail) for which in (("diluted", GONE), ("dense", KEPT)))
        options = {} if features == "none" else {"features": features, "blocks": [1, LAST]}
        distiller = Distiller(teacher, **options)
        output = student.eval()(images(), **distiller.forward_options)
        made.append(distiller(student.vit, output, images()))
    assert torch.allclose(*made, rtol=1e-4) if features == "none" else torch.equal(*made)


def test_profile_and_scores_are_those_of_all_tokens():
    on, off = tailed([LAST]), nose([LAST])
    assert layer_profile(on, batches()) == layer_profile(off, batches())
    for target in ("logits", "features"):
        made, expected = (SetScorer(model, batches(), target=target).expand([1], [0, 4]) for model in (on, off))
        assert made == expected
    assert on.config.class_token_tail and not off.config.class_token_tail
