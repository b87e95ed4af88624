"""`from_vit` against stock models: the same logits, and every key accounted for."""

import copy
import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from reference_vit import NUM_BLOCKS, images, logits, nose, randomise, stock_vit, vit_config
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
)

from hf_nose import NoseViTBackbone, NoseViTForImageClassification, NoseViTModel
from hf_nose.surgery import fold


# Written out here, so that the test does not lean on what transformers happens to save.
OLD_NAMES = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def old_name(key: str) -> str:
    for new, old in OLD_NAMES.items():
        key = key.replace(new, old)
    return key.replace("layers.", "encoder.layer.")


def save_with_names(model, folder, rename=old_name, drop=(), add=()):
    """A checkpoint folder whose key names this test chooses."""
    model.config.save_pretrained(folder)
    record = json.loads((folder / "config.json").read_text())
    record |= {"architectures": [type(model).__name__], "model_type": "vit"}
    (folder / "config.json").write_text(json.dumps(record))
    state = {rename(key): tensor.contiguous() for key, tensor in model.state_dict().items()}
    for key in drop:
        del state[key]
    state |= {key: torch.ones(3) for key in add}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("rename", [old_name, str], ids=["old names", "new names"])
def test_from_a_folder(tmp_path, rename):
    save_with_names(stock_vit(), tmp_path, rename)
    keys = set(load_file(tmp_path / "model.safetensors"))
    assert ("vit.encoder.layer.0.attention.attention.query.weight" in keys) == (rename is old_name)
    for source in (tmp_path, str(tmp_path)):
        made = NoseViTForImageClassification.from_vit(source, class_token_tail=False)
        assert not made.training
        assert torch.equal(logits(made, images()), logits(stock_vit(), images()))


def test_from_an_object_copies_and_leaves_it_alone():
    stock = copy.deepcopy(stock_vit())
    made = NoseViTForImageClassification.from_vit(stock, [1, 3], class_token_tail=False)
    assert torch.equal(logits(made, images()), logits(nose([1, 3]), images()))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    assert torch.equal(logits(stock, images()), logits(stock_vit(), images()))
    assert made.training is False and NoseViTForImageClassification.from_vit(stock.train()).training is True


def test_removed_layers_are_left_without_compensation():
    made = nose([4, 1])
    assert made.config.removed_attention_layers == [1, 4]
    assert made.config.compensated_attention_layers == made.config.folded_attention_layers == []
    assert [block.gain for block in made.vit.layers] == [None, 1, None, None, 1, None]


def test_compensated_removal_is_refused_unless_forced():
    with pytest.raises(ValueError, match="feature_compensation=True doubles .*Dilute first, or pass force=True"):
        nose([1], feature_compensation=True)
    forced = nose([1, 2], feature_compensation=True, force=True)
    assert forced.config.compensated_attention_layers == [1, 2]
    assert nose([], feature_compensation=True).config.compensated_attention_layers == []


@pytest.mark.parametrize("layers", [[6], [-1], [2, 2], list(range(6))])
def test_wrong_layers(layers):
    with pytest.raises(StrictDataclassError):
        nose(layers)


# Both key sets


@pytest.mark.parametrize("key", ["vit.layers.0.extra.weight", "vit.encoder.layer.2.attention.gate", "decoder.weight"])
def test_a_stray_key_in_a_folder(tmp_path, key):
    save_with_names(stock_vit(), tmp_path, add=[key])
    with pytest.raises(ValueError, match=r"1 have no place \(\['.*(extra|gate|decoder)"):
        NoseViTForImageClassification.from_vit(tmp_path)


@pytest.mark.parametrize(
    "key", ["vit.encoder.layer.3.attention.output.dense.bias", "vit.layernorm.weight", "classifier.bias"]
)
def test_a_missing_key_in_a_folder(tmp_path, key):
    save_with_names(stock_vit(), tmp_path, drop=[key])
    with pytest.raises(ValueError, match="leaves 1 weights to chance"):
        NoseViTForImageClassification.from_vit(tmp_path)


def test_a_missing_key_in_a_folder_of_ours(tmp_path):
    nose([1]).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["vit.layers.2.mlp.fc1.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"leaves 1 weights to chance \(\['vit.layers.2.mlp.fc1.weight'\]\)"):
        NoseViTForImageClassification.from_vit(tmp_path)


def test_a_stray_key_in_an_object():
    stock = copy.deepcopy(stock_vit())
    stock.vit.layers[2].extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="unexpected .*layers.2.extra.bias"):
        NoseViTForImageClassification.from_vit(stock)


