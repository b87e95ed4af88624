"""The exported folder: what is in it, what is refused before anything is loaded, and that nothing private leaves."""

import ast
import getpass
import json
import re
import socket
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from exported import KINDS, LAYERS, change_json, checkpoint, made, made_run, save
from huggingface_hub import ModelCard, parse_eval_result_entries
from reference_vit import nose, stock_vit
from safetensors.torch import load_file, save_file
from tiny_run import files
from transformers import ViTModel

import hf_nose
from hf_nose import NoseViTBackbone, export_source
from hf_nose.card_text import is_own, marked
from hf_nose.export import export_folder
from hf_nose.privacy import check_publishable
from hf_nose.remote_code import auto_map, travelling_files
from hf_nose.stock_vit import export_stock_vit


PACKAGE = Path(hf_nose.__file__).parent


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The export of a run; only read."""
    root = tmp_path_factory.mktemp("exports")
    return export_folder(made_run(root / "run"), root / "new" / "deit-b-nose40", base_model_id="facebook/deit-x")


# What is in it


def test_the_folder_holds_what_it_should_and_no_more(out):
    code = {path.name for path in travelling_files()}
    others = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "selection.json"}
    assert set(files(out)) == code | others | {"figures/trajectory.png"}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_configuration_are_the_sources(kind, tmp_path):
    source = checkpoint(tmp_path / "source", kind)
    export_folder(source, tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.pop("auto_map") == auto_map()
    assert config == json.loads((source / "config.json").read_text())
    # The source of an export is left as it was.
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} == set(files(source))


def test_the_travelling_files_are_found_through_their_imports():
    """Every neighbour that a travelling file imports travels, and nothing else does."""
    found = {path.stem for path in travelling_files()}
    assert {"configuration_nose_vit", "modeling_nose_vit", "backbone_nose_vit"} <= found
    wanted, new = set(), {reference.split(".")[0] for reference in auto_map().values()}
    while new:
        wanted |= new
        trees = [ast.parse((PACKAGE / f"{name}.py").read_text()) for name in new]
        statements = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        new = {node.module for node in statements if node.level == 1} - wanted
    assert found == wanted


def test_the_copies_say_whose_they_are_and_import_only_what_strangers_have(out):
    copies = sorted(out.glob("*.py"))
    for copy in copies:
        text = copy.read_text()
        first, second, rest = text.split("\n", 2)
        assert first == "# SPDX-License-Identifier: Apache-2.0"
        assert second == f"# {copy.name} of hf_nose {hf_nose.__version__}"
        assert rest == (PACKAGE / copy.name).read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level < 2
                names = [node.module]
                if node.level == 1:
                    assert out / f"{node.module}.py" in copies
                    continue
            else:
                continue
            tops = {name.split(".")[0] for name in names}
            assert tops <= {"torch", "transformers", "huggingface_hub"} | set(sys.stdlib_module_names)


def test_the_auto_map_names_classes_that_are_there(out):
    mapped = json.loads((out / "config.json").read_text())["auto_map"]
    assert set(mapped) == {"AutoConfig", "AutoModel", "AutoModelForImageClassification", "AutoBackbone"}
    for reference in mapped.values():
        module, name = reference.split(".")
        body = ast.parse((out / f"{module}.py").read_text()).body
        assert name in {node.name for node in body if isinstance(node, ast.ClassDef)}


def test_the_card_is_read_by_the_hubs_own_parser(out):
    card = ModelCard.load(out / "README.md")
    assert card.data.base_model == "facebook/deit-x" and card.data.pipeline_tag == "image-classification"
    assert card.data.tags[:2] == ["nose_vit", "hf_nose"] and card.data.eval_results[0].metric_value == 0.9579
    assert "![trajectory](figures/trajectory.png)" in card.text and "(blocks 1, 3, 4, counted from 0)" in card.text
    # Called as the run, with room for the name of whoever will push it.
    assert "# run\n" in card.text and 'from_pretrained("YOUR_NAME/run", trust_remote_code=True)' in card.text
    assert not is_own((out / "README.md").read_text())


def test_a_card_function_sees_the_finished_folder_and_the_records(tmp_path):
    seen = {}

    def card(folder, config, records, base_model_id):
        seen.update(files=set(files(folder)), config=config, records=set(records), base=base_model_id)
        return "---\n---\n# Mine\n"

    source = made_run(tmp_path / "run", model={"base_model_id": "facebook/deit-known"})
    export_folder(source, tmp_path / "out", card=card)
    assert (tmp_path / "out" / "README.md").read_text() == marked("---\n---\n# Mine\n")
    assert seen["files"] == set(files(tmp_path / "out")) - {"README.md"}
    assert seen["config"].removed_attention_layers == LAYERS and seen["base"] == "facebook/deit-known"
    assert seen["records"] == {"prepare", "profile", "selection", "dilution", "fold", "metrics"}


def test_a_result_for_the_hubs_leaderboards(tmp_path):
    source = made_run(tmp_path / "run", data={"dataset_id": "ILSVRC/imagenet-1k"})
    export_folder(source, tmp_path / "out", task_id="imagenet_1k")
    (entry,) = parse_eval_result_entries(
        yaml.safe_load((tmp_path / "out" / ".eval_results" / "imagenet-1k.yaml").read_text())
    )
    assert (entry.dataset_id, entry.task_id, entry.value) == ("ILSVRC/imagenet-1k", "imagenet_1k", 0.9579)


def test_a_result_that_nobody_measured_is_refused(tmp_path):
    source = checkpoint(tmp_path / "source")
    with pytest.raises(ValueError, match="no accuracy was measured"):
        export_folder(source, tmp_path / "out", dataset_id="a/b", task_id="c")
    with pytest.raises(ValueError, match="give dataset_id"):
        export_folder(made_run(tmp_path / "run"), tmp_path / "out", task_id="c")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["base_model_id", "dataset_id"])
def test_ids_are_hub_ids(name, tmp_path):
    source = made_run(tmp_path / "run")
    with pytest.raises(ValueError, match=f"{name} must be a Hub id"):
        export_folder(source, tmp_path / "out", **{name: "/home/me/deit", "task_id": "c"})


def test_an_export_can_be_exported_again(out, tmp_path):
    again = export_folder(out, tmp_path / "again", base_model_id="facebook/deit-x")
    one, two = files(out), files(again)
    assert one == two, "the card too: it knows of the run, of which nothing else is left"


def test_a_checkpoints_own_words_are_carried_over(tmp_path):
    source = checkpoint(tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: mit\n---\nThe authors trained it.\n")
    export_folder(source, tmp_path / "out", base_model_id="facebook/deit-x")
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.endswith("---\nThe authors trained it.\n")
    assert (ModelCard(text).data.license, ModelCard(text).data.base_model) == ("mit", "facebook/deit-x")


def test_the_card_of_another_model_is_not(tmp_path):
    source = save(stock_vit(), tmp_path / "source")
    (source / "README.md").write_text("Load it as a ViT.\n")
    export_folder(source, tmp_path / "out")
    assert "**Origin not told.**" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("name", ["my run", "a..b", "-x-", "café (2)", "..."])
def test_folders_of_any_name_have_a_card(name, tmp_path):
    out = export_folder(checkpoint(tmp_path / name), tmp_path / "out")
    (title,) = re.findall("^# (.*)$", (out / "README.md").read_text(), flags=re.M)
    assert re.fullmatch(r"[\w-]+(\.[\w-]+)*", title, flags=re.ASCII)


@pytest.mark.parametrize("form", [export_folder, export_stock_vit])
def test_a_card_that_somebody_has_changed_stays(form, tmp_path, caplog):
    source, out = made_run(tmp_path / "run"), tmp_path / "out"
    nose([1, 3]).save_pretrained(source / "model")
    form(source, out)
    form(source, out, overwrite=True)
    assert caplog.text == ""
    own = (out / "README.md").read_text() + "\nOne more line.\n"
    (out / "README.md").write_text(own)
    for _ in range(2):
        form(source, out, overwrite=True, card=lambda *_: "# Other\n")
        assert (out / "README.md").read_text() == own
    assert "is somebody's own words and stays" in caplog.text
    for path in out.rglob("*"):
        if path.is_file() and path.name != "README.md":
            path.unlink()
    (out / "figures").rmdir() if (out / "figures").is_dir() else None
    form(source, out)
    assert (out / "README.md").read_text() == own and (out / "config.json").is_file()
    (out / "README.md").write_text("See /home/someone/notes\n")
    with pytest.raises(ValueError, match="README.md would hold an absolute path"):
        form(source, out, overwrite=True)
    assert (out / "README.md").read_text() == "See /home/someone/notes\n"


def test_a_card_that_is_a_link_is_nobodys_words(tmp_path):
    (tmp_path / "secret").write_text("a secret of this machine")
    out = export_folder(checkpoint(tmp_path / "source"), tmp_path / "out")
    (out / "README.md").unlink()
    (out / "README.md").symlink_to("../secret")
    export_folder(tmp_path / "source", out, overwrite=True)
    assert "secret" not in (out / "README.md").read_text() and not (out / "README.md").is_symlink()
    assert (tmp_path / "secret").read_text() == "a secret of this machine"


def test_a_stock_vit_becomes_a_dense_nose_vit(tmp_path):
    source = save(stock_vit(), tmp_path / "source")
    export_folder(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "nose_vit" and config["removed_attention_layers"] == []


# What is refused before a weight is loaded


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def load(*_):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(export_source, "load_classifier", load)


@pytest.mark.parametrize(
    "what, message",
    [
        ("missing", "1 missing (['vit.layers.2.mlp.fc1.bias'])"),
        ("unexpected", "1 unexpected (['vit.layers.1.attention.q_proj.weight'])"),
        ("shape", "classifier.bias has shape [6] in the weights, config.json says [5]"),
    ],
)
def test_weights_that_are_not_the_configurations(what, message, tmp_path, nothing_is_loaded):
    source = checkpoint(tmp_path / "source")
    state = load_file(source / "model.safetensors")
    if what == "missing":
        del state["vit.layers.2.mlp.fc1.bias"]
    elif what == "unexpected":
        state["vit.layers.1.attention.q_proj.weight"] = torch.zeros(24, 24)
    else:
        state["classifier.bias"] = torch.zeros(6)
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError) as error:
        export_folder(source, tmp_path / "out")
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../model.safetensors", "/tmp/x.safetensors", "model.bin"])
def test_an_index_names_only_files_of_its_folder(name, tmp_path, nothing_is_loaded):
    source = checkpoint(tmp_path / "source")
    (source / "model.safetensors").unlink()
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"classifier.bias": name}}))
    with pytest.raises(ValueError, match="must name safetensors files beside it"):
        export_folder(source, tmp_path / "out")


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 1_000_000},
        {"removed_attention_layers": [-1]},
        {"removed_attention_layers": list(range(9))},
        {"hidden_size": "../../etc"},
        {"model_type": "swin"},
        {"model_type": "vit", "hidden_size": 1 << 20},
    ],
)
def test_hostile_configurations(fields, tmp_path, nothing_is_loaded):
    source = checkpoint(tmp_path / "source")
    change_json(source / "config.json", **fields)
    with pytest.raises(ValueError):
        export_folder(source, tmp_path / "out")


def test_pickles_adapters_and_what_is_no_model(tmp_path, nothing_is_loaded):
    source = checkpoint(tmp_path / "source")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(ValueError, match="are pickles, which may run code and are never loaded"):
        export_folder(source, tmp_path / "out")
    change_json(source / "config.json", model_type="vit")
    with pytest.raises(ValueError, match="are pickles, which may run code and are never loaded"):
        export_folder(source, tmp_path / "out")
    (source / "adapter_config.json").write_text('{"base_model_name_or_path": "../other"}')
    with pytest.raises(ValueError, match="holds an adapter"):
        export_folder(source, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no config.json"):
        export_folder(tmp_path / "empty", tmp_path / "out")
    for name in (str(tmp_path / "nowhere"), "./nowhere"):
        with pytest.raises(ValueError, match="neither a folder nor a Hub id"):
            export_folder(name, tmp_path / "out")


@pytest.mark.parametrize("kind", ["NoseViTModel", "ViTModel", "NoseViTBackbone"])
def test_a_checkpoint_without_a_classifier_is_refused(kind, tmp_path, nothing_is_loaded):
    """Rather than given a head of random numbers."""
    if kind == "NoseViTBackbone":
        model = NoseViTBackbone.from_pretrained(checkpoint(tmp_path / "classifier"))
    else:
        model = nose([1]).vit if kind == "NoseViTModel" else ViTModel(stock_vit().config)
    source = save(model, tmp_path / "source")
    for form in (export_folder, export_stock_vit):
        with pytest.raises(ValueError, match=f"holds a {kind}, which has no classifier: .*or train a head"):
            form(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Nothing from outside


@pytest.mark.parametrize(
    "name",
    ["model", "model/model.safetensors", "model/config.json", "model/preprocessor_config.json"]
    + ["export", "export/hf", "export/hf/README.md"]
    + ["selection.json", "metrics.json", "figures", "figures/trajectory.png", "model/new/deep.json"],
)
def test_links_that_lead_out_of_a_run_are_refused(name, tmp_path, nothing_is_loaded):
    source = made_run(tmp_path / "run")
    inside, outside = source / name, tmp_path / "outside"
    (source / "export" / "hf").mkdir(parents=True)
    (source / "export" / "hf" / "README.md").write_text("Mine.\n")
    if name == "model/new/deep.json":
        inside.parent.mkdir()
        outside.write_text("{}")
    else:
        inside.rename(outside)
    inside.symlink_to(Path("..") / Path(*[".."] * name.count("/")) / "outside")
    assert inside.exists()
    with pytest.raises(ValueError, match="is a link out of"):
        export_folder(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_inside_a_run_and_a_link_to_it_are_fine(tmp_path):
    source = made_run(tmp_path / "run")
    (source / "figures" / "trajectory.png").rename(source / "kept.png")
    (source / "figures" / "trajectory.png").symlink_to("../kept.png")
    (tmp_path / "latest").symlink_to("run")
    export_folder(tmp_path / "latest", tmp_path / "out")
    figure = tmp_path / "out" / "figures" / "trajectory.png"
    assert figure.read_bytes() == b"\x89PNG made" and not figure.is_symlink()


# Nothing private


def test_no_file_names_this_machine(out):
    for name, content in files(out).items():
        for secret in (Path.home(), PACKAGE.parent, out.parent, "/home/someone"):
            assert str(secret).encode() not in content, name
        if not name.endswith((".safetensors", ".png")):
            words = set(re.split(r"[^\w.-]+", content.decode()))
            assert not words & {socket.gethostname(), getpass.getuser()}, name


@pytest.mark.parametrize(
    "text",
    [
        "/home/someone/images",
        "see (/mnt/d1/x)",
        "'/Users/me/a b'",
        "C:\\Users\\me",
        "../weights",
        "~/weights",
        "file:///a/b",
        "me@host:/home/me/x",
        "data:/home/me/x",
        r"d:\data",
        # As JSON has it.
        r'"C:\\Users\\me"',
        tempfile.gettempdir(),
        "hf_" + "aB3" * 11,
        str(Path.home()),
        str(Path.cwd()),
        sys.prefix,
    ],
)
def test_what_is_private_is_found(text, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "README.md").write_text(f"Trained on {text} for long.\n")
    with pytest.raises(ValueError, match="a/README.md would hold") as error:
        check_publishable(tmp_path)
    assert "aB3aB3" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "/a/abbey and/or https://huggingface.co/data/x",
        r"images: \\_a\\_",
        "https://data.example/home/x",
        "figures/entropy.png",
        "height / patch",
        "1/255",
        "</details>",
    ]
    + ["a range 1..2", "images/s", "hf_nose", "./model", "~5 /10", "tv/monitor"],
)
def test_what_is_not_private_is_let_through(text, tmp_path):
    (tmp_path / "README.md").write_text(text)
    check_publishable(tmp_path)


def test_a_label_that_is_a_path_stops_the_export(tmp_path):
    model = made("dense")
    model.config.id2label = {index: f"/home/someone/{index}" for index in range(5)}
    source = save(model, tmp_path / "source")
    with pytest.raises(ValueError, match="config.json would hold an absolute path, '/home/someone'"):
        export_folder(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# The folder that is written


def test_a_folder_in_use_is_not_written_to(tmp_path):
    source = checkpoint(tmp_path / "source")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        export_folder(source, tmp_path / "out")
    with pytest.raises(ValueError, match="no earlier export"):
        export_folder(source, tmp_path / "out", overwrite=True)
    for place in (source, tmp_path):
        with pytest.raises(ValueError, match="holds the model that is exported"):
            export_folder(source, place, overwrite=True)
    assert files(tmp_path / "out") == {"notes.txt": b"mine"}


def test_words_that_a_kill_left_aside_are_kept(tmp_path):
    """Killed between the two moves of a folder, the export of before, with its card, stands beside."""
    source = checkpoint(tmp_path / "source")
    out = export_folder(source, tmp_path / "out")
    own = (out / "README.md").read_text() + "\nMy own words.\n"
    (out / "README.md").write_text(own)
    out.rename(tmp_path / ".out.old")
    export_folder(source, out, overwrite=True)
    assert (out / "README.md").read_text() == own


def test_an_id_that_would_have_no_say(tmp_path):
    out = export_folder(checkpoint(tmp_path / "source"), tmp_path / "out")
    with pytest.raises(ValueError, match="dataset_id you/data would have no say: the checkpoint brings its own card"):
        export_folder(out, tmp_path / "again", dataset_id="you/data")


def test_an_earlier_export_is_replaced_only_by_a_whole_one(tmp_path):
    source = checkpoint(tmp_path / "source")
    out = export_folder(source, tmp_path / "out")
    before = files(out)

    def broken(*_):
        raise OSError(28, "No space left on device", "README.md")

    with pytest.raises(OSError, match="No space left"):
        export_folder(source, out, overwrite=True, card=broken)
    assert files(out) == before
    export_folder(source, out, overwrite=True, card=lambda *_: "# Other\n")
    assert (out / "README.md").read_text() == marked("# Other\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
