"""Fine-tuning, linear probing and LoRA on other data."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import tiny_training as tiny
import torch
from PIL import Image
from tiny_run import files, finished_run
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from hf_nose.cli import BAD_INPUT, FAILED, OK, main
from hf_nose.command_line import parse_job
from hf_nose.data import load_image_data
from hf_nose.evaluation import evaluate_checkpoint
from hf_nose.files import locked
from hf_nose.images import digits_processor, load_processor
from hf_nose.modeling_nose_vit import NoseViTForImageClassification
from hf_nose.profiling import count_parameters
from hf_nose.settings import Settings
from hf_nose.surgery import fold
from hf_nose.transfer import start_model, transfer_job
from hf_nose.transfer_settings import TransferSettings


ROOT = Path(__file__).resolve().parents[1]
METHODS = {"full": {}, "linear_probe": {"linear_probe": True}, "lora": {"lora_rank": 2}}
NAMES = [str(digit) for digit in range(10)]
TINY = {
    "dataset": "digits",
    "device": "cpu",
    "steps": 8,
    "batch_size": 8,
    "eval_batch_size": 8,
    "max_train_samples": 48,
    "max_eval_samples": 20,
    "save_steps": 4,
    "eval_steps": 4,
    "logging_steps": 2,
    "shift": 1,
}


def start(kind="folded"):
    """A model of three classes."""
    if kind == "stock":
        torch.manual_seed(0)
        config = ViTConfig(**{key: tiny.model().config.to_dict()[key] for key in SHAPE}, num_labels=3)
        return ViTForImageClassification(config)
    if kind == "removed":
        return NoseViTForImageClassification.from_vit(tiny.model(), removed_attention_layers=[0, 2])
    model = tiny.model(diluted=[1, 3] if kind == "folded" else [])
    if kind == "folded":
        model.set_mask(0.0)
        model = fold(model)
    return model


SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size")


def saved(folder, model):
    model.save_pretrained(folder)
    digits_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folded(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("start") / "folded", start())


def words(folder, *switches, **values):
    values = {"output_dir": folder, **TINY, **values}
    return [f"--{name}={value}" for name, value in values.items() if value is not None] + list(switches)


def run(folder, *switches, **values):
    transfer_job(parse_job(TransferSettings, words(folder, *switches, **values)))
    return json.loads((folder / "metrics.json").read_text())


def load(folder):
    return NoseViTForImageClassification.from_pretrained(folder / "model")


def differing(one, other, without=()):
    """Names of the parameters that differ, but those that begin with one of `without`."""
    one, other = one.state_dict(), other.state_dict()
    return {name for name in one if not name.startswith(without) and not torch.equal(one[name], other[name])}


# What is trained and what is left behind


@pytest.mark.parametrize("method", METHODS)
def test_a_transfer_leaves_an_ordinary_model_and_its_record(folded, tmp_path, method, capsys):
    folder = tmp_path / "run"
    found = run(folder, model=folded, **METHODS[method])
    found_files = {path.name for path in folder.iterdir()}
    assert found_files == {".lock", "settings.yaml", "metrics.json", "model", "training"}
    assert {path.name for path in (folder / "model").iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    model = AutoModelForImageClassification.from_pretrained(folder / "model")
    assert type(model) is NoseViTForImageClassification
    assert model.config.folded_attention_layers == [1, 3] and model.config.id2label == dict(enumerate(NAMES))
    assert model.config.label2id["7"] == 7 and model.num_labels == 10

    # LoRA: two matrices of rank 2 beside each of 4 blocks' MLP (12 to 24 and back) and 2 blocks' attention (12 to 12).
    head, lora = 10 * 12 + 10, 2 * (4 * 2 * (12 + 24) + 2 * 4 * (12 + 12))
    count = {"full": count_parameters(model), "linear_probe": head, "lora": head + lora}
    assert found["trainable_parameters"] == count[method] and found["method"] == method
    assert f"Trainable parameters: {count[method]:,} of" in capsys.readouterr().out
    assert (found["training"]["steps"], found["training"]["log"][-1]["step"]) == (8, 8)
    assert found["model"]["parameters"] == count_parameters(model)
    assert (found["model"]["removed_attention_layers"], found["model"]["image_size"]) == ([1, 3], 8)
    assert (found["data"]["dataset"], found["data"]["num_train"], found["data"]["num_eval"]) == ("digits", 48, 20)
    assert found["hardware"]["device"] == "cpu" and found["versions"]["peft"] and found["settings"]["steps"] == 8
    again = evaluate_checkpoint(str(folder / "model"), "digits", max_eval_samples=20, device="cpu")
    assert {name: again[name] for name in found["metrics"]} == pytest.approx(found["metrics"], rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_frozen_stays(folded, tmp_path, method):
    run(tmp_path / "run", model=folded, **METHODS[method])
    before, after = NoseViTForImageClassification.from_pretrained(folded), load(tmp_path / "run")
    moved = differing(before.vit, after.vit)
    matrices = {name for name in before.vit.state_dict() if name.startswith("layers") and name.endswith("weight")}
    matrices = {name for name in matrices if "layernorm" not in name}
    assert moved == {"linear_probe": set(), "lora": matrices, "full": set(before.vit.state_dict())}[method]


def test_a_linear_probe_has_no_stochastic_depth(folded, tmp_path):
    """Frozen features are those of evaluation: whatever the rates of dropping, the head becomes the same."""
    heads = []
    for name, rate in (("off", 0.0), ("on", 0.9)):
        run(tmp_path / name, model=folded, linear_probe=True, drop_path_rate=rate)
        heads.append(load(tmp_path / name).classifier.weight)
    assert torch.equal(*heads)
    run(tmp_path / "full", model=folded, drop_path_rate=0.9)
    assert load(tmp_path / "full").config.drop_path_rate == 0.9


@pytest.mark.parametrize("kind", ["stock", "dense", "removed"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_starts_of_every_kind(tmp_path, kind, method):
    model = start(kind)
    run(tmp_path / "run", model=saved(tmp_path / kind, model), **METHODS[method])
    after = load(tmp_path / "run")
    assert after.config.removed_attention_layers == ([0, 2] if kind == "removed" else [])
    assert set(after.vit.state_dict()) == set(NoseViTForImageClassification.from_vit(model).vit.state_dict())


def test_the_real_model_on_real_images_of_another_size(deit_tiny, tmp_path):
    """DeiT-T with CIFAR-10's names at 32 px; its head and positions change, nothing else."""
    path = deit_tiny.parent / "cifar10"
    if not path.exists():
        pytest.skip("real data are not beside the repository: cifar10")
    settings = TransferSettings(model=str(deit_tiny), dataset=str(path), image_size=32, steps=1, linear_probe=True)
    names = load_image_data(str(path), max_train_samples=2, max_eval_samples=2).class_names
    model, processor = start_model(settings, names)
    assert model.config.id2label[0] == "airplane" and model.num_labels == 10
    assert processor.size["height"] == 32 and tuple(processor.image_mean) == (0.485, 0.456, 0.406)
    changed = ("classifier.", "vit.embeddings.position_embeddings")
    assert differing(NoseViTForImageClassification.from_vit(str(deit_tiny)), model, changed) == set()


