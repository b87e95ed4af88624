"""The bare line: a plain ViT with the folded weights, for transformers alone."""

import json
import re

import pytest
import torch
from exported import LAYERS, change_json, checkpoint, made, made_run
from huggingface_hub import ModelCard
from reference_vit import images, logits, nose
from tiny_run import files
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, ViTForImageClassification

from hf_nose.profiling import count_parameters
from hf_nose.stock_vit import export_stock_vit, to_stock_vit
from hf_nose.surgery import fold


def compressed(eps=1e-12, dtype=torch.float32, compensation=True):
    """Folded, with the eps of most checkpoints."""
    model = nose(dtype=dtype, layer_norm_eps=eps)
    model.dilute(LAYERS, feature_compensation=compensation)
    model.set_mask(0.0)
    return fold(model)


@pytest.mark.parametrize("compensation", [True, False])
def test_logits_are_ours(compensation):
    model = compressed(compensation=compensation)
    stock = to_stock_vit(model)
    assert type(stock) is ViTForImageClassification and stock.config.model_type == "vit"
    ours, theirs = logits(model, images()), logits(stock, images())
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()


def test_one_eps_and_removed_layers_bit_for_bit():
    """Where nothing was folded away, a plain ViT computes the very same sums."""
    for model in (nose(), nose(LAYERS), compressed(compensation=False)):
        assert torch.equal(logits(to_stock_vit(model), images()), logits(model, images()))


def test_what_was_removed_is_zero_and_saves_nothing():
    stock, dense = to_stock_vit(compressed()), nose()
    assert count_parameters(stock) == count_parameters(dense)
    for layer, block in enumerate(stock.vit.layers):
        assert bool(block.attention.o_proj.weight.any()) == (layer not in LAYERS)
        assert bool(block.attention.o_proj.bias.any()) == (layer not in LAYERS)
        if layer in LAYERS:
            assert bool((block.layernorm_before.weight == 1).all()) and not block.layernorm_before.bias.any()


def test_the_model_is_left_as_it_is():
    model = compressed().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    to_stock_vit(model)
    assert model.training and all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_half_precision_keeps_its_dtype():
    stock = to_stock_vit(compressed(dtype=torch.bfloat16))
    assert stock.dtype == torch.bfloat16


@pytest.mark.parametrize("state", ["half-diluted", "zero", "unfolded"])
def test_a_model_that_a_plain_vit_cannot_be(state):
    if state == "unfolded":
        model = nose(LAYERS, feature_compensation=True, force=True)
    else:
        model = made("half-diluted")
        model.set_mask(0.0 if state == "zero" else 0.37)
    with pytest.raises(ValueError, match=re.escape(f"layers {LAYERS} are diluted or double the stream")):
        to_stock_vit(model)


def test_an_eps_that_folding_changed_too_much_is_found():
    with pytest.raises(ArithmeticError, match="plain ViT's logits would differ by"):
        to_stock_vit(compressed(eps=1e-2))


def test_the_folder_loads_with_no_flag_and_no_code(tmp_path):
    model = compressed()
    source = made_run(tmp_path / "run")
    model.save_pretrained(source / "model")
    out = export_stock_vit(source, tmp_path / "out", base_model_id="facebook/deit-x")
    assert set(files(out)) == {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "vit" and "auto_map" not in config
    assert not [name for name in config if "attention_layers" in name or "nose" in name]
    loaded, info = AutoModelForImageClassification.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(loaded, images()), logits(to_stock_vit(model), images()))
    assert loaded.config.id2label == model.config.id2label
    bare, info = AutoModel.from_pretrained(out, output_loading_info=True)
    assert info["missing_keys"] == {"pooler.dense.weight", "pooler.dense.bias"}
    with torch.no_grad():
        tokens = model.vit(images()).last_hidden_state
        assert torch.allclose(bare(images()).last_hidden_state, tokens, atol=1e-5)
    assert AutoImageProcessor.from_pretrained(out).size == {"height": 16, "width": 16}
    card = ModelCard.load(out / "README.md")
    assert card.data.base_model == "facebook/deit-x"
    assert "saves nothing" in card.text and "pooler" in card.text and "removed: 1, 3, 4" in card.text
    assert 'from_pretrained("YOUR_NAME/run")' in card.text


def test_nothing_is_written_where_the_model_cannot_be_one(tmp_path):
    source = checkpoint(tmp_path / "source", "half-diluted")
    with pytest.raises(ValueError, match="are diluted"):
        export_stock_vit(source, tmp_path / "out")
    change_json(source / "config.json", num_labels=7)
    with pytest.raises(ValueError, match="in the weights, config.json says"):
        export_stock_vit(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
