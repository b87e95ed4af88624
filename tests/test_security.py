"""What comes from strangers is read, never run: files, YAML, templates, image processors, and the run's own folder."""

import ast
import json
from pathlib import Path

import pytest
from exported import change_json, checkpoint, made, made_run, save
from huggingface_hub import ModelCard

from hf_nose.cli import BAD_INPUT, OK, main
from hf_nose.export import export_folder


ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "hf_nose").glob("*.py"), *(ROOT / "scripts").glob("**/*.py")])
# Each runs what it is given, or can.
RUNNING = (
    "eval",
    "exec",
    "pickle.load",
    "pickle.loads",
    "yaml.load",
    "yaml.full_load",
    "yaml.unsafe_load",
    "os.system",
)


def calls(path):
    """Every call in a file, as it is written, with its keywords."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nothing_runs_what_it_reads(path):
    for name, keywords in calls(path):
        assert name not in RUNNING and keywords.get("shell") != "True" and "trust_remote_code" not in keywords, name
        assert name != "torch.load" or keywords["weights_only"] == "True"
        assert keywords.get("use_safetensors", "True") == "True"


TAG = "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{trace}]]"


def test_yaml_of_a_recipe_or_a_run_makes_no_objects(tmp_path, capsys):
    trace = tmp_path / "trace"
    (tmp_path / "settings.yaml").write_text(f"seed: {TAG.format(trace=trace)}\n")
    for words in (["run", "--recipe", str(tmp_path / "settings.yaml")], ["fold", str(tmp_path)]):
        assert main(words) == BAD_INPUT
        assert "settings.yaml is not YAML" in capsys.readouterr().err
    assert not trace.exists()


def test_yaml_of_a_card_makes_no_objects(tmp_path, capsys):
    out, trace = export_folder(checkpoint(tmp_path / "source"), tmp_path / "out"), tmp_path / "trace"
    (out / "README.md").write_text(f"---\nlicense: {TAG.format(trace=trace.name)}\n---\nMine\n")
    assert main(["push", str(out), "--repo_id", "you/vit", "--dry_run"]) == BAD_INPUT
    assert "are not plain YAML: " in (said := capsys.readouterr().err) and "python/object" in said
    # Nor where the card goes along into another folder.
    with pytest.raises(ValueError, match="are not plain YAML"):
        export_folder(out, tmp_path / "again")
    assert not trace.exists() and not Path(trace.name).exists()


HOSTILE = "{{ 7 * 7 }} {% for x in ().__class__.__mro__ %}{{ x }}{% endfor %}"


def test_names_and_labels_are_text_to_the_template(tmp_path):
    """Of the folder, of the classes, and in every record of a run."""
    source = made_run(
        tmp_path / "{{ 7 * 7 }}", model={"source": HOSTILE}, data={"dataset": HOSTILE, "notes": [HOSTILE]}
    )
    model = made("folded")
    model.config.id2label = dict(enumerate([HOSTILE, "{{ 7 * 7 }}", "{# gone #}", "<script>", "---"]))
    save(model, source / "model")
    out = export_folder(source, tmp_path / "out")
    card = ModelCard.load(out / "README.md")
    # As they came, escaped for Markdown and not evaluated.
    assert "class 'object'" not in str(card) and card.text.count("7 \\* 7") >= 3 and "# 7-7\n" in card.text
    assert json.loads((out / "config.json").read_text())["id2label"]["0"] == HOSTILE


def test_an_image_processor_brings_no_code(tmp_path, capsys):
    source, trace = checkpoint(tmp_path / "source"), tmp_path / "trace"
    (source / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Evil: pass\n")
    change_json(source / "preprocessor_config.json", auto_map={"AutoImageProcessor": "evil.Evil"})
    assert main(["export", str(source), "--output_dir", str(tmp_path / "out")]) == OK
    assert not trace.exists() and "evil" not in capsys.readouterr().out
    # Nor does it name any, which whoever trusts the code beside it would run.
    assert "auto_map" not in json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())


def test_a_configuration_brings_no_code(tmp_path):
    source, trace = checkpoint(tmp_path / "source"), tmp_path / "trace"
    (source / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Evil: pass\n")
    change_json(source / "config.json", auto_map={"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "Other": "x.Y"})
    out = export_folder(source, tmp_path / "out")
    assert not trace.exists() and not (out / "evil.py").exists() and "evil" not in (out / "config.json").read_text()