# Classes


def test_a_model_of_as_many_classes_keeps_its_head_and_gets_the_names(folded, tmp_path):
    model, _ = start_model(TransferSettings(model=str(folded), steps=1), ["ant", "bee", "cat"])
    before = NoseViTForImageClassification.from_pretrained(folded)
    assert torch.equal(model.classifier.weight, before.classifier.weight)
    assert model.config.id2label == {0: "ant", 1: "bee", 2: "cat"} and model.config.label2id["cat"] == 2


def test_classes_without_names(folded):
    assert start_model(TransferSettings(model=str(folded), steps=1), None)[0].num_labels == 3
    model, _ = start_model(TransferSettings(model=str(folded), steps=1, num_labels=7), None)
    assert model.num_labels == 7 == len(model.config.id2label)
    with pytest.raises(ValueError, match="num_labels must be 2, the classes that the data set names, got 7"):
        start_model(TransferSettings(model=str(folded), steps=1, num_labels=7), ["a", "b"])


# Image size


@pytest.mark.parametrize("method", METHODS)
def test_another_image_size_is_part_of_what_is_saved(folded, tmp_path, method):
    folder = tmp_path / "run"
    found = run(folder, model=folded, image_size=16, **METHODS[method])
    model, processor = load(folder), load_processor(folder / "model")
    assert model.config.image_size == 16 == found["model"]["image_size"]
    assert processor.size["height"] == 16 == processor.size["width"]
    pixel_values = processor([Image.new("RGB", (8, 8))], return_tensors="pt").pixel_values
    assert model(pixel_values).logits.shape == (1, 10)
    again = evaluate_checkpoint(str(folder / "model"), "digits", max_eval_samples=20, device="cpu")
    assert again["loss"] == pytest.approx(found["metrics"]["loss"], rel=1e-6)


