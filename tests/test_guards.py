"""Hostile configurations are refused before a module is built, and weights that are not their configuration's."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_vit import images, logits, nose, stock_vit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import hf_nose
from hf_nose import NoseViTBackbone, NoseViTForImageClassification, NoseViTModel
from hf_nose.configuration_nose_vit import NoseViTConfig


SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
}
REFUSED = (ValueError, StrictDataclassError)
PATHS = ["../../secret", "/etc/passwd", "~/x", "evil/kernel", "owner/name--module.Class", "C:\\x", "a\nb", ""]
# What a configuration says in text, and what transformers would do with it: look it up, load it, or follow it.
TEXTS = [
    "hidden_act",
    "pooler_act",
    "drop_path_schedule",
    "hf_nose_version",
    "transformers_version",
    "problem_type",
    "dtype",
    "torch_dtype",
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "transformers_weights",
    "quantization_config",
    "auto_map",
    "architectures",
    "id2label",
    "label2id",
    "out_features",
    "removed_attention_layers",
    "folded_attention_layers",
    "token_reduction",
    "fusion_config",
    "per_layer_config",
]


def read(folder: Path, **fields) -> NoseViTConfig:
    """The configuration as transformers reads it from a file."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "nose_vit", **SIZES, **fields}))
    return NoseViTConfig.from_pretrained(folder)


@pytest.mark.parametrize("name", TEXTS)
def test_paths_are_no_values(tmp_path, name):
    for text in PATHS:
        with pytest.raises(REFUSED, match=name):
            read(tmp_path, **{name: text})


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 1_001},
        {"hidden_size": 65_537, "num_attention_heads": 1},
        {"removed_attention_layers": [0, 1, 2, 3, 4, 5, 0, 1]},
        {"removed_attention_layers": [1] * 1_000_000},
        {"diluted_attention_layers": [-1]},
        {"removed_attention_layers": [-6]},
        {"num_channels": 10**9},
        {"pooler_output_size": 10**9},
        {"encoder_stride": -1},
        {"image_size": 16_384, "patch_size": 1},
        {"layer_norm_eps": -1e-6},
        {"layer_norm_eps": float("nan")},
        {"layer_norm_eps": float("inf")},
        {"initializer_range": float("inf")},
        {"initializer_range": -1.0},
        {"hidden_dropout_prob": 1.5},
        {"attention_probs_dropout_prob": -0.1},
        {"id2label": {"-1": "a"}},
        {"id2label": {"0": ["a"]}},
        {"id2label": {"0": None}},
        {"label2id": {"a": -1}},
        {"label2id": {"a": 0.5}},
        {"dtype": "load"},
        {"dtype": "int8"},
        {"per_layer_config": {"0": {"hidden_size": 65_536}}},
        {"rope_parameters": {"rope_type": "x"}},
        {"kernel_config": {"kernel_mapping": {}}},
        {"architectures": ["os.system"]},
        {"auto_map": {"AutoModel": "../../x.Class"}},
        {"auto_map": {"AutoModel": "https://a.b/c--module.Class"}},
        {"auto_map": {"AutoModel": 3}},
        {"out_indices": [True]},
        {"num_labels": True},
    ],
    ids=lambda fields: str(fields)[:50],
)
def test_hostile_values_are_refused_before_a_module_is_built(tmp_path, monkeypatch, fields):
    monkeypatch.setattr(torch.nn.Module, "__init__", lambda *_: pytest.fail("a module was built"))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(REFUSED, match=f"{'|'.join(fields)}|num_labels"):
        read(tmp_path, **fields)
    with pytest.raises(REFUSED):
        NoseViTForImageClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name", ["validate", "to_dict", "stream_scale", "from_dict", "use_return_dict", "__class__", "save_pretrained"]
)
def test_a_key_does_not_hide_a_method(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} is a name of NoseViTConfig's own"):
        read(tmp_path, **{name: "x"})


def test_what_is_refused_is_told_in_few_words(tmp_path):
    for fields in ({"removed_attention_layers": list(range(1_000_000))}, {"auto_map": "x" * 1_000_000}):
        with pytest.raises(REFUSED) as refused:
            read(tmp_path, **fields)
        assert len(str(refused.value)) < 400


@pytest.mark.parametrize("name", ["removed_attention_layers", "out_indices", "architectures", "a_new_one"])
def test_long_lists_are_refused_before_their_entries_are_looked_at(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must be a list of at most 1001, got 1000000 entries"):
        read(tmp_path, **{name: [1] * 1_000_000})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(PATHS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
KEYS = sorted({*NoseViTConfig().to_dict(), *TEXTS, "num_labels", "output_attentions", "stage_names", "model_type"})


@settings(max_examples=100)
@given(fields=st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=3))
def test_any_values_are_taken_or_refused_never_half_taken(fields):
    """Nothing but the two errors that say why; what is taken is written and read again."""
    fields.pop("model_type", None)
    try:
        config = NoseViTConfig.from_dict({**SIZES, **json.loads(json.dumps(fields))})
    except REFUSED:
        return
    again = NoseViTConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))
    assert again.to_dict() == config.to_dict()


