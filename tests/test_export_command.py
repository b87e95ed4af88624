"""`hf-nose export`: what is refused, where it writes, what it prints."""

import json
import shutil

import pytest
from exported import checkpoint, made_run, processor
from reference_vit import nose
from tiny_run import files, finished_run, flags, record

from hf_nose.cli import BAD_INPUT, FAILED, INTERRUPTED, OK, main
from hf_nose.export_command import FORMATS, default_folder
from hf_nose.stages import STAGE_FUNCTIONS


@pytest.mark.parametrize(
    "words, message",
    [
        (["MODEL", "--int8"], "int8 belongs to --format onnx, not to hf"),
        (["MODEL", "--format", "stock-vit", "--task_id", "x"], "task_id belongs to --format hf, not to stock-vit"),
        (["MODEL", "--format", "onnx", "--base_model_id", "a/b"], "base_model_id belongs to --format hf or stock-vit"),
        (["MODEL", "--format", "onnx", "--dataset", "digits"], "dataset needs --int8"),
        (["MODEL", "--format", "onnx", "--int8", "--eval_split", "test"], "eval_split needs --dataset"),
        (["MODEL", "--format", "stock-vit"], "are diluted or double the stream"),
        (["./nothing"], "neither a folder nor a Hub id"),
        (["MODEL", "--base_model_id", "/home/me/deit"], "base_model_id must be a Hub id"),
    ],
)
def test_bad_input_is_one_line_and_two(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = checkpoint(tmp_path / "model", "half-diluted")
    capsys.readouterr()
    assert main(["export", *[word.replace("MODEL", str(source)) for word in words]]) == BAD_INPUT
    said = capsys.readouterr().err
    assert said.startswith("hf-nose: ") and message in said and "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("words", [[], ["MODEL", "--format", "tflite"], ["MODEL", "--wrong"]])
def test_what_the_parser_refuses(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["export", *words])
    assert ended.value.code == BAD_INPUT
    assert "usage: hf-nose export" in capsys.readouterr().err


def test_a_hub_id_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "someone/nothing"]) == FAILED
    assert "someone/nothing" not in str(list(tmp_path.iterdir())) and "Traceback" not in capsys.readouterr().err


def test_where_it_writes(tmp_path):
    run = made_run(tmp_path / "run")
    assert default_folder(str(run), "hf") == run / "export" / "hf"
    assert str(default_folder(str(run / "model"), "onnx")) == "model-onnx"
    assert str(default_folder("facebook/deit-tiny-patch16-224", "hf")) == "deit-tiny-patch16-224-hf"


def test_all_formats_of_a_run(tmp_path, capsys, monkeypatch):
    run = made_run(tmp_path / "run")
    # The eps of these tests is one that a plain ViT cannot follow.
    nose([1, 3]).save_pretrained(run / "model")
    nose().save_pretrained(run / "dense")
    processor().save_pretrained(run / "dense")
    wanted = {"hf": "modeling_nose_vit.py", "onnx": "model.onnx", "stock-vit": "README.md", "space": "app.py"}
    assert set(wanted) == set(FORMATS)
    for form, name in wanted.items():
        assert main(["export", str(run), "--format", form, "--json"]) == OK
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        folder = run / "export" / form
        assert found["output_dir"] == str(folder) and found["format"] == form
        assert found["files"] == {file: len(content) for file, content in files(folder).items()}
        assert name in found["files"] and ("config.json" in found["files"]) == (form != "space")
    assert main(["export", str(run)]) == BAD_INPUT
    assert "is not empty" in capsys.readouterr().err
    assert main(["export", str(run), "--overwrite"]) == OK
    assert f"Written to {run / 'export' / 'hf'}" in capsys.readouterr().out


@pytest.mark.slow
def test_what_is_run_again_drops_the_export(tmp_path_factory, tmp_path, capsys):
    run = shutil.copytree(finished_run(tmp_path_factory), tmp_path / "run")
    assert main(["export", str(run)]) == OK and (run / "export" / "hf" / "config.json").is_file()
    assert main(["fold", str(run)]) == OK
    assert not (run / "export").exists()
    assert main(["export", str(run)]) == OK
    card = run / "export" / "hf" / "README.md"
    own = card.read_text() + "\nMy own words.\n"
    card.write_text(own)
    for again in (["fold", str(run)], ["run", *flags(run, "--overwrite", stages="prepare")]):
        assert main(again) == OK
        assert files(run / "export") == {"hf/README.md": own.encode()}
        assert f"{card} was written by hand and is kept" in "".join(capsys.readouterr())
    card.unlink()
    assert main(["run", *flags(run, "--overwrite", stages="prepare")]) == OK
    assert not (run / "export").exists()


@pytest.mark.slow
def test_what_is_stopped_and_resumed_drops_the_export(tmp_path_factory, tmp_path, monkeypatch):
    """Else the next push would send the old model as the new one."""
    run = shutil.copytree(finished_run(tmp_path_factory), tmp_path / "run")
    assert main(["export", str(run)]) == OK

    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(STAGE_FUNCTIONS, "dilute", stopped)
        assert main(["dilute", str(run), "--decay", "0.5"]) == INTERRUPTED
    assert not (run / "export").exists()
    assert main(["run", "--resume", f"--output_dir={run}"]) == OK
    assert main(["export", str(run)]) == OK
    # A run whose last stages come later.
    (run / "metrics.json").unlink()
    assert main(["run", "--resume", f"--output_dir={run}"]) == OK
    assert not (run / "export").exists()
    # Nothing is new.
    assert main(["export", str(run)]) == OK
    assert main(["run", "--resume", f"--output_dir={run}"]) == OK
    assert (run / "export" / "hf" / "config.json").is_file()


@pytest.mark.slow
def test_onnx_of_a_real_run_measured_in_int8(tmp_path_factory, tmp_path, capsys):
    run = finished_run(tmp_path_factory)
    words = ["--format", "onnx", "--int8", "--dataset", "digits", "--max_eval_samples", "20", "--eval_batch_size", "8"]
    assert main(["export", str(run), *words, "--output_dir", str(tmp_path / "out")]) == OK
    assert set(files(tmp_path / "out")) == {
        "model.onnx",
        "model_int8.onnx",
        "config.json",
        "preprocessor_config.json",
        "onnx.json",
    }
    found = json.loads((tmp_path / "out" / "onnx.json").read_text())
    assert max(found["max_relative_difference"].values()) <= 1e-5
    assert found["measured"]["float32"]["top1"] == record(run, "metrics")["models"]["compressed"]["top1"]
    assert found["measured"]["int8"]["num_images"] == 20
