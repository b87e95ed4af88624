"""Blocks kept, diluted and removed against a ViT written here."""

import copy
import logging
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from reference_vit import (
    NUM_BLOCKS,
    NUM_LABELS,
    Calls,
    attention_calls,
    images,
    logits,
    nose,
    randomise,
    reference,
    stock_vit,
    vit_config,
)
from torch import nn
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    ViTImageProcessorPil,
    pipeline,
)

from hf_nose import NoseViTBackbone, NoseViTConfig, NoseViTForImageClassification, NoseViTModel
from hf_nose.modeling_nose_vit import nose_vit
from hf_nose.surgery import fold


some_layers = st.sets(st.integers(0, NUM_BLOCKS - 1), min_size=1, max_size=NUM_BLOCKS - 1)


# A dense NoseViT is a ViT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_dense_logits_are_those_of_a_stock_vit(dtype, implementation):
    stock, ours = copy.deepcopy(stock_vit(dtype=dtype)), nose(dtype=dtype)
    stock.set_attn_implementation(implementation)
    ours.set_attn_implementation(implementation)
    theirs = stock(images(dtype=dtype), output_hidden_states=True)
    made = ours(images(dtype=dtype), output_hidden_states=True)
    assert torch.equal(theirs.logits, made.logits)
    assert len(made.hidden_states) == NUM_BLOCKS + 1
    assert all(torch.equal(a, b) for a, b in zip(theirs.hidden_states, made.hidden_states, strict=True))


def test_the_reference_of_these_tests_is_a_stock_vit():
    assert torch.equal(reference(stock_vit(), images())["logits"], logits(stock_vit(), images()))


def test_loss_is_cross_entropy():
    labels = torch.tensor([0, 3, 1])
    output = nose()(images(), labels=labels)
    assert torch.equal(output.loss, nn.functional.cross_entropy(output.logits, labels))


def test_gradients_are_those_of_a_stock_vit():
    stock, ours = copy.deepcopy(stock_vit(dtype=torch.float64)).train(), nose(dtype=torch.float64).train()
    for model in (stock, ours):
        model(images(dtype=torch.float64), labels=torch.tensor([0, 1, 2])).loss.backward()
    theirs = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.allclose(parameter.grad, theirs[name].grad, rtol=1e-12, atol=1e-15), name


@pytest.mark.parametrize("kind", ["attention_mask", "interpolate_pos_encoding"])
def test_further_inputs_reach_the_blocks(kind):
    if kind == "attention_mask":
        mask = torch.ones(3, 17, dtype=torch.long)
        mask[:, 10:] = 0
        options, pixel_values = {"attention_mask": mask}, images()
        assert not torch.equal(nose()(pixel_values, **options).logits, logits(nose(), pixel_values))
    else:
        options, pixel_values = {"interpolate_pos_encoding": True}, torch.randn(2, 3, 24, 16)
    assert torch.equal(nose()(pixel_values, **options).logits, stock_vit()(pixel_values, **options).logits)


# Dilution


@given(layers=some_layers, compensation=st.booleans())
def test_diluted_at_one_equals_kept_bit_for_bit(layers, compensation):
    model = nose()
    model.dilute(layers, feature_compensation=compensation)
    assert model.vit.mask_values() == [1.0] * len(layers)
    assert model.config.diluted_attention_layers == sorted(layers)
    assert model.config.compensated_attention_layers == (sorted(layers) if compensation else [])
    assert torch.equal(logits(model, images()), logits(stock_vit(), images()))


@given(
    layers=some_layers,
    compensation=st.booleans(),
    value=st.one_of(st.just(0.37), st.floats(2**-7, 1 - 2**-7, width=32)),
)
def test_eq_8_and_9(layers, compensation, value):
    model = nose()
    model.dilute(layers, feature_compensation=compensation)
    model.set_mask(value)
    mask = torch.tensor(value, dtype=torch.float32)
    rules = dict.fromkeys(layers, (mask, 2 - mask if compensation else 1))
    assert torch.equal(logits(model, images()), reference(stock_vit(), images(), rules)["logits"])