def test_what_ordinary_checkpoints_hold_is_taken(tmp_path):
    config = read(
        tmp_path,
        removed_attention_layers=[1],
        id2label={"0": "../../a cat", "1": "{{ 7 * 7 }}"},
        label2id={"../../a cat": 0, "{{ 7 * 7 }}": 1},
        dtype="bfloat16",
        architectures=["NoseViTForImageClassification"],
        auto_map={"AutoConfig": "configuration_nose_vit.NoseViTConfig", "AutoModel": "me/it--modeling.NoseViTModel"},
        attn_implementation="sdpa",
        transformers_version="5.23.0.dev0",
        problem_type="single_label_classification",
        out_features=["stem", "stage2"],
        a_key_of_a_later_version={"is": "kept"},
    )
    assert config.num_labels == 2 and config.dtype == torch.bfloat16
    assert config.a_key_of_a_later_version == {"is": "kept"}


# Keys and configuration


def saved(folder: Path, model, change=lambda state: None, **fields) -> Path:
    """A checkpoint whose weights and configuration were changed after it was saved."""
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**record, **fields}))
    return folder


LOADERS = [NoseViTForImageClassification, NoseViTModel, NoseViTBackbone, AutoModelForImageClassification]


@pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader.__name__)
@pytest.mark.parametrize(
    "fields, message",
    [
        ({"removed_attention_layers": []}, "10 missing .*0 unexpected"),
        ({"removed_attention_layers": [1, 2]}, "0 missing .*10 unexpected"),
        ({"removed_attention_layers": [2]}, "10 missing .*10 unexpected"),
        ({"num_hidden_layers": 7}, "16 missing .*0 unexpected"),
        ({"num_hidden_layers": 5, "out_features": None, "out_indices": None}, "0 missing .*16 unexpected"),
        ({"diluted_attention_layers": [3]}, "1 missing .*dilution_mask"),
    ],
)
def test_a_configuration_of_another_checkpoint_is_refused(tmp_path, loader, fields, message):
    with pytest.raises(ValueError, match=f"do not fit their configuration: {message}"):
        loader.from_pretrained(saved(tmp_path, nose([1]), **fields))


@pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader.__name__)
@pytest.mark.parametrize(
    "key", ["vit.layers.0.extra", "extra", "vit.dilution_mask", "vit.layers.1.attention.q_proj.bias"]
)
def test_an_unknown_tensor_is_refused(tmp_path, loader, key):
    with pytest.raises(ValueError, match=r"0 missing .*1 unexpected"):
        loader.from_pretrained(saved(tmp_path, nose([1]), lambda state: state.update({key: torch.ones(3)})))


def test_a_head_and_a_pooler_may_be_left_behind_or_new(tmp_path):
    def with_pooler(state):
        state |= {"vit.pooler.dense.weight": torch.ones(24, 24), "vit.pooler.dense.bias": torch.ones(24)}

    folder = saved(tmp_path / "pooler", nose([1]), with_pooler)
    loaded = NoseViTForImageClassification.from_pretrained(folder)
    assert torch.equal(logits(loaded, images()), logits(nose([1]), images()))
    assert not NoseViTModel.from_pretrained(folder).training
    model, info = NoseViTForImageClassification.from_pretrained(
        saved(tmp_path / "bare", nose([1]).vit), output_loading_info=True
    )
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert model.config.removed_attention_layers == [1]
    other = NoseViTForImageClassification.from_pretrained(folder, num_labels=9, ignore_mismatched_sizes=True)
    assert other.classifier.out_features == 9


def test_weights_that_are_a_pickle_are_not_loaded(tmp_path):
    model = nose([1])
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        NoseViTForImageClassification.from_pretrained(tmp_path)


def test_remote_code_refuses_too(tmp_path):
    """The files that travel, run by transformers from the checkpoint's own folder."""
    home = Path(hf_nose.__file__).parent
    folder = saved(tmp_path, nose([1]))
    for path in home.glob("*_nose_vit.py"):
        shutil.copy2(path, folder)
    remote = get_class_from_dynamic_module("modeling_nose_vit.NoseViTForImageClassification", folder)
    assert remote.__module__.startswith("transformers_modules")
    assert torch.equal(logits(remote.from_pretrained(folder), images()), logits(nose([1]), images()))
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**record, "removed_attention_layers": [1, 2]}))
    with pytest.raises(ValueError, match="do not fit their configuration"):
        remote.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**record, "transformers_weights": "../x.safetensors"}))
    with pytest.raises(ValueError, match="transformers_weights"):
        remote.from_pretrained(folder)


def test_a_stock_checkpoint_still_loads(tmp_path):
    stock_vit().save_pretrained(tmp_path)
    model = NoseViTForImageClassification.from_vit(str(tmp_path), [1])
    with model.all_tokens():
        assert torch.equal(logits(model, images()), logits(nose([1]), images()))
