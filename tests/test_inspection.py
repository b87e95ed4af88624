"""The header of the weights against the configuration, and what `hf-nose inspect` says of a checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from reference_vit import NUM_BLOCKS, nose, stock_vit
from safetensors.torch import load_file, save_file
from transformers import ViTModel

from hf_nose import NoseViTBackbone, NoseViTForImageClassification
from hf_nose.cli import BAD_INPUT, OK, main
from hf_nose.headers import INDEX, WEIGHTS
from hf_nose.inspection import check_weights, inspect_checkpoint
from hf_nose.profiling import count_macs, count_parameters
from hf_nose.surgery import fold


def diluted(mask=0.37, compensation=True):
    model = nose([0])
    model.dilute([1, 3], feature_compensation=compensation)
    model.set_mask(mask)
    return model


def folded():
    return fold(diluted(0.0))


def saved(folder: Path, model, change=None, **fields) -> Path:
    model.save_pretrained(folder)
    if change is not None:
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**record, **fields}))
    return folder


@pytest.mark.parametrize(
    "make",
    [nose, diluted, folded, stock_vit, lambda: nose([1]).vit, lambda: ViTModel(stock_vit().config)],
    ids=["dense", "diluted", "folded", "stock", "bare", "stock bare with pooler"],
)
def test_what_was_saved_fits(tmp_path, make):
    model = make()
    found = check_weights(saved(tmp_path, model))
    assert found["files"] == [WEIGHTS] and found["bytes"] == (tmp_path / WEIGHTS).stat().st_size
    assert found["parameters"] == count_parameters(model) and found["dtypes"] == ["float32"]
    assert found["mask"] == (model.vit.mask_values() if make is diluted else [])


def test_shards_and_backbones_fit_too(tmp_path):
    diluted().save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    found = check_weights(tmp_path / "shards")
    assert len(found["files"]) > 2 and found["parameters"] == count_parameters(diluted())
    assert inspect_checkpoint(str(tmp_path / "shards"))["mask"] == pytest.approx([0.37, 0.37])
    nose([1]).save_pretrained(tmp_path / "dense")
    NoseViTBackbone.from_pretrained(tmp_path / "dense").save_pretrained(tmp_path / "backbone")
    assert check_weights(tmp_path / "backbone")["tensors"] == len(nose([1]).state_dict()) - 2


@pytest.mark.parametrize(
    "change, fields, message",
    [
        (None, {"removed_attention_layers": [0], "folded_attention_layers": []}, "20 missing .*0 unexpected"),
        (None, {"removed_attention_layers": [0, 1, 2, 3]}, "0 missing .*10 unexpected"),
        (None, {"diluted_attention_layers": [2]}, "1 missing .*vit.dilution_mask"),
        (lambda state: state.pop("classifier.bias"), {}, r"1 missing \(\['classifier.bias'\]\)"),
        (lambda state: state.update(more=torch.ones(2)), {}, r"1 unexpected \(\['more'\]\)"),
        (lambda state: state.update({"vit.layernorm.bias": torch.ones(23)}), {}, r"has shape \[23\] in the"),
        (
            lambda state: state.update({"vit.layernorm.bias": torch.ones(24, dtype=torch.int32)}),
            {},
            "layernorm.bias is I32 in the weights, expected one of F64",
        ),
        (None, {"hidden_size": 48}, r"config.json says \[1, 1, 48\]"),
        (None, {"num_hidden_layers": 10**9}, "config.json is refused: .*num_hidden_layers must be in"),
        (None, {"architectures": ["Evil"]}, "architectures must be one of"),
        (None, {"architectures": None}, "architectures must be one of"),
        (None, {"model_type": "dinov2"}, "model_type is 'dinov2'"),
    ],
)
def test_weights_that_are_not_their_configurations_are_refused(tmp_path, change, fields, message):
    with pytest.raises(ValueError, match=message):
        check_weights(saved(tmp_path, folded(), change, **fields))


@pytest.mark.parametrize("value", [[0.5, 1.5], [-0.1, 0.0], [float("nan"), 0.0]])
def test_a_mask_out_of_range_is_refused(tmp_path, value):
    def change(state):
        state["vit.dilution_mask"] = torch.tensor(value)

    with pytest.raises(ValueError, match=r"dilution_mask must hold numbers in \[0, 1\]"):
        check_weights(saved(tmp_path, diluted(), change))


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_cut_file_is_refused(tmp_path, size):
    path = saved(tmp_path, nose([1])) / WEIGHTS
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=f"{WEIGHTS} are missing, corrupt or truncated"):
        check_weights(tmp_path)


def test_pickles_are_named_and_not_opened(tmp_path):
    saved(tmp_path, nose([1]))
    (tmp_path / WEIGHTS).rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"\['pytorch_model.bin'\] are pickles, which may run code"):
        check_weights(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", "null"])
def test_a_damaged_configuration_is_refused(tmp_path, text):
    (saved(tmp_path, nose([1])) / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json (is not JSON|must hold an object)"):
        check_weights(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="it holds no config.json"):
        check_weights(tmp_path)


@pytest.fixture
def shards(tmp_path):
    nose([1]).save_pretrained(tmp_path / "it", max_shard_size="20KB")
    return tmp_path / "it"


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/x.safetensors", "a/b.safetensors", ".x.safetensors", 3, "x.bin"]
)
def test_an_index_that_leads_out_of_its_folder_is_refused(shards, name):
    index = json.loads((shards / INDEX).read_text())
    index["weight_map"]["vit.layernorm.bias"] = name
    (shards / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="must name safetensors files beside it"):
        check_weights(shards)


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": {}}}']
)
def test_an_index_that_is_none_is_refused(shards, content):
    (shards / INDEX).write_text(content)
    with pytest.raises(ValueError, match=f"{INDEX} (is no index|must name)"):
        check_weights(shards)


def test_shards_must_hold_what_their_index_says(shards):
    index = json.loads((shards / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    for key, name, message in (
        ("vit.layernorm.bias", None, "disagree on 1 tensors"),
        ("vit.embeddings.cls_token", files[-1], "disagree on 1 tensors"),
        ("new", files[0], "disagree on 1 tensors"),
    ):
        changed = {**index["weight_map"], key: name}
        (shards / INDEX).write_text(json.dumps({"weight_map": {k: v for k, v in changed.items() if v}}))
        with pytest.raises(ValueError, match=message):
            check_weights(shards)
    (shards / INDEX).write_text(json.dumps(index))
    save_file({**load_file(shards / files[0]), **load_file(shards / files[1])}, shards / files[1])
    with pytest.raises(ValueError, match="is in two files"):
        check_weights(shards)
    (shards / files[0]).unlink()
    with pytest.raises(ValueError, match=f"{files[0]} are missing"):
        check_weights(shards)


# What it says


def test_a_folded_checkpoint_is_told_from_its_dense_twin(tmp_path):
    model = folded()
    record = inspect_checkpoint(str(saved(tmp_path / "deit-x", model)))
    assert record["layers"] == {
        "kept": [2, 4, 5],
        "removed": [0, 1, 3],
        "diluted": [],
        "compensated": [],
        "folded": [1, 3],
    }
    assert record["state"].startswith("folded") and record["mask"] == []
    assert record["parameters"] == count_parameters(model) == record["weights"]["parameters"]
    assert record["macs"] == count_macs(model)["total"]
    assert record["dense_twin"] == {"parameters": count_parameters(nose()), "macs": count_macs(nose())["total"]}
    assert record["source"] == "deit-x" and record["num_hidden_layers"] == NUM_BLOCKS


@pytest.mark.parametrize(
    "make, state",
    [
        (nose, "dense"),
        (lambda: nose([1]), "removed without compensation"),
        (lambda: nose([1], feature_compensation=True, force=True), "removed, not folded: layers 1 still"),
        (diluted, "in dilution: M is 0.37, 0.37 in layers 1, 3"),
        (lambda: diluted([0.0, 0.5]), "in dilution: M is 0, 0.5"),
        (lambda: diluted(0.0), "diluted to M = 0"),
        (stock_vit, "dense"),
    ],
)
def test_every_state_has_its_words(tmp_path, make, state):
    model = make()
    record = inspect_checkpoint(str(saved(tmp_path, model)))
    assert record["state"].startswith(state)
    assert record["macs"] == count_macs(model)["total"], "at M = 0 diluted attention costs nothing"
    assert record["parameters"] == count_parameters(model)


def test_the_verb_prints_for_people_and_for_programs(tmp_path, capsys):
    folder = saved(tmp_path / "half", diluted([0.25, 0.5]))
    assert main(["inspect", str(folder)]) == OK
    said = capsys.readouterr().out
    assert "Kept        2, 4, 5" in said and "Diluted     1, 3" in said and "Removed     0\n" in said
    assert "M           0.25, 0.5" in said and "they fit the configuration" in said
    assert str(tmp_path) not in said
    assert main(["inspect", str(folder), "--json"]) == OK
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["mask"] == [0.25, 0.5] and str(tmp_path) not in json.dumps(record)


def test_the_verb_refuses_with_one_line(tmp_path, capsys):
    folder = saved(tmp_path, nose([1]), removed_attention_layers=[2])
    assert main(["inspect", str(folder)]) == BAD_INPUT
    assert "do not fit config.json" in capsys.readouterr().err
    assert main(["inspect", str(folder), "--revision", "main"]) == BAD_INPUT
    assert "revision belongs to a Hub id" in capsys.readouterr().err


def test_nothing_is_loaded_before_the_header_is_read(tmp_path, monkeypatch):
    folder = saved(tmp_path, folded())
    monkeypatch.setattr(
        NoseViTForImageClassification, "from_pretrained", lambda *_: pytest.fail("weights were loaded")
    )
    assert inspect_checkpoint(str(folder))["state"].startswith("folded")


def test_real_weights_with_old_names(deit_tiny):
    record = inspect_checkpoint(str(deit_tiny))
    assert record["state"].startswith("dense") and record["parameters"] == 5_717_416