@given(layers=some_layers, compensation=st.booleans())
def test_at_zero_the_block_is_x_or_2x(layers, compensation):
    model = nose()
    model.dilute(layers, feature_compensation=compensation)
    model.set_mask(0.0)
    rules = dict.fromkeys(layers, (0, 2 if compensation else 1))
    assert torch.equal(logits(model, images()), reference(stock_vit(), images(), rules)["logits"])


def test_compensation_is_per_layer():
    model = nose()
    model.dilute([1], feature_compensation=True)
    model.dilute([4], feature_compensation=False)
    model.set_mask(0.5)
    assert model.config.compensated_attention_layers == [1]
    rules = {1: (0.5, 1.5), 4: (0.5, 1)}
    assert torch.equal(logits(model, images()), reference(stock_vit(), images(), rules)["logits"])


def test_a_vector_of_masks_goes_by_ascending_layer():
    model = nose()
    model.dilute([4, 1, 2])
    model.set_mask([0.25, 0.5, 0.75])
    assert model.vit.mask_values() == [0.25, 0.5, 0.75]
    rules = {1: (0.25, 1.75), 2: (0.5, 1.5), 4: (0.75, 1.25)}
    assert torch.equal(logits(model, images()), reference(stock_vit(), images(), rules)["logits"])


def test_diluting_more_keeps_what_is_under_way():
    model = nose()
    model.dilute([1, 4])
    model.set_mask([0.25, 0.75])
    model.dilute([0, 2])
    assert model.config.diluted_attention_layers == [0, 1, 2, 4]
    assert model.vit.mask_values() == [1.0, 0.25, 1.0, 0.75]


@pytest.mark.parametrize(
    "value", [-0.01, 1.01, float("nan"), [0.5], [0.5, 0.5, 0.5], [0.5, 2.0], [0.5, float("nan")], []]
)
def test_masks_out_of_range_or_number(value):
    model = nose()
    model.dilute([1, 3])
    model.set_mask(0.5)
    with pytest.raises(ValueError, match=r"value must be in \[0, 1\], one or 2 of them"):
        model.set_mask(value)
    assert model.vit.mask_values() == [0.5, 0.5]


@pytest.mark.parametrize("layers", [[1, 1], [6], [-1], [2], [3]])
def test_only_kept_layers_are_diluted(layers):
    model = nose([3])
    model.dilute([2])
    with pytest.raises(ValueError, match=r"among the kept ones \[0, 1, 4, 5\]"):
        model.dilute(layers)
    assert model.config.diluted_attention_layers == [2]


def test_diluting_all_is_refused_and_changes_nothing():
    model = nose([5])
    with pytest.raises(Exception, match="class token sees no patch"):
        model.dilute(range(5))
    assert model.config.diluted_attention_layers == model.config.compensated_attention_layers == []
    assert torch.equal(logits(model, images()), logits(nose([5]), images()))


def test_the_mask_is_set_in_place_and_is_no_parameter():
    model = nose()
    model.dilute([1, 3])
    buffer = model.vit.dilution_mask
    model.set_mask(0.3)
    assert model.vit.dilution_mask is buffer and buffer.dtype == torch.float32
    assert "vit.dilution_mask" in model.state_dict()
    assert "vit.dilution_mask" not in dict(model.named_parameters())


def test_gradients_pass_through_the_mask():
    model = nose(dtype=torch.float64)
    model.dilute([2])
    model.set_mask(0.25)
    block = model.vit.layers[2]
    x = torch.randn(2, 17, 24, dtype=torch.float64, requires_grad=True)
    block(x, mask=model.vit.dilution_mask[0]).sum().backward()
    f = 0.25 * block.attention(block.layernorm_before(x))[0] + 1.75 * x
    expected = torch.autograd.grad((block.mlp(block.layernorm_after(f)) + f).sum(), x)[0]
    assert torch.allclose(x.grad, expected, rtol=1e-12)


