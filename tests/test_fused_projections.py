"""q, k and v as one matrix product: the same function, the same checkpoint, and back again bit for bit."""

import copy
import pickle

import pytest
import torch
from reference_vit import images, logits, nose, stock_vit
from torch import nn
from transformers import ViTForImageClassification

from hf_nose import NoseViTForImageClassification
from hf_nose.lora import add_lora
from hf_nose.profiling import count_macs
from hf_nose.surgery import fold


def model_in(state: str, **options) -> NoseViTForImageClassification:
    model = nose([0], class_token_tail=True, **options)
    model.dilute([2, 5])
    model.set_mask(0.4 if state == "diluted" else 0.0)
    return fold(model) if state == "folded" else model


def fused(model):
    model = copy.deepcopy(model)
    model.fuse_qkv_projections()
    return model


def attention(model, layer: int = 1):
    return model.vit.layers[layer].attention


@pytest.mark.parametrize("tail", [True, False], ids=["tail", "all tokens"])
@pytest.mark.parametrize("state", ["diluted", "at zero", "folded"])
def test_the_same_function(state, tail):
    model = model_in(state, dtype=torch.float64)
    model.config.class_token_tail = tail
    one = fused(model)
    assert attention(one).qkv_weight.shape == (72, 24) and not hasattr(attention(one), "q_proj")
    mask = torch.ones(3, 17, dtype=torch.long)
    mask[1, 4:] = 0
    pixel_values = images(dtype=torch.float64)
    for options in ({}, {"attention_mask": mask}):
        with torch.no_grad():
            made, expected = (each(pixel_values, **options).logits for each in (one, model))
        assert torch.allclose(made, expected, rtol=1e-12, atol=1e-13)


def test_one_product_is_what_is_computed():
    """By the products themselves: fewer calls of the same arithmetic."""
    counts = []
    for each in (model_in("folded"), fused(model_in("folded"))):
        with torch.profiler.profile() as profile:
            logits(each, images())
        counts.append(sum(event.name == "aten::linear" for event in profile.events()))
    # Two attentions with all queries save two products each; the last keeps its one query apart from k and v.
    assert counts[0] - counts[1] == 2 * 2 + 1


def test_without_biases():
    config = copy.deepcopy(stock_vit().config)
    config.qkv_bias = False
    torch.manual_seed(0)
    model = NoseViTForImageClassification.from_vit(ViTForImageClassification(config).double().eval())
    keys = list(model.state_dict())
    one = fused(model)
    assert attention(one).qkv_bias is None and list(one.state_dict()) == keys
    pixel_values = images(dtype=torch.float64)
    assert torch.allclose(logits(one, pixel_values), logits(model, pixel_values), rtol=1e-12, atol=1e-13)
    one.unfuse_qkv_projections()
    assert attention(one).q_proj.bias is None and torch.equal(logits(one, pixel_values), logits(model, pixel_values))


# The checkpoint


def test_the_checkpoint_does_not_change(tmp_path):
    model = model_in("diluted")
    one = fused(model)
    assert list(one.state_dict()) == list(model.state_dict())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in one.state_dict().items())
    files = []
    for name, each in (("plain", model), ("fused", one)):
        each.save_pretrained(tmp_path / name)
        files.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert files[0] == files[1]
    loaded = NoseViTForImageClassification.from_pretrained(tmp_path / "fused")
    assert attention(loaded).qkv_weight is None and torch.equal(logits(loaded, images()), logits(model, images()))


def test_a_state_dict_loads_into_fused_projections():
    one, other = fused(nose()), nose(seed=1)
    assert not any(one.load_state_dict(other.state_dict()))
    assert torch.allclose(logits(one, images()), logits(other, images()), atol=1e-6)
    partial = {name: tensor for name, tensor in other.state_dict().items() if "k_proj" not in name}
    with pytest.raises(RuntimeError, match="Missing key"):
        one.load_state_dict(partial)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_stand_alone(copied):
    one = fused(nose())
    other = copied(one)
    with torch.no_grad():
        attention(other).qkv_weight.zero_()
    assert not torch.equal(logits(other, images()), logits(one, images()))
    other.unfuse_qkv_projections()
    assert not attention(other).v_proj.weight.any() and attention(one).qkv_weight.any()


def test_folding_and_copying_a_fused_model():
    model = model_in("at zero")
    assert torch.equal(logits(fold(fused(model)), images()), logits(fold(model), images()))
    again = NoseViTForImageClassification.from_vit(fused(nose()), [1], class_token_tail=False)
    assert torch.equal(logits(again, images()), logits(nose([1]), images()))


# Back again


@pytest.mark.parametrize("frozen", [True, False])
def test_back_again_bit_for_bit_in_the_same_order(frozen):
    model = model_in("diluted").requires_grad_(not frozen)
    one = fused(model)
    one.fuse_qkv_projections()
    one.unfuse_qkv_projections()
    one.unfuse_qkv_projections()
    pairs = list(zip(model.named_parameters(), one.named_parameters(), strict=True))
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) and a[1].requires_grad == b[1].requires_grad for a, b in pairs)
    assert repr(one) == repr(model) and torch.equal(logits(one, images()), logits(model, images()))
    storages = {parameter.untyped_storage().data_ptr() for parameter in one.parameters()}
    assert len(storages) == len(pairs)


def test_a_fused_model_moves_as_one():
    model = fused(nose()).double()
    assert attention(model).qkv_weight.dtype == torch.float64
    model.unfuse_qkv_projections()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def test_hooks_on_the_attention_stay():
    model = nose()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(images(), output_attentions=True).attentions
        model.fuse_qkv_projections()
        made = model(images(), output_attentions=True).attentions
    assert len(made) == len(expected)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(made, expected, strict=True))


def test_parameters_and_macs_are_counted_alike():
    model = model_in("diluted")
    one = fused(model)
    assert sum(p.numel() for p in one.parameters()) == sum(p.numel() for p in model.parameters())
    assert count_macs(one) == count_macs(model)
    assert attention(one).qkv_weight is not None


# What is refused


def test_training_is_refused():
    with pytest.raises(ValueError, match=r"for inference: call unfuse_qkv_projections\(\)"):
        fused(nose()).train()(images())


def test_adapters_are_refused():
    model = add_lora(nose(), 2, 4, 0.0, ["q_proj"]).base_model.model
    with pytest.raises(ValueError, match="must be plain Linear modules.*Merge adapters first"):
        model.fuse_qkv_projections()


def test_half_frozen_projections_are_refused():
    model = nose()
    attention(model).q_proj.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="all be trainable or all be frozen"):
        model.fuse_qkv_projections()
    assert isinstance(attention(model).q_proj, nn.Linear)