# Resume


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_transfer_ends_with_the_same_weights(folded, tmp_path, method, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    extra = {**METHODS[method], "drop_path_rate": 0.1, "model": folded}
    run(whole, **extra)
    run(parts, **extra)
    shutil.rmtree(parts / "model")
    shutil.rmtree(parts / "training" / "transfer" / "checkpoint-8")
    (parts / "metrics.json").unlink()
    transfer_job(parse_job(TransferSettings, ["--resume", f"--output_dir={parts}"]))
    assert json.loads((parts / "metrics.json").read_text())["training"]["resumed_from"] == "checkpoint-4"
    assert differing(load(whole), load(parts)) == set()
    before = files(parts)
    capsys.readouterr()
    transfer_job(parse_job(TransferSettings, ["--resume", f"--output_dir={parts}"]))
    said = capsys.readouterr().out
    assert files(parts) == before and "[1/1] transfer: finished before" in said and "from_pretrained" in said


def test_a_folder_is_used_once_continued_or_overwritten(folded, tmp_path, capsys):
    folder = tmp_path / "run"
    run(folder, model=folded)
    before = files(folder)

    def refused(*switches, code=BAD_INPUT, model=folded, **values):
        assert main(["transfer", *words(folder, *switches, model=model, **values)]) == code
        assert files(folder) == before
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-nose: ")]
        return line

    assert "is not empty" in refused()
    assert "batch_size (stage transfer: 8, now 4)" in refused("--resume", batch_size=4)
    assert "lora_rank (stage transfer: 0, now 2)" in refused("--resume", lora_rank=2)
    with locked(folder):
        assert "Another process is at work" in refused("--resume", code=FAILED)
    inside = str(folder / "model")
    assert "lies in output_dir" in refused("--overwrite", model=inside)
    assert main(["transfer", *words(folder, "--overwrite", model=folded, linear_probe=True)]) == OK
    assert json.loads((folder / "metrics.json").read_text())["method"] == "linear_probe"


def test_stochastic_depth_is_what_was_asked_for(folded):
    for schedule in ("constant", "linear"):
        values = {"model": str(folded), "drop_path_rate": 0.2, "drop_path_schedule": schedule}
        model, _ = start_model(TransferSettings(**values, steps=1), NAMES)
        assert (model.config.drop_path_rate, model.config.drop_path_schedule) == (0.2, schedule)


def test_half_a_checkpoint_is_trained_in_float32(tmp_path):
    model = start("removed").half()
    folder = saved(tmp_path / "half", model) or tmp_path / "half"
    found, _ = start_model(TransferSettings(model=str(folder), steps=1), NAMES)
    assert {parameter.dtype for parameter in found.parameters()} == {torch.float32}


def test_a_transfer_that_fails_leaves_no_model(folded, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(["transfer", *words(folder, model=folded, learning_rate=1e30, warmup=0)]) == FAILED
    said = capsys.readouterr().err
    assert "not finite" in said or "The loss is" in said
    assert not (folder / "model").exists() and not (folder / "metrics.json").exists()


# Settings


@pytest.mark.parametrize(
    "values, message",
    [
        ({"steps": None}, "Say how long to train: give steps or epochs"),
        ({"epochs": 2.0}, "epochs must be positive, and steps 0 beside it"),
        ({"linear_probe": True, "lora_rank": 2}, "linear_probe and lora_rank exclude each other"),
        ({"lora_rank": -1}, "lora_rank must be 0 or more, got -1"),
        ({"lora_alpha": 0}, "lora_alpha must be at least 1, got 0"),
        ({"lora_dropout": 1.0}, "lora_dropout must be in [0, 1), got 1.0"),
        ({"lora_rank": 2, "lora_targets": "q_proj,query"}, "lora_targets must be among q_proj,k_proj,v_proj,o_proj"),
        ({"lora_rank": 2, "lora_targets": ""}, "lora_targets must be among q_proj,k_proj,v_proj,o_proj"),
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"image_size": 10}, "image_size must be a multiple of the patch size 4"),
        ({"num_labels": 0}, "num_labels must be at least 1, got 0"),
        ({"num_labels": 4}, "num_labels must be 10, the classes that the data set names, got 4"),
        ({"model": None}, "model must be trained weights, a Hub id or a folder, got 'digits-vit'"),
        ({"model": "somewhere/config.json"}, "model must be trained weights"),
        ({"num_removed": 3}, "Unknown settings: --num_removed=3"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
    ],
)
def test_settings_that_cannot_be_are_one_line(folded, tmp_path, values, message, capsys):
    assert main(["transfer", *words(tmp_path / "run", **{"model": folded, **values})]) == BAD_INPUT
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-nose: ")]
    assert message in line
    assert not (tmp_path / "run" / "model").exists()


def test_a_recipe_holds_settings_of_a_transfer_and_flags_win(tmp_path):
    path = tmp_path / "probe.yaml"
    path.write_text("linear_probe: true\nepochs: 3.0\nbatch_size: 5\n")
    settings = parse_job(TransferSettings, ["--recipe", str(path), "--model=a/b", "--batch_size=6"])
    assert (settings.linear_probe, settings.epochs, settings.batch_size) == (True, 3.0, 6)
    assert settings.folder.as_posix() == "runs/probe" and settings.method == "linear_probe"
    path.write_text("num_removed: 3\n")
    with pytest.raises(ValueError, match="unknown settings num_removed"):
        parse_job(TransferSettings, ["--recipe", str(path), "--model=a/b", "--steps=6"])


def test_without_a_recipe_there_is_none(folded):
    """The digits recipe is one of the main job."""
    settings = parse_job(TransferSettings, [f"--model={folded}", "--dataset=digits", "--steps=3"])
    assert settings.recipe is None and settings.batch_size == Settings.batch_size


# Dry run, script, a compressed run's model


@pytest.mark.parametrize("method", METHODS)
def test_a_dry_run_writes_nothing(folded, tmp_path, method, capsys):
    arguments = words(tmp_path / "run", "--dry_run", model=folded, image_size=12, **METHODS[method])
    assert main(["transfer", *arguments]) == OK
    said = capsys.readouterr().out
    assert "image_size: 12" in said and "Trainable parameters: " in said and "nothing was written" in said
    assert "One forward on cpu: (1, 3, 12, 12) -> (1, 10), finite: True" in said
    assert not (tmp_path / "run").exists()


def parquet(folder):
    """Sixteen grey images of two classes without names, of another size."""
    images = [Image.fromarray(np.full((20, 30), 15 * index, dtype=np.uint8)) for index in range(16)]
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.Value("int64")})
    rows = {"picture": images, "kind": [index % 2 for index in range(16)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    return folder / "train.parquet"


@pytest.mark.slow
def test_the_script_is_the_verb(tmp_path_factory, tmp_path):
    """In a process of its own, on the compressed model of a run and somebody's own images."""
    model = finished_run(tmp_path_factory) / "model"
    columns = {"dataset": parquet(tmp_path), "image_column": "picture", "label_column": "kind", "num_labels": 2}
    arguments = words(tmp_path / "run", model=model, lora_rank=2, **columns)
    script = str(ROOT / "scripts" / "run_transfer.py")
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == OK, done.stderr
    assert "Trainable parameters: " in done.stdout and "from_pretrained" in done.stdout
    assert load(tmp_path / "run").num_labels == 2
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert found["model"]["source"] == "a local folder" and found["data"]["dataset"] == "a local data set"
    assert str(tmp_path) not in (tmp_path / "run" / "model" / "config.json").read_text()