# What is not computed


def test_attention_is_not_computed_at_zero():
    model = nose()
    model.dilute([1, 3])
    with attention_calls(model, [1, 3]) as diluted, attention_calls(model) as every:
        logits(model, images())
        assert (diluted.count, every.count) == (2, NUM_BLOCKS)
        model.set_mask(0.0)
        logits(model, images())
        assert (diluted.count, every.count) == (2, 2 * NUM_BLOCKS - 2)
        model.set_mask([0.0, 0.1])
        logits(model, images())
        assert diluted.count == 4


def test_one_at_zero_beside_one_above_is_computed_and_multiplied():
    model = nose()
    model.dilute([1, 3])
    model.set_mask([0.0, 0.5])
    assert not model.vit.is_mask_zero
    rules = {1: (torch.tensor(0.0), torch.tensor(2.0)), 3: (0.5, 1.5)}
    assert torch.equal(logits(model, images()), reference(stock_vit(), images(), rules)["logits"])


def test_at_zero_diluted_attention_gets_no_gradient():
    model = nose()
    model.dilute([1])
    model.set_mask(0.0)
    model(images(), labels=torch.tensor([0, 1, 2])).loss.backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    dead = ("vit.layers.1.attention.", "vit.layers.1.layernorm_before.")
    assert without == {name for name, _ in model.named_parameters() if name.startswith(dead)}


def test_removed_layers_own_no_parameters():
    keys = nose([0, 3]).state_dict()
    for layer in range(NUM_BLOCKS):
        own = [
            key for key in keys if key.startswith((f"vit.layers.{layer}.att", f"vit.layers.{layer}.layernorm_before"))
        ]
        assert bool(own) == (layer not in (0, 3))
    assert "vit.dilution_mask" not in keys


# Saving and loading


@pytest.mark.parametrize("compensation", [True, False])
@pytest.mark.parametrize("value", [[0.37, 0.11], [0.0, 0.0], [0.0, 0.37], [1.0, 1.0]])
def test_a_checkpoint_in_mid_dilution_is_the_function_that_was_saved(tmp_path, value, compensation):
    model = nose([0])
    model.dilute([1, 3], feature_compensation=compensation)
    model.set_mask(value)
    model.save_pretrained(tmp_path)
    loaded = NoseViTForImageClassification.from_pretrained(tmp_path)
    assert loaded.vit.mask_values() == model.vit.mask_values()
    assert loaded.vit.is_mask_zero == (value == [0.0, 0.0])
    assert torch.equal(logits(loaded, images()), logits(model, images()))
    with attention_calls(loaded, [1, 3]) as calls:
        logits(loaded, images())
    assert calls.count == (0 if value == [0.0, 0.0] else 2)


@pytest.mark.parametrize("before, after", [(0.0, 0.37), (0.37, 0.0)])
def test_the_flag_follows_load_state_dict(before, after):
    """The Trainer resumes by `load_state_dict`; a stale flag would drop attention in silence."""
    saved, model = nose(seed=1), nose()
    for each in (saved, model):
        each.dilute([1, 3])
    saved.set_mask(after)
    model.set_mask(before)
    logits(model, images())
    model.load_state_dict(saved.state_dict())
    assert model.vit.is_mask_zero == (after == 0.0)
    assert torch.equal(logits(model, images()), logits(saved, images()))
    with attention_calls(model, [1, 3]) as calls:
        logits(model, images())
    assert calls.count == (0 if after == 0.0 else 2)


def test_the_flag_follows_a_load_through_a_wrapper():
    saved, model = nn.ModuleDict({"module": nose()}), nn.ModuleDict({"module": nose()})
    for each in (saved, model):
        each["module"].dilute([2])
    saved["module"].set_mask(0.0)
    model.load_state_dict(saved.state_dict())
    assert model["module"].vit.is_mask_zero


