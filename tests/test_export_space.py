"""The folder of a Space: what is in it, that both models are whose they should be, and what is refused."""

import ast
import json
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml
from exported import LAYERS, change_json, checkpoint, made, made_run, processor, save
from reference_vit import images, logits, nose
from run_records import RECORDS
from tiny_run import files
from transformers import AutoImageProcessor

from hf_nose.cli import BAD_INPUT, OK, main
from hf_nose.configuration_nose_vit import __version__
from hf_nose.export_space import ALIKE, GRADIO, export_space
from hf_nose.modeling_nose_vit import NoseViTForImageClassification
from hf_nose.remote_code import auto_map, travelling_files


ROOT = Path(__file__).resolve().parents[1]
APP = ROOT / "hf_nose" / "assets" / "space_app.py"
LARGER_MLP = {"intermediate_size": 96}


def run_with_dense(folder: Path, **changes) -> Path:
    run = made_run(folder, **changes)
    checkpoint(run / "dense", "dense")
    return run


def top1_of(folder: Path) -> dict | None:
    return json.loads((folder / "space.json").read_text())["top1"]


def front(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text().split("---")[1])


def test_what_is_in_it(tmp_path):
    folder = export_space(run_with_dense(tmp_path / "run"), tmp_path / "out")
    checkpoint_files = ["config.json", "model.safetensors", "preprocessor_config.json"]
    checkpoint_files += [path.name for path in travelling_files()]
    wanted = {f"{name}/{file}" for name in ("dense", "compressed") for file in checkpoint_files}
    assert set(files(folder)) == wanted | {"README.md", "app.py", "requirements.txt", "space.json"}
    app = (folder / "app.py").read_text()
    head = f"# SPDX-License-Identifier: Apache-2.0\n# app.py of hf_nose {__version__}\n"
    assert app == head + APP.read_text()
    installed = {name: metadata.version(name).split("+")[0] for name in ("torch", "transformers")}
    lines = [f"gradio=={GRADIO}", f"torch=={installed['torch']}", f"transformers=={installed['transformers']}"]
    assert (folder / "requirements.txt").read_text().splitlines() == lines


def test_both_models_are_the_sources_and_compute_alike(tmp_path):
    run = run_with_dense(tmp_path / "run")
    change_json(run / "model" / "config.json", chunk_size_feed_forward=3, chunk_size_attention=2)
    folder = export_space(run, tmp_path / "out")
    for name, kind, removed in (("dense", "dense", []), ("compressed", "folded", LAYERS)):
        model = NoseViTForImageClassification.from_pretrained(folder / name).eval()
        assert model.config.removed_attention_layers == removed
        torch.testing.assert_close(logits(model, images()), logits(made(kind), images()), rtol=1e-5, atol=1e-5)
        saved = json.loads((folder / name / "config.json").read_text())
        assert saved["auto_map"] == auto_map()
        assert model.config.class_token_tail
        assert model.config.chunk_size_feed_forward == model.config.chunk_size_attention == 0
        found = AutoImageProcessor.from_pretrained(folder / name, backend="pil").to_dict()
        assert list(found["image_mean"]) == [0.4] * 3 and found["size"] == {"height": 16, "width": 16}


def test_the_run_tells_its_accuracy_and_ids(tmp_path):
    run = run_with_dense(tmp_path / "a-run", model={"base_model_id": "facebook/deit-tiny-patch16-224"})
    folder = export_space(run, tmp_path / "out")
    measured = {name: RECORDS["metrics"]["models"][name]["top1"] for name in ("dense", "compressed")}
    about = json.loads((folder / "space.json").read_text())
    assert about["name"] == "a-run" and about["dense"] == "dense" and about["top1"] == {**measured, "num_images": 451}
    assert front(folder) == {
        "title": "a-run, dense and compressed",
        "sdk": "gradio",
        "sdk_version": GRADIO,
        "python_version": f"{sys.version_info[0]}.{sys.version_info[1]}",
        "app_file": "app.py",
        "models": ["facebook/deit-tiny-patch16-224"],
        "tags": ["hf_nose", "nose_vit"],
    }
    words = (folder / "README.md").read_text()
    assert "of 3 of its 6 blocks (`compressed/`, blocks 1, 3, 4)" in words
    assert "pip install -r requirements.txt && python app.py" in words
    assert "hf upload OWNER/NAME . --repo-type space" in words


def test_another_dense_model_was_not_measured(tmp_path):
    run = run_with_dense(tmp_path / "run")
    # The run has measured a model of that name, but not this one.
    other = save(nose(seed=1), tmp_path / "elsewhere" / "dense")
    folder = export_space(run, tmp_path / "out", dense=other)
    assert top1_of(folder) is None
    assert "models" not in front(folder)
    dense = NoseViTForImageClassification.from_pretrained(folder / "dense").eval()
    torch.testing.assert_close(logits(dense, images()), logits(nose(seed=1), images()), rtol=1e-5, atol=1e-5)


def test_the_dense_model_of_equal_steps_is_the_fairer_one(tmp_path):
    run = run_with_dense(tmp_path / "run")
    save(nose(seed=1), run / "dense_control")
    folder = export_space(run, tmp_path / "out")
    dense = NoseViTForImageClassification.from_pretrained(folder / "dense").eval()
    torch.testing.assert_close(logits(dense, images()), logits(nose(seed=1), images()), rtol=1e-5, atol=1e-5)
    assert json.loads((folder / "space.json").read_text())["dense"] == "dense_control"
    measured = {"dense": "dense_control", "compressed": "compressed"}
    wanted = {name: RECORDS["metrics"]["models"][model]["top1"] for name, model in measured.items()}
    assert top1_of(folder) == {**wanted, "num_images": 451}