def test_a_missing_key_in_an_object():
    stock = copy.deepcopy(stock_vit())
    stock.vit.layers[2].mlp.fc2.bias = None
    with pytest.raises(ValueError, match=r"missing \['layers.2.mlp.fc2.bias'\]"):
        NoseViTForImageClassification.from_vit(stock)


def test_a_masked_image_model_is_refused():
    stock = ViTForMaskedImageModeling(vit_config(encoder_stride=4))
    with pytest.raises(ValueError, match="unexpected"):
        NoseViTModel.from_vit(stock)


def test_another_shape_is_refused(tmp_path):
    save_with_names(stock_vit(), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["vit.encoder.layer.1.intermediate.dense.bias"] = torch.zeros(47)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match="shape|mismatch"):
        NoseViTForImageClassification.from_vit(tmp_path)


@pytest.mark.parametrize("size", [0, 7, 1000, -100])
def test_a_truncated_file_is_loud(tmp_path, size):
    save_with_names(stock_vit(), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(SafetensorError):
        NoseViTForImageClassification.from_vit(tmp_path)


# Poolers and heads


def bare_vit(add_pooling_layer: bool) -> ViTModel:
    torch.manual_seed(3)
    return randomise(ViTModel(vit_config(), add_pooling_layer=add_pooling_layer), 3).eval()


@pytest.mark.parametrize("has_pooler", [True, False])
@pytest.mark.parametrize("from_folder", [True, False])
def test_a_pooler_only_where_the_checkpoint_has_one(tmp_path, has_pooler, from_folder):
    stock = bare_vit(has_pooler)
    source = save_with_names(stock, tmp_path) if from_folder else stock
    made = NoseViTModel.from_vit(source, [2])
    assert (made.pooler is not None) == made.config.use_pooler == has_pooler
    with torch.no_grad():
        if has_pooler:
            assert torch.equal(NoseViTModel.from_vit(source)(images()).pooler_output, stock(images()).pooler_output)
    made.save_pretrained(tmp_path / "ours")
    again, info = AutoModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    assert (again.pooler is not None) == has_pooler
    with torch.no_grad():
        assert torch.equal(again(images()).last_hidden_state, made(images()).last_hidden_state)


def test_a_classifier_checkpoint_gives_a_bare_model_without_pooler(tmp_path):
    save_with_names(stock_vit(), tmp_path)
    made = NoseViTModel.from_vit(tmp_path)
    assert made.pooler is None
    with torch.no_grad():
        assert torch.equal(made(images()).last_hidden_state, stock_vit().vit(images()).last_hidden_state)


def test_a_backbone_from_a_classifier(tmp_path):
    save_with_names(stock_vit(), tmp_path)
    made = NoseViTBackbone.from_vit(tmp_path, out_indices=[6])
    with torch.no_grad():
        expected = stock_vit().vit(images()).last_hidden_state[:, 1:].view(3, 4, 4, 24).permute(0, 3, 1, 2)
        assert torch.equal(made(images()).feature_maps[0], expected)


@pytest.mark.parametrize("source", ["object", "folder", "ours"])
def test_a_new_head(tmp_path, source):
    stock = stock_vit()
    if source == "folder":
        stock = save_with_names(stock, tmp_path)
    elif source == "ours":
        nose().save_pretrained(tmp_path)
        stock = tmp_path
    made = NoseViTForImageClassification.from_vit(stock, num_labels=9)
    assert made.classifier.weight.shape == (9, 24) and made.num_labels == made.config.num_labels == 9
    assert made.classifier.weight.std() > 0 and not made.classifier.bias.any()
    assert logits(made, images()).shape == (3, 9)
    with torch.no_grad():
        tokens = stock_vit().vit(images()).last_hidden_state
        assert torch.equal(made.vit(images()).last_hidden_state, tokens)


def test_the_same_number_of_labels_keeps_the_head():
    assert torch.equal(logits(nose(num_labels=5), images()), logits(stock_vit(), images()))


@pytest.mark.parametrize("kind", ["object", "folder", "folder of ours"])
def test_a_model_without_head_needs_num_labels(tmp_path, kind):
    source = bare_vit(False)
    if kind == "folder":
        source = save_with_names(source, tmp_path)
    elif kind == "folder of ours":
        NoseViTModel.from_vit(source).save_pretrained(tmp_path)
        source = tmp_path
    with pytest.raises(ValueError, match="classifier.*Pass num_labels=... for a new head"):
        NoseViTForImageClassification.from_vit(source)
    made = NoseViTForImageClassification.from_vit(source, num_labels=4)
    with torch.no_grad():
        assert torch.equal(made.vit(images()).last_hidden_state, bare_vit(False)(images()).last_hidden_state)


def test_labels_are_carried():
    names = {0: "cat", 1: "dog", 2: "owl"}
    stock = ViTForImageClassification(vit_config(id2label=names, label2id={v: k for k, v in names.items()}))
    made = NoseViTForImageClassification.from_vit(stock)
    assert made.config.id2label == names and made.config.label2id["owl"] == 2
    assert made.classifier.weight.shape == (3, 24)


def test_config_fields_are_carried():
    made = nose(drop_path_rate=0.1, chunk_size_attention=3)
    assert (made.config.drop_path_rate, made.config.chunk_size_attention) == (0.1, 3)


# What is not a ViT


@pytest.mark.parametrize("model_type", ["bert", "dinov2", "deit", "swin", None])
def test_a_folder_of_something_else(tmp_path, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "hidden_size": 24}))
    with pytest.raises(ValueError, match=f"model_type is {model_type!r}; supported are pre-norm Vision Transformers"):
        NoseViTForImageClassification.from_vit(tmp_path)