def test_a_dense_checkpoint_with_diluted_layers_asked_for_starts_at_one(tmp_path):
    nose().save_pretrained(tmp_path)
    loaded, info = NoseViTForImageClassification.from_pretrained(
        tmp_path, diluted_attention_layers=[1, 3], compensated_attention_layers=[1], output_loading_info=True
    )
    assert not info["missing_keys"] and loaded.vit.mask_values() == [1.0, 1.0]
    assert not loaded.vit.is_mask_zero
    assert torch.equal(logits(loaded, images()), logits(stock_vit(), images()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_load_keeps_the_mask_exact(tmp_path, dtype):
    model = nose()
    model.dilute([1, 3])
    model.set_mask(0.37)
    model.save_pretrained(tmp_path)
    loaded = NoseViTForImageClassification.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    assert loaded.vit.dilution_mask.dtype == torch.float32
    assert loaded.vit.mask_values() == model.vit.mask_values()
    assert logits(loaded, images()).dtype == dtype


def test_copies_and_pickles_are_the_same_function():
    model = nose()
    model.dilute([1, 3])
    model.set_mask(0.0)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.vit.is_mask_zero
        assert torch.equal(logits(copied, images()), logits(model, images()))
        copied.set_mask(0.5)
        assert copied.vit.mask_values() == [0.5, 0.5] and model.vit.mask_values() == [0.0, 0.0]


# Masking in place


@pytest.mark.parametrize("mask, gain", [("skip", 1), ("double", 2)])
@given(layers=some_layers)
def test_masking_equals_removal_bit_for_bit(mask, gain, layers):
    model = nose()
    removed = nose(layers, feature_compensation=mask == "double", force=True)
    expected = logits(removed, images())
    with attention_calls(model, layers) as calls, model.masked_attention(layers, mask):
        masked = logits(model, images())
    assert calls.count == 0
    assert torch.equal(masked, expected)
    assert torch.equal(masked, reference(stock_vit(), images(), dict.fromkeys(layers, (0, gain)))["logits"])
    assert torch.equal(logits(model, images()), logits(stock_vit(), images()))


def test_masking_nests_and_ends_with_an_error():
    model = nose()
    with pytest.raises(KeyError), model.masked_attention([1]), model.masked_attention([2], "double"):
        assert torch.equal(logits(model, images()), reference(stock_vit(), images(), {1: (0, 1), 2: (0, 2)})["logits"])
        raise KeyError
    assert torch.equal(logits(model, images()), logits(stock_vit(), images()))


def test_masking_a_diluted_layer_gives_its_dilution_back():
    model = nose()
    model.dilute([1, 3])
    for value in (0.5, 0.0):
        model.set_mask(value)
        before = logits(model, images())
        with model.masked_attention([1], "skip"):
            assert not torch.equal(logits(model, images()), before)
        assert torch.equal(logits(model, images()), before)


@pytest.mark.parametrize(
    "layers, mask, message",
    [
        ([2], "skip", r"\[2\] do not"),
        ([6], "skip", r"\[6\] do not"),
        ([-1], "skip", r"\[-1\] do not"),
        ([1], "triple", r"mask must be one of \['double', 'skip'\], got 'triple'"),
    ],
)
def test_masking_what_has_no_attention(layers, mask, message):
    with pytest.raises(ValueError, match=message), nose([2]).masked_attention(layers, mask):
        pass


def test_starting_in_the_middle_equals_the_whole_forward():
    model = nose([2])
    recorded = []
    handles = [block.register_forward_pre_hook(lambda _, args: recorded.append(args[0])) for block in model.vit.layers]
    expected = logits(model, images())
    for handle in handles:
        handle.remove()
    for layer, state in enumerate(recorded):
        with Calls(model.vit.layers) as calls, model.vit.starting_at(layer, state):
            assert torch.equal(logits(model, torch.zeros(3, 3, 16, 16)), expected)
        assert calls.count == NUM_BLOCKS - layer
    assert torch.equal(logits(model, images()), expected)


# Stochastic depth


def test_stochastic_depth_spares_the_compensation():
    model = nose(drop_path_rate=0.5, drop_path_schedule="constant")
    model.dilute([2])
    model.set_mask(0.25)
    block, mask = model.vit.layers[2].train(), model.vit.dilution_mask[0]
    torch.manual_seed(0)
    x = torch.randn(1, 17, 24).expand(64, 17, 24)
    with torch.no_grad():
        output = block(x, mask=mask)
        branch = block.attention(block.layernorm_before(x[:1]))[0]
        seen = set()
        for attends in (0.0, 2.0):
            f = 0.25 * attends * branch + 1.75 * x[:1]
            for feeds in (0.0, 2.0):
                expected = feeds * block.mlp(block.layernorm_after(f)) + f
                hits = torch.isclose(output, expected, atol=1e-5).flatten(1).all(1)
                seen |= {(attends, feeds, index) for index in hits.nonzero().flatten().tolist()}
    # Each of the 64 images is one of the four cases, and every case occurs.
    assert sorted(index for *_, index in seen) == list(range(64))
    assert len({case[:2] for case in seen}) == 4


def test_stochastic_depth_rates_and_evaluation():
    model = nose(drop_path_rate=0.5)
    assert [block.drop_path.drop_prob for block in model.vit.layers] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert torch.equal(logits(model, images()), logits(stock_vit(), images()))
    torch.manual_seed(0)
    assert not torch.equal(logits(model.train(), images()), logits(stock_vit(), images()))


# Slices and checkpoints


def test_mlp_slices_give_the_same_outputs():
    model = nose(chunk_size_feed_forward=7)
    sizes = []
    model.vit.layers[0].mlp.register_forward_hook(lambda _, args, output: sizes.append(len(args[0])))
    made = logits(model, images())
    assert sizes == [7] * 7 + [2]
    assert torch.allclose(made, logits(stock_vit(), images()), atol=1e-6)


def test_attention_slices_give_the_same_outputs():
    model = nose(chunk_size_attention=2)
    sizes = []
    model.vit.layers[0].attention.register_forward_hook(lambda _, args, output: sizes.append(len(args[0])))
    assert torch.allclose(logits(model, images()), logits(stock_vit(), images()), atol=1e-6)
    assert sizes == [2, 1]
    mask = torch.ones(3, 17, dtype=torch.long)
    mask[0, 3:] = mask[2, 9:] = 0
    with torch.no_grad():
        sliced, whole = model(images(), attention_mask=mask).logits, nose()(images(), attention_mask=mask).logits
    assert torch.allclose(sliced, whole, atol=1e-6)


def test_attention_is_not_sliced_in_training():
    model = nose(chunk_size_attention=2).train()
    with attention_calls(model, [0]) as calls:
        model(images())
    assert calls.count == 1


def test_slices_do_not_change_what_attentions_look_like():
    model = nose([2], chunk_size_attention=2)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(images(), output_attentions=True).attentions
    assert [tuple(each.shape) for each in attentions] == [(3, 3, 17, 17)] * (NUM_BLOCKS - 1)


@pytest.mark.parametrize("value", [0.37, 0.0])
def test_gradient_checkpointing_gives_the_same_gradients(value):
    gradients, counts = [], []
    for checkpointing in (False, True):
        model = nose([0], dtype=torch.float64).train()
        model.dilute([1, 3])
        model.set_mask(value)
        if checkpointing:
            model.activation_checkpointing_enable()
        # The recomputation stops inside the MLP, at the last tensor it needs.
        with Calls([block.layernorm_after for block in model.vit.layers]) as calls:
            model(images(dtype=torch.float64), labels=torch.tensor([0, 1, 2])).loss.backward()
        counts.append(calls.count)
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert counts == [NUM_BLOCKS, 2 * NUM_BLOCKS]
    for name, gradient in gradients[0].items():
        if gradient is None:
            assert gradients[1][name] is None, name
        else:
            assert torch.allclose(gradient, gradients[1][name], rtol=1e-12, atol=1e-15), name


# Poolers, Auto classes, pipeline


@pytest.fixture
def folder(tmp_path):
    model = nose([2, 4], id2label=dict(enumerate("abcde")), label2id={c: i for i, c in enumerate("abcde")})
    model.save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    return tmp_path


def test_auto_classes(folder):
    assert type(AutoConfig.from_pretrained(folder)) is NoseViTConfig
    classifier, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert type(classifier) is NoseViTForImageClassification and not any(info.values())
    assert classifier.config.removed_attention_layers == [2, 4]
    assert torch.equal(logits(classifier, images()), logits(nose([2, 4]), images()))
    assert type(AutoImageProcessor.from_pretrained(folder, backend="pil")) is ViTImageProcessorPil


def test_auto_model_reports_no_missing_key(folder):
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(model) is NoseViTModel and not info["missing_keys"]
    assert model.pooler is None and model(images()).pooler_output is None


def test_a_pooler_only_where_the_config_says_so():
    with_pooler = NoseViTModel(NoseViTConfig.from_vit(vit_config(), use_pooler=True))
    assert with_pooler(images()).pooler_output.shape == (3, 24)
    assert NoseViTModel(NoseViTConfig.from_vit(vit_config())).pooler is None
    assert NoseViTForImageClassification(with_pooler.config).vit.pooler is None


def test_backbones_load_the_classifiers_weights(folder):
    backbone, info = NoseViTBackbone.from_pretrained(folder, out_indices=[0, 3, 6], output_loading_info=True)
    assert not info["missing_keys"] and backbone.channels == [24, 24, 24]
    with torch.no_grad():
        maps = backbone(images()).feature_maps
        states = nose([2, 4]).vit(images(), output_hidden_states=True).hidden_states
        for feature_map, index in zip(maps, (0, 3, 6), strict=True):
            expected = backbone.vit.layernorm(states[index])[:, 1:].view(3, 4, 4, 24).permute(0, 3, 1, 2)
            assert torch.equal(feature_map, expected)
        assert backbone(images()).hidden_states is None
        assert len(backbone(images(), output_hidden_states=True).hidden_states) == NUM_BLOCKS + 1
        assert backbone(torch.randn(1, 3, 24, 8)).feature_maps[0].shape == (1, 24, 6, 2)


def test_auto_backbone_is_registered():
    config = NoseViTConfig.from_vit(vit_config(), out_features=["stage1"])
    backbone = AutoBackbone.from_config(config)
    assert type(backbone) is NoseViTBackbone and backbone.out_features == ["stage1"]


def test_backbone_without_the_final_norm_gives_raw_states():
    config = NoseViTConfig.from_vit(vit_config(), out_indices=[2], apply_layernorm=False)
    backbone = NoseViTBackbone(config).eval()
    with torch.no_grad():
        output = backbone(images(), output_hidden_states=True)
    expected = output.hidden_states[2][:, 1:].view(3, 4, 4, 24).permute(0, 3, 1, 2)
    assert torch.equal(output.feature_maps[0], expected)


def test_pipeline_runs_without_a_warning(folder):
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        classify = pipeline("image-classification", model=str(folder), device="cpu")
    finally:
        logger.removeHandler(handler)
    assert [record.getMessage() for record in records] == []
    pixels = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).numpy()
    answer = classify(Image.fromarray(pixels), top_k=NUM_LABELS)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255 * 2 - 1
    expected = logits(nose([2, 4]), tensor).softmax(-1)[0]
    for row in answer:
        assert row["score"] == pytest.approx(float(expected["abcde".index(row["label"])]), abs=1e-5)


# Hidden states of a folded model


def folded_pair(cls=NoseViTForImageClassification, **fields):
    model = cls.from_vit(stock_vit(), **fields)
    model.dilute([0, 2, 3])
    model.set_mask(0.0)
    return model, fold(model)


@pytest.mark.parametrize("return_dict", [True, False])
def test_hidden_states_of_a_folded_model_are_multiplied_back(return_dict):
    model, folded = folded_pair()
    for before, after in ((model, folded), (model.vit, folded.vit)):
        with torch.no_grad():
            expected = before(images(), output_hidden_states=True).hidden_states
            output = after(images(), output_hidden_states=True, return_dict=return_dict)
        assert isinstance(output, dict if return_dict else tuple)
        states = output.hidden_states if return_dict else output[1]
        assert all(torch.equal(a, b) for a, b in zip(expected, states, strict=True))


def test_selected_hidden_states_of_a_folded_model():
    model, folded = folded_pair()
    with torch.no_grad():
        expected = model(images(), output_hidden_states=True).hidden_states
        states = folded(images(), output_hidden_states=[1, -1]).hidden_states
    assert [index for index, state in enumerate(states) if state is not None] == [1, NUM_BLOCKS]
    assert torch.equal(states[1], expected[1]) and torch.equal(states[-1], expected[-1])


def test_the_stream_of_a_folded_model_stays_small():
    model, folded = folded_pair()
    outputs = []
    for each in (model, folded):
        handle = each.vit.layers[-1].register_forward_hook(lambda _, args, output: outputs.append(output))
        logits(each, images())
        handle.remove()
    assert torch.equal(outputs[0], 8 * outputs[1])


@pytest.mark.parametrize("apply_layernorm", [True, False])
def test_feature_maps_are_equal_before_and_after_folding(apply_layernorm):
    model, folded = folded_pair(NoseViTBackbone, out_indices=list(range(7)), apply_layernorm=apply_layernorm)
    with torch.no_grad():
        before, after = model(images()).feature_maps, folded(images()).feature_maps
    assert len(after) == 7
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# Wrappers


class Wrapper(nn.Module):
    """As peft and DDP stand around a model."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_the_vit_is_found_in_any_wrapper():
    model = nose()
    assert nose_vit(Wrapper(Wrapper(model))) is model.vit
    assert nose_vit(model.vit) is model.vit


@pytest.mark.parametrize("model, count", [(nn.Linear(2, 2), 0), (nn.ModuleList([nn.Identity()]), 0)])
def test_no_vit_is_an_error(model, count):
    with pytest.raises(ValueError, match=f"exactly one NoseViTModel, {type(model).__name__} holds {count}"):
        nose_vit(model)


def test_two_vits_are_an_error():
    with pytest.raises(ValueError, match="ModuleList holds 2"):
        nose_vit(nn.ModuleList([nose(), nose()]))


# Real weights


@pytest.mark.parametrize("mask", ["skip", "double"])
def test_deit_tiny_masked_in_place_equals_removed(deit_tiny, imagenet_pixels, mask):
    layers = [0, 1, 3, 4, 6]
    dense = NoseViTForImageClassification.from_vit(str(deit_tiny))
    removed = NoseViTForImageClassification.from_vit(
        str(deit_tiny), layers, feature_compensation=mask == "double", force=True
    )
    with dense.masked_attention(layers, mask):
        masked = logits(dense, imagenet_pixels)
    assert masked.shape == (4, 1000) and math.isfinite(float(masked.sum()))
    assert torch.equal(masked, logits(removed, imagenet_pixels))


def test_randomised_models_differ_everywhere():
    """The fixtures' own guard: zero biases or equal outputs would hide mistakes."""
    assert all(bool(parameter.abs().min() > 0) for parameter in stock_vit().parameters())
    assert float(logits(stock_vit(), images()).std(0).min()) > 1e-3
    assert randomise(nn.Linear(2, 2), 0).bias.abs().min() > 0
