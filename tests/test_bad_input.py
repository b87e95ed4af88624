"""Bad input through the front door: a clear error of one line, and nothing that was there is lost."""

import errno
import io
import json
import shutil
import subprocess
import sys
import textwrap

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_run import files, finished_run, flags, record, resume, run, tiny_model

from hf_nose.cli import BAD_INPUT, FAILED, OK, main
from hf_nose.evaluation import evaluate_checkpoint
from hf_nose.modeling_nose_vit import NoseViTForImageClassification


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run through all stages; only read."""
    return finished_run(tmp_path_factory)


@pytest.fixture
def dense(finished, tmp_path):
    """The folder of a dense model, to be damaged."""
    return shutil.copytree(finished / "dense", tmp_path / "dense")


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def png(seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="png")
    return file.getvalue()


def parquet(folder, count=12, images=None, labels=None, columns=("image", "label")):
    """A data set of one split in a parquet file, images as encoded bytes."""
    cells = [{"bytes": png(index), "path": None} for index in range(count)] if images is None else images
    labels = [index % 10 for index in range(count)] if labels is None else labels
    features = datasets.Features({columns[0]: datasets.Image(decode=False), columns[1]: datasets.Value("int64")})
    made = datasets.Dataset.from_dict({columns[0]: cells, columns[1]: labels}, features=features)
    made.to_parquet(folder / "train.parquet")
    return folder / "train.parquet"


def fails(folder, capsys, *switches, **values):
    """Runs the command, which fails; returns its exit code and what it said in its one line."""
    code = main(["run", *flags(folder, *switches, **values)])
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("hf-nose: ")]
    assert len(lines) == 1 and "Traceback" not in said, said
    assert not (folder / "selection.json").exists() and not list(folder.glob(".*.partial"))
    return code, lines[0]


PRETRAINED = {"dense_steps": 0, "stages": "prepare,profile,select", "num_removed": 1}


# Models


@pytest.mark.parametrize("model_type", ["dinov2", "swin", "bert"])
def test_a_model_that_is_no_vit(dense, tmp_path, capsys, model_type):
    change_config(dense, model_type=model_type)
    code, said = fails(tmp_path / "run", capsys, model=dense, **PRETRAINED)
    assert code == BAD_INPUT
    assert f"model_type is '{model_type}'; supported are pre-norm Vision Transformers" in said
    with pytest.raises(ValueError, match="supported are pre-norm Vision Transformers"):
        evaluate_checkpoint(str(dense), "digits", device="cpu")


def test_a_checkpoint_of_a_newer_format(dense, tmp_path, capsys):
    change_config(dense, format_version=99, hf_nose_version="9.0")
    code, said = fails(tmp_path / "run", capsys, model=dense, **PRETRAINED)
    assert code == BAD_INPUT
    assert "format_version is 99" in said and "9.0" in said


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "header"])
def test_damaged_weights(dense, tmp_path, capsys, damage):
    file = dense / "model.safetensors"
    content = file.read_bytes()
    changed = {
        "truncated": content[:-100],
        "empty": b"",
        "garbage": bytes(len(content)),
        "header": content[:20] + b"\xff" + content[21:],
    }
    file.write_bytes(changed[damage])
    code, said = fails(tmp_path / "run", capsys, model=dense, **PRETRAINED)
    assert code == BAD_INPUT
    assert f"The weights of {dense} are corrupt or truncated" in said
    with pytest.raises(ValueError, match="corrupt or truncated"):
        evaluate_checkpoint(str(dense), "digits", device="cpu")


def test_damaged_weights_inside_a_run_are_named_too(finished, tmp_path, capsys):
    copy = shutil.copytree(finished, tmp_path / "run")
    file = copy / "dense" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    before = files(copy)
    assert main(["profile", str(copy)]) == BAD_INPUT
    assert "dense are corrupt or truncated" in capsys.readouterr().err
    assert files(copy) == before


def test_a_folder_without_image_processor(dense, tmp_path, capsys):
    (dense / "preprocessor_config.json").unlink()
    code, said = fails(tmp_path / "run", capsys, model=dense, **PRETRAINED)
    assert code == BAD_INPUT and "holds no preprocessor_config.json" in said


def test_a_folder_that_is_no_model(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    code, said = fails(tmp_path / "run", capsys, model=tmp_path / "empty", **PRETRAINED)
    assert code == BAD_INPUT and "model_type is None; supported are" in said


@pytest.mark.parametrize("content", ["{", "[1]", '{"model_type": "bert"}'])
def test_a_configuration_that_is_none(tmp_path, capsys, content):
    path = tiny_model(tmp_path / "model")
    path.write_text(content)
    code, said = fails(tmp_path / "run", capsys, model=path)
    assert code == BAD_INPUT and str(path) in said


def test_random_weights_are_not_compressed(tmp_path, capsys):
    code, said = fails(tmp_path / "run", capsys, dense_steps=0)
    assert code == BAD_INPUT and "random weights: set dense_steps" in said


# Layers, before the dense training


@pytest.mark.parametrize(
    "values, message",
    [
        ({"num_removed": 4}, "num_removed must be in [1, 3], got 4"),
        ({"num_removed": None, "ratio": "0.1"}, "ratio 0.1 of 4 blocks rounds to no layer"),
        ({"num_removed": None, "layers": "0,4"}, "4"),
        ({"num_removed": None, "layers": "2,2"}, "2"),
        ({"num_removed": None, "layers": "0,1,2,3"}, "class token"),
        ({"num_removed": None, "layers": "a"}, "layers must be indices"),
    ],
)
def test_layers_are_refused_before_anything_is_trained(tmp_path, capsys, monkeypatch, values, message):
    monkeypatch.setattr("hf_nose.context.fit", lambda *args, **kwargs: pytest.fail("trained first"))
    code, said = fails(tmp_path / "run", capsys, **values)
    assert code == BAD_INPUT and message in said


# Data


@pytest.mark.parametrize("columns, missing", [(("x", "label"), "label"), (("image", "y"), "image")])
def test_a_data_set_without_a_column_lists_those_it_has(tmp_path, capsys, columns, missing):
    made = datasets.Dataset.from_dict({columns[0]: ["a", "b"], columns[1]: ["c", "d"]})
    made.to_parquet(tmp_path / "train.parquet")
    code, said = fails(tmp_path / "run", capsys, dataset=tmp_path / "train.parquet")
    assert code == BAD_INPUT and f"{list(columns)}" in said


@pytest.mark.parametrize(
    "broken", [b"no image", b"", png()[:60], None], ids=["text", "no bytes", "truncated", "no cell"]
)
def test_an_unreadable_image_names_its_row(finished, tmp_path, capsys, broken):
    images = [{"bytes": png(index), "path": None} for index in range(12)]
    images[7] = None if broken is None else {"bytes": broken, "path": None}
    path = parquet(tmp_path, images=images)
    code, said = fails(tmp_path / "run", capsys, dataset=path, model=finished / "dense", **PRETRAINED)
    assert code == BAD_INPUT and "Row 7 of split 'train'" in said


@pytest.mark.parametrize("label", [10, -1])
def test_a_label_outside_the_classes_names_its_row(finished, tmp_path, capsys, label):
    path = parquet(tmp_path, labels=[0, 1, 2, 3, label, 5, 6, 7, 8, 9, 0, 1])
    code, said = fails(tmp_path / "run", capsys, dataset=path, model=finished / "dense", **PRETRAINED)
    assert code == BAD_INPUT
    assert f"Row 4 of split 'train' has label {label}" in said and "between 0 and 9" in said


def test_a_data_set_with_one_image_or_none(tmp_path, capsys):
    for count, message in ((1, "too few to divide it in two"), (0, "could not be loaded")):
        (tmp_path / str(count)).mkdir()
        path = parquet(tmp_path / str(count), count=count)
        code, said = fails(tmp_path / f"run-{count}", capsys, dataset=path)
        assert code == BAD_INPUT and message in said


@pytest.mark.parametrize("name", ["num_calibration", "max_train_samples", "max_eval_samples"])
def test_empty_sets_are_refused_by_the_setting(tmp_path, capsys, name):
    code, said = fails(tmp_path / "run", capsys, **{name: 0})
    assert code == BAD_INPUT and f"{name} must be at least 1, got 0" in said


def test_more_calibration_images_than_there_are_is_noted(tmp_path):
    run(tmp_path / "run", stages="prepare,profile,select", num_calibration=100, dense_steps=1)
    found = record(tmp_path / "run", "selection")["calibration"]
    assert found["num_images"] == 48
    assert any("all 48 training images were taken" in note for note in found["notes"])


# Not a number


def test_not_a_number_in_the_weights_names_the_batch(dense, tmp_path, capsys):
    state = load_file(dense / "model.safetensors")
    state["vit.layers.2.mlp.fc2.weight"][0, 0] = float("nan")
    save_file(state, dense / "model.safetensors", metadata={"format": "pt"})
    assert main(["run", *flags(tmp_path / "run", model=dense, **PRETRAINED)]) == FAILED
    assert "hf-nose: Calibration batch 0: features hold NaN" in capsys.readouterr().err
    assert not (tmp_path / "run" / "profile.json").exists()


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(tmp_path, capsys, monkeypatch):
    """At step 6, after the checkpoint of step 4; then the cause is gone and the run goes on from there."""
    folder, seen = tmp_path / "run", []
    augment = "hf_nose.augmentation.BatchAugmentation.__call__"

    def poisoned(self, pixel_values, step, **where):
        seen.append(step)
        return pixel_values * float("nan") if step == 6 else pixel_values

    with monkeypatch.context() as patch:
        patch.setattr(augment, poisoned)
        assert main(["run", *flags(folder, stages="prepare", dense_steps=8)]) == FAILED
    said = capsys.readouterr().err
    assert "hf-nose: The loss is nan at step 6" in said and max(seen) == 6
    assert [path.name for path in (folder / "training" / "dense").iterdir()] == ["checkpoint-4"]
    assert not (folder / "prepare.json").exists() and not (folder / "dense").exists()
    resume(folder)
    assert record(folder, "prepare")["dense_training"]["resumed_from"] == "checkpoint-4"


# Disks


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("name", ["selection.json", "model"])
def test_a_full_disk_leaves_nothing_half_written_and_the_run_goes_on(finished, tmp_path, capsys, monkeypatch, name):
    copy = shutil.copytree(finished, tmp_path / "run")
    stage = {"selection.json": "select", "model": "fold"}[name]
    for path in ("selection.json", "dilution.json", "fold.json", "metrics.json"):
        if stage == "select" or path in ("fold.json", "metrics.json"):
            (copy / path).unlink()
    before = files(copy)
    with monkeypatch.context() as patch:
        if stage == "fold":
            # A configuration is written, then the disk is full.
            def half(self, folder, **options):
                self.config.save_pretrained(folder)
                raise NO_SPACE

            patch.setattr(NoseViTForImageClassification, "save_pretrained", half)
        else:
            patch.setattr("hf_nose.files.os.fsync", lambda descriptor: (_ for _ in ()).throw(NO_SPACE))
        code = main(["run", "--resume", f"--output_dir={copy}", f"--stages={stage}"])
    assert code == FAILED and "No space left on device" in capsys.readouterr().err
    assert files(copy) == before
    assert main(["run", "--resume", f"--output_dir={copy}", f"--stages={stage}"]) == OK


def test_a_file_system_that_takes_no_large_file(tmp_path):
    """RLIMIT_FSIZE in a child process: the weights cannot be written, whoever runs it."""
    script = textwrap.dedent(
        """
        import resource, sys
        from hf_nose.cli import main
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        sys.exit(main(sys.argv[1:]))
        """
    )
    folder = tmp_path / "run"
    words = flags(folder, stages="prepare", dense_steps=1, save_steps=100)
    # The data were prepared by other tests or by this: their cache is not what is tested.
    child = subprocess.run([sys.executable, "-c", script, "run", *words], capture_output=True, text=True, timeout=200)
    assert child.returncode == FAILED, child.stderr
    assert "Traceback" not in child.stderr and "hf-nose: " in child.stderr
    assert not (folder / "prepare.json").exists() and not (folder / "dense").exists()
    assert not [path for path in folder.rglob("checkpoint-*") if path.parent.name != ".staging"]


def test_a_folder_below_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    code = main(["run", *flags(tmp_path / "file" / "run", model=tiny_model(tmp_path / "model"))])
    said = capsys.readouterr().err
    assert code == FAILED and "Traceback" not in said and str(tmp_path / "file") in said
    assert (tmp_path / "file").read_text() == "mine"


def test_what_is_removed_from_a_compressed_model_is_not_there_to_be_removed(finished, tmp_path, capsys):
    removed = record(finished, "fold")["removed_attention_layers"]
    values = {**PRETRAINED, "num_removed": None, "layers": str(removed[0])}
    code, said = fails(tmp_path / "run", capsys, model=finished / "model", **values)
    assert code == BAD_INPUT and str(removed[0]) in said


def test_logits_of_a_broken_model_stop_the_evaluation(dense, capsys):
    state = load_file(dense / "model.safetensors")
    state["classifier.bias"] = torch.full_like(state["classifier.bias"], float("inf"))
    save_file(state, dense / "model.safetensors", metadata={"format": "pt"})
    assert main(["evaluate", f"--model={dense}", "--dataset=digits", "--device=cpu", "--max_eval_samples=8"]) == FAILED
    assert "hf-nose: " in capsys.readouterr().err