def test_an_object_of_something_else():
    config = Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=16, patch_size=4)
    with pytest.raises(ValueError, match="model_type is 'dinov2'"):
        NoseViTForImageClassification.from_vit(Dinov2ForImageClassification(config))


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(OSError):
        NoseViTForImageClassification.from_vit(tmp_path / "nothing")


# Compressed again


@pytest.mark.parametrize("from_folder", [True, False])
def test_a_compressed_checkpoint_is_compressed_again(tmp_path, from_folder):
    first = nose([1])
    if from_folder:
        first.save_pretrained(tmp_path)
    second = NoseViTForImageClassification.from_vit(tmp_path if from_folder else first, [4, 3])
    assert second.config.removed_attention_layers == [1, 3, 4]
    assert torch.equal(logits(second, images()), logits(nose([1, 3, 4]), images()))


@pytest.mark.parametrize("state", ["removed", "diluted"])
def test_a_layer_that_is_gone_cannot_be_removed_again(state):
    model = nose([1]) if state == "removed" else nose()
    if state == "diluted":
        model.dilute([1])
    with pytest.raises(ValueError, match=r"\[1\] are already removed or being diluted"):
        NoseViTForImageClassification.from_vit(model, [1, 2])


def test_a_folded_checkpoint_is_compressed_again():
    model = nose()
    model.dilute([0, 2])
    model.set_mask(0.0)
    again = NoseViTForImageClassification.from_vit(fold(model), [4])
    assert again.config.folded_attention_layers == [0, 2] and again.config.removed_attention_layers == [0, 2, 4]
    with model.masked_attention([4]):
        assert torch.equal(logits(again, images()), logits(model, images()))


@pytest.mark.parametrize("values", [[0.25, 0.75], [0.0, 0.0]])
def test_dilution_under_way_is_carried(values):
    model = nose()
    model.dilute([1, 3])
    model.set_mask(values)
    again = NoseViTForImageClassification.from_vit(model, [5])
    assert again.vit.mask_values() == values and again.vit.is_mask_zero == (values == [0.0, 0.0])
    assert again.config.compensated_attention_layers == [1, 3]
    with model.masked_attention([5]):
        assert torch.equal(logits(again, images()), logits(model, images()))


def test_a_bfloat16_source_keeps_its_dtype_and_an_exact_mask(tmp_path):
    model = nose()
    model.dilute([1, 3])
    model.set_mask(0.37)
    model.save_pretrained(tmp_path)
    half = NoseViTForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    again = NoseViTForImageClassification.from_vit(half, [5])
    assert again.dtype == again.classifier.weight.dtype == torch.bfloat16
    assert again.vit.mask_values() == model.vit.mask_values()
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_of_the_source_is_kept(dtype):
    stock = copy.deepcopy(stock_vit()).to(dtype)
    made = NoseViTForImageClassification.from_vit(stock, class_token_tail=False)
    assert {parameter.dtype for parameter in made.parameters()} == {dtype}
    assert torch.equal(logits(made, images(dtype=dtype)), logits(stock, images(dtype=dtype)))


# Real weights, old names


def test_deit_tiny(deit_tiny, imagenet_pixels):
    stock = ViTForImageClassification.from_pretrained(deit_tiny)
    made = NoseViTForImageClassification.from_vit(str(deit_tiny), class_token_tail=False)
    assert torch.equal(logits(made, imagenet_pixels), logits(stock, imagenet_pixels))
    assert sum(parameter.numel() for parameter in made.parameters()) == 5_717_416
    assert made.config.id2label[1] == "goldfish, Carassius auratus"
    bare = NoseViTModel.from_vit(str(deit_tiny), [0])
    assert bare.pooler is None and len(bare.layers) == 12
    assert NUM_BLOCKS != 12
