"""The fold is exact, and refuses what it cannot do."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference_vit import NUM_BLOCKS, images, logits, nose, reference, stock_vit
from torch import nn

from hf_nose import NoseViTBackbone, NoseViTConfig, NoseViTForImageClassification, NoseViTModel, surgery
from hf_nose.surgery import fold


some_layers = st.sets(st.integers(0, NUM_BLOCKS - 1), min_size=1, max_size=NUM_BLOCKS - 1)


def at_zero(compensated, plain=(), dtype=torch.float32, **options):
    model = nose(dtype=dtype, **options)
    model.dilute(compensated, feature_compensation=True)
    model.dilute(plain, feature_compensation=False)
    model.set_mask(0.0)
    return model


def assert_same_function(before, after, pixel_values):
    with torch.no_grad():
        one = before(pixel_values, output_hidden_states=True)
        other = after(pixel_values, output_hidden_states=True)
    assert torch.equal(one.logits, other.logits)
    assert len(one.hidden_states) == len(other.hidden_states)
    assert all(torch.equal(a, b) for a, b in zip(one.hidden_states, other.hidden_states, strict=True))


@given(gone=some_layers, data=st.data())
def test_fold_is_exact_for_any_set_of_layers(gone, data):
    compensated = data.draw(st.sets(st.sampled_from(sorted(gone))))
    model = at_zero(compensated, gone - compensated)
    folded = fold(model)
    assert_same_function(model, folded, images())
    rules = {layer: (0, 2 if layer in compensated else 1) for layer in gone}
    assert torch.equal(logits(folded, images()), reference(stock_vit(), images(), rules)["logits"])
    assert folded.config.removed_attention_layers == sorted(gone)
    assert folded.config.folded_attention_layers == sorted(compensated)
    assert folded.config.diluted_attention_layers == folded.config.compensated_attention_layers == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_fold_in_other_dtypes(dtype):
    model = at_zero([0, 2, 3]).to(dtype)
    folded = fold(model)
    assert folded.dtype == dtype
    before, after = logits(model, images()), logits(folded, images())
    assert torch.equal(before, after) if dtype == torch.float64 else torch.allclose(before, after, atol=0.05)


def test_weights_and_eps_are_those_of_the_method():
    """METHOD section 5: output matrices and their biases by s, LayerNorms by eps / s^2, nothing else."""
    model = at_zero([1, 3])
    folded = fold(model)
    before, after = model.state_dict(), folded.state_dict()
    scale = {0: 1, 1: 2, 2: 2, 3: 4, 4: 4, 5: 4}
    for name, tensor in after.items():
        parts = name.split(".")
        divisor = scale[int(parts[2])] if "o_proj" in parts or "fc2" in parts else 1
        assert torch.equal(tensor * divisor, before[name]), name
    eps = model.config.layer_norm_eps
    for layer, block in enumerate(folded.vit.layers):
        assert block.layernorm_after.eps == eps / scale[layer] ** 2
        if layer not in (1, 3):
            assert block.layernorm_before.eps == eps / scale[layer - 1 if layer else 0] ** 2
    assert folded.vit.layernorm.eps == eps / 16


def test_fold_removes_attention_its_norm_and_the_mask():
    model = at_zero([1], [4])
    folded = fold(model)
    gone = {
        name
        for name in model.state_dict()
        if name.startswith(
            tuple(f"vit.layers.{i}.{part}" for i in (1, 4) for part in ("attention", "layernorm_before"))
        )
    }
    assert len(gone) == 2 * (8 + 2)
    assert set(folded.state_dict()) == set(model.state_dict()) - gone - {"vit.dilution_mask"}
    per_layer = 4 * (24 * 24 + 24) + 2 * 24
    count = [sum(parameter.numel() for parameter in each.parameters()) for each in (model, folded)]
    assert count[0] - count[1] == 2 * per_layer


def test_fold_leaves_the_model_as_it_was():
    model = at_zero([1, 3])
    state, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    folded = fold(model)
    with torch.no_grad():
        for parameter in folded.parameters():
            parameter.zero_()
    assert model.config.to_dict() == config
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_fold_keeps_class_mode_and_one_config(training):
    folded = fold(at_zero([1], drop_path_rate=0.2, chunk_size_attention=2).train(training))
    assert type(folded) is NoseViTForImageClassification
    assert all(module.training == training for module in folded.modules())
    assert folded.config is folded.vit.config
    assert (folded.config.drop_path_rate, folded.config.chunk_size_attention) == (0.2, 2)
    assert folded.config.id2label == stock_vit().config.id2label


def test_a_bare_model_and_a_backbone_fold():
    for cls, options in ((NoseViTModel, {}), (NoseViTBackbone, {"out_indices": [2, 6]})):
        model = cls.from_vit(stock_vit(), **options)
        model.dilute([1, 3])
        model.set_mask(0.0)
        folded = fold(model)
        assert type(folded) is cls
        with torch.no_grad():
            before, after = model(images()), folded(images())
        for name, value in before.items():
            for a, b in zip(value, after[name], strict=True):
                assert torch.equal(a, b)


def test_a_wrapper_folds():
    wrapped = nn.Sequential(at_zero([1, 3]))
    folded = fold(wrapped)
    assert type(folded) is nn.Sequential and folded[0].config.folded_attention_layers == [1, 3]
    assert torch.equal(logits(wrapped, images()), logits(folded, images()))


@pytest.mark.parametrize("value", [1.0, 0.37, 1e-30, [0.0, 0.5]])
def test_fold_refuses_a_mask_above_zero(value):
    model = nose()
    model.dilute([1, 3])
    model.set_mask(value)
    with pytest.raises(ValueError, match=r"fold needs M = 0 in every diluted layer, got \{1: .*3: "):
        fold(model)


def test_dilute_set_mask_fold_is_always_allowed():
    model = nose()
    model.dilute([0])
    model.set_mask(0.0)
    once = fold(model)
    once.dilute([2, 3])
    once.set_mask(0.0)
    twice = fold(once)
    assert twice.config.folded_attention_layers == [0, 2, 3]
    assert_same_function(at_zero([0, 2, 3]), twice, images())
    straight = fold(at_zero([0, 2, 3])).state_dict()
    assert all(torch.equal(tensor, straight[name]) for name, tensor in twice.state_dict().items())


def test_folding_what_is_folded_changes_nothing():
    once = fold(at_zero([1, 3], [5]))
    twice = fold(once)
    assert twice.config.to_dict() == once.config.to_dict()
    assert all(torch.equal(tensor, once.state_dict()[name]) for name, tensor in twice.state_dict().items())


def test_folding_a_dense_model_changes_nothing():
    folded = fold(nose())
    assert_same_function(nose(), folded, images())


def test_a_forced_compensated_removal_folds():
    model = nose([1, 2], feature_compensation=True, force=True)
    assert_same_function(model, fold(model), images())


def test_a_folded_model_saves_and_loads(tmp_path):
    folded = fold(at_zero([1, 3]))
    folded.save_pretrained(tmp_path)
    loaded, info = NoseViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same_function(at_zero([1, 3]), loaded, images())


def test_a_folded_model_trains_on():
    folded = fold(at_zero([1, 3])).train()
    folded(images(), labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(
        bool(parameter.grad.any()) for name, parameter in folded.named_parameters() if "k_proj.bias" not in name
    )


# Mutations: fold's own check catches each


def test_mutation_eps_left_alone_is_caught(monkeypatch):
    """`eps / s^2` dropped."""
    model = at_zero([0, 1, 3])
    monkeypatch.setattr(NoseViTConfig, "scaled_eps", lambda config, layer: config.layer_norm_eps)
    with pytest.raises(ArithmeticError, match="Folding changed the outputs by up to .* in torch.float32"):
        fold(model)


def test_mutation_final_norm_left_alone_is_caught(monkeypatch):
    model = at_zero([0, 1, 3])
    build = NoseViTModel.__init__

    def build_with_the_plain_eps(self, config, *args, **kwargs):
        build(self, config, *args, **kwargs)
        self.layernorm.eps = config.layer_norm_eps

    monkeypatch.setattr(NoseViTModel, "__init__", build_with_the_plain_eps)
    with pytest.raises(ArithmeticError, match="Folding changed the outputs"):
        fold(model)


@pytest.mark.parametrize(
    "parameter", ["mlp.fc2.bias", "attention.o_proj.bias", "mlp.fc2.weight", "attention.o_proj.weight"]
)
def test_mutation_division_dropped_is_caught(monkeypatch, parameter):
    """The division of a bias dropped, or of a matrix."""
    model = at_zero([0, 1, 3])
    divided = surgery.folded_state

    def without_division(vit, config):
        return {
            name: vit.state_dict()[name] if name.endswith(parameter) else tensor
            for name, tensor in divided(vit, config).items()
        }

    monkeypatch.setattr(surgery, "folded_state", without_division)
    with pytest.raises(ArithmeticError, match="Folding changed the outputs"):
        fold(model)


@pytest.mark.parametrize("parameter", ["mlp.fc1.weight", "attention.q_proj.bias", "layernorm_after.weight"])
def test_mutation_division_of_something_else_is_caught(monkeypatch, parameter):
    model = at_zero([0, 1, 3])
    divided = surgery.folded_state

    def too_much(vit, config):
        return {
            name: tensor / 2 if name.endswith(f"5.{parameter}") else tensor
            for name, tensor in divided(vit, config).items()
        }

    monkeypatch.setattr(surgery, "folded_state", too_much)
    with pytest.raises(ArithmeticError, match="Folding changed the outputs"):
        fold(model)


def test_mutation_one_bit_is_caught(monkeypatch):
    model = at_zero([1])
    divided = surgery.folded_state

    def one_bit(vit, config):
        state = divided(vit, config)
        bias = state["layernorm.bias"]
        return {**state, "layernorm.bias": torch.nextafter(bias, torch.full_like(bias, torch.inf))}

    monkeypatch.setattr(surgery, "folded_state", one_bit)
    with pytest.raises(ArithmeticError, match="Folding changed the outputs"):
        fold(model)


# Real weights


def test_deit_tiny_folds_bit_for_bit(deit_tiny, imagenet_pixels):
    layers = [0, 1, 3, 4, 6]
    model = NoseViTForImageClassification.from_vit(str(deit_tiny))
    model.dilute(layers)
    model.set_mask(0.0)
    folded = fold(model)
    assert_same_function(model, folded, imagenet_pixels)
    assert folded.config.stream_scale(11) == 32
    with NoseViTForImageClassification.from_vit(str(deit_tiny)).masked_attention(layers, "double"):
        pass
    dense = NoseViTForImageClassification.from_vit(str(deit_tiny))
    with dense.masked_attention(layers, "double"):
        assert torch.equal(logits(dense, imagenet_pixels), logits(folded, imagenet_pixels))


@pytest.mark.parametrize("layers, millions", [(3, 5.27), (4, 5.12)])
def test_deit_tiny_parameters_are_those_published(deit_tiny, layers, millions):
    made = NoseViTForImageClassification.from_vit(str(deit_tiny), [0, 2, 4, 6][:layers])
    assert round(sum(parameter.numel() for parameter in made.parameters()) / 1e6, 2) == millions