def test_a_run_that_measured_nothing(tmp_path):
    run = run_with_dense(tmp_path / "run")
    (run / "metrics.json").unlink()
    assert top1_of(export_space(run, tmp_path / "out")) is None


def test_the_verb_writes_into_the_run_and_replaces_only_its_own(tmp_path, capsys):
    run = run_with_dense(tmp_path / "run")
    assert main(["export", str(run), "--format", "space"]) == OK
    folder = run / "export" / "space"
    assert (folder / "app.py").is_file() and f"Written to {folder}" in capsys.readouterr().out
    (folder / "space.json").write_text("old")
    assert main(["export", str(run), "--format", "space", "--overwrite", "--json"]) == OK
    written = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert written["format"] == "space" and written["files"]["space.json"] > 3
    checkpoint(tmp_path / "mine")
    assert main(["export", str(run), "--format", "space", "--overwrite", "--output_dir", str(tmp_path / "mine")]) == 2
    assert "no earlier export (no app.py)" in capsys.readouterr().err
    assert main(["export", str(run), "--overwrite", "--output_dir", str(folder)]) == BAD_INPUT
    assert "no earlier export (no config.json)" in capsys.readouterr().err


def relabelled(folder: Path) -> Path:
    checkpoint(folder, "dense")
    names = {str(index): f"LABEL_{index}" for index in range(5)} | {"3": "cat"}
    change_json(folder / "config.json", id2label=names, label2id={name: int(key) for key, name in names.items()})
    return folder


def of_size(folder: Path, size: int) -> Path:
    model = NoseViTForImageClassification._from_config(
        type(nose().config).from_dict({**nose().config.to_dict(), "image_size": size})
    )
    return save(model, folder)


@pytest.mark.parametrize(
    "kind, dense, message",
    [
        ("folded", None, "dense is needed: model holds no dense model"),
        ("folded", lambda folder: "./nothing", "neither a folder nor a Hub id"),
        ("folded", lambda folder: checkpoint(folder, "folded"), r"layers \[1, 3, 4\] are removed or diluted in it"),
        ("folded", lambda folder: checkpoint(folder, "half-diluted"), "dense must have all its attention"),
        ("dense", lambda folder: checkpoint(folder, "dense"), "this one has all its attention: nothing to compare"),
        ("half-diluted", lambda folder: checkpoint(folder, "dense"), r"layers \[1, 3, 4\] are still diluted"),
        (
            "folded",
            lambda folder: save(nose(num_labels=7), folder),
            "its num_labels is 7, that of the compressed .* 5",
        ),
        ("folded", lambda folder: of_size(folder, 32), "its image_size is 32, that of the compressed model 16"),
        ("folded", relabelled, "class 3 is 'cat' in it and 'LABEL_3' in the compressed model"),
    ],
)
def test_bad_input_writes_nothing(kind, dense, message, tmp_path):
    source = checkpoint(tmp_path / "model", kind)
    given = None if dense is None else dense(tmp_path / "given")
    with pytest.raises(ValueError, match=message):
        export_space(source, tmp_path / "out", dense=given)
    assert not (tmp_path / "out").exists()


def test_all_that_decides_the_time_must_be_alike():
    assert set(ALIKE) >= {"num_labels", "image_size", "patch_size", "num_hidden_layers", "hidden_size"}
    assert set(ALIKE) >= {"intermediate_size", "num_attention_heads", "num_channels"}


def test_a_dense_folder_that_is_a_link_out_of_the_run(tmp_path):
    run = made_run(tmp_path / "run")
    checkpoint(tmp_path / "elsewhere", "dense")
    (run / "dense").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with pytest.raises(ValueError, match="is a link out of"):
        export_space(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dense_belongs_to_space(tmp_path, capsys):
    source = checkpoint(tmp_path / "model")
    assert main(["export", str(source), "--dense", str(source)]) == BAD_INPUT
    assert "dense belongs to --format space, not to hf" in capsys.readouterr().err


def test_the_page_imports_only_what_its_requirements_bring():
    statements = list(ast.walk(ast.parse(APP.read_text())))
    names = {alias.name for part in statements if isinstance(part, ast.Import) for alias in part.names}
    names |= {part.module for part in statements if isinstance(part, ast.ImportFrom)}
    tops = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert tops == {"torch", "transformers", "PIL", "gradio"}
    outside = ast.parse(APP.read_text()).body
    late = {alias.name for part in outside if isinstance(part, ast.Import) for alias in part.names}
    late |= {part.module for part in outside if isinstance(part, ast.ImportFrom)}
    assert not [name for name in late if name.startswith("gradio")], "gradio is needed for the page alone"


def test_the_extra_asks_for_the_version_that_was_looked_at():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (wanted,) = extras["demo"]
    assert re.fullmatch(r"gradio>=(.+)", wanted)[1] == ".".join(GRADIO.split(".")[:2])


def test_a_processor_is_needed_for_both(tmp_path):
    run = run_with_dense(tmp_path / "run")
    (run / "dense" / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="preprocessor_config.json"):
        export_space(run, tmp_path / "out")
    processor().save_pretrained(run / "dense")
    assert export_space(run, tmp_path / "out").is_dir()
