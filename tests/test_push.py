"""What `hf-nose push` can be told, what it refuses before anything is sent, and what it makes of a card."""

import json
import os
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from pushable import CARD, contents, exported, tiny_nose_vit
from safetensors.torch import load_file, save_file

from hf_nose.card_text import CARD as README
from hf_nose.card_text import TAGS, completed_card, drop_exports
from hf_nose.cli import BAD_INPUT, FAILED, OK, main
from hf_nose.command_line import parse_settings
from hf_nose.files import write_json
from hf_nose.hub import PushError, check_token, holds, listed_files
from hf_nose.images import digits_processor
from hf_nose.push import base_model, push_finished
from hf_nose.push import exported as exported_folder


TASK = "NoseViTForImageClassification"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("made") / "vit", tiny_nose_vit("diluted"))


@pytest.fixture
def folder(made, tmp_path):
    """An exported checkpoint to spoil."""
    return shutil.copytree(made, tmp_path / "vit")


def refused(capsys, *words):
    """The one line of a push that is refused."""
    assert main(["push", *map(str, words)]) == BAD_INPUT
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = [line for line in said.err.splitlines() if line.startswith("hf-nose: ")]
    return line


# What it can be told


def test_a_pull_request_and_a_revision_are_refused_at_parsing(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["push", "nowhere", "--repo_id", "you/vit", "--create_pr", "--revision", "half"])
    assert ended.value.code == BAD_INPUT
    assert "--revision: not allowed with argument --create_pr" in capsys.readouterr().err


def test_a_pull_request_goes_against_main_of_a_named_owner(run, folder, capsys):
    assert "must be OWNER/NAME, got 'vit'" in refused(capsys, folder, "--repo_id", "vit", "--create_pr")
    stock = (run, "--repo_id", "you/vit", "--create_pr", "--format", "stock-vit")
    assert "exclude each other" in refused(capsys, *stock)


@pytest.mark.parametrize("name", ["you/vit/more", "you/vi t", "you/-vit", "../vit"])
def test_a_name_that_no_repository_can_have(name, folder, capsys):
    assert "Repo id must" in refused(capsys, folder, "--repo_id", name)


def test_a_dry_run_tells_files_and_bytes(folder, capsys):
    assert main(["push", str(folder), "--repo_id", "you/vit", "--dry_run", "--json"]) == OK
    said = json.loads(capsys.readouterr().out)
    sizes = {name: len(content) for name, content in contents(folder).items()}
    assert said == {"dry_run": True, "repo_id": "you/vit", "files": sizes}


@pytest.fixture
def run(tmp_path):
    """As much of a run's folder as an export needs."""
    tiny_nose_vit("folded").save_pretrained(tmp_path / "deit-b-nose40" / "model")
    digits_processor().save_pretrained(tmp_path / "deit-b-nose40" / "model")
    (tmp_path / "deit-b-nose40" / "settings.yaml").write_text("seed: 0\n")
    return tmp_path / "deit-b-nose40"


def test_a_dry_run_of_a_run_leaves_nothing_and_has_its_name(run, capsys):
    before = contents(run)
    assert main(["push", str(run), "--dry_run"]) == OK
    said = capsys.readouterr().out
    assert "bytes  modeling_nose_vit.py" in said and "nothing was sent to deit-b-nose40" in said
    assert main(["push", str(run), "--dry_run", "--format", "stock-vit"]) == OK
    said = capsys.readouterr().out
    assert "bytes  model.safetensors" in said and "nose_vit.py" not in said
    assert contents(run) == before


def test_an_export_is_made_once_and_then_sent_as_it_is(run, folder):
    with exported_folder(run) as made:
        assert made == run / "export" / "hf"
    (made / "README.md").write_text("---\nlicense: mit\n---\nMy own words.\n")
    before = contents(run)
    with exported_folder(run) as again:
        assert again == made and contents(run) == before
    with exported_folder(run, is_kept=False) as kept:
        assert kept == made
    with exported_folder(folder) as checkpoint:
        assert checkpoint == folder


def test_a_push_around_words_of_an_earlier_result_waits_for_a_look(run, capsys):
    """A run that was run again leaves the card that somebody has changed, and nothing else of its export."""
    with exported_folder(run) as made:
        card = (made / README).read_text().replace("## Limits", "## Mine\n\nAs I see it.\n\n## Limits")
        (made / README).write_text(card)
    assert drop_exports(run / "export") == [made / README]
    assert [path for path in (run / "export").rglob("*") if path.is_file()] == [made / README]
    assert main(["push", str(run), "--dry_run", "--json"]) == OK
    said = json.loads(capsys.readouterr().out)
    assert said["files"][README] == len(card.encode()) and "modeling_nose_vit.py" in said["files"]
    with pytest.raises(PushError, match="was written before the run was run again"), exported_folder(run):
        raise AssertionError("sent")
    with exported_folder(run) as again:
        assert again == made and (made / README).read_text() == card and (made / "config.json").is_file()


def test_another_format_than_a_checkpoints_own_is_refused(folder, capsys):
    """Else its NoseViT would stand on the branch that promises a plain ViT."""
    for words in (["--dry_run"], []):
        assert main(["push", str(folder), "--repo_id=me/vit", "--format=stock-vit", *words]) == BAD_INPUT
        assert "format stock-vit belongs to a run" in capsys.readouterr().err


def test_an_export_that_a_link_leads_out_to_is_not_pushed(run, folder, capsys):
    (run / "export").mkdir()
    (run / "export" / "hf").symlink_to(folder)
    assert "is a link out of" in refused(capsys, run, "--dry_run")


def test_what_is_no_run_gets_no_name(folder, capsys):
    assert "give --repo_id" in refused(capsys, folder)


def test_a_folder_of_neither_a_run_nor_a_checkpoint(tmp_path, capsys):
    assert "holds no config.json: give the folder of a run" in refused(capsys, tmp_path, "--repo_id", "you/vit")


def test_the_base_model_is_what_the_run_knows(tmp_path):
    assert base_model(tmp_path) is None
    write_json(tmp_path / "prepare.json", {"model": {"base_model_id": "facebook/deit-tiny-patch16-224"}})
    assert base_model(tmp_path) == "facebook/deit-tiny-patch16-224"


def test_offline_is_said_before_anything_else_is_tried(folder, capsys):
    before = contents(folder)
    assert main(["push", str(folder), "--repo_id", "you/vit"]) == FAILED
    assert "Unset HF_HUB_OFFLINE and push again" in capsys.readouterr().err
    assert contents(folder) == before


# Of the main job


def test_settings_of_a_push_belong_together():
    settings = parse_settings(["--push_to_hub", "--repo_id", "you/vit", "--private"])
    assert settings.push_to_hub and settings.private and settings.repo_id == "you/vit"
    assert (
        "push" not in settings.to_yaml()
        and "you/vit" not in settings.to_yaml()
        and "private" not in settings.to_yaml()
    )
    for words in (["--repo_id", "you/vit"], ["--private"]):
        with pytest.raises(ValueError, match="say where push_to_hub goes"):
            parse_settings(words)
    with pytest.raises(ValueError, match="what the stage fold leaves"):
        parse_settings(["--push_to_hub", "--stages", "prepare,profile"])


def test_a_job_that_could_not_push_is_refused_before_it_starts(tmp_path, capsys):
    assert main(["run", f"--output_dir={tmp_path / 'run'}", "--device=cpu", "--push_to_hub"]) == FAILED
    assert "HF_HUB_OFFLINE" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_no_token_is_said_at_once(monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PushError, match="There is no token: log in"):
        check_token()


def test_a_finished_run_whose_push_fails_is_told_how_to_repeat_it(run):
    with pytest.raises(
        PushError, match=r"The run is finished, but.*`hf-nose push .*nose40 --repo_id you/vit --private`"
    ):
        push_finished(run, "you/vit", private=True)


# What is refused before anything is sent


@pytest.mark.parametrize(
    ("name", "words"), [("README.md", "no README.md"), ("model.safetensors", "neither model.safetensors nor")]
)
def test_a_part_that_is_missing(name, words, folder, capsys):
    (folder / name).unlink()
    assert words in refused(capsys, folder, "--repo_id", "you/vit")


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="holds no config.json: `hf-nose export`"):
        listed_files(tmp_path)


@pytest.mark.parametrize("auto_map", [None, [], ["a"], {"AutoModel": None}])
def test_an_auto_map_that_is_none(auto_map, folder, capsys):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    assert main(["push", str(folder), "--repo_id=me/vit", "--dry_run"]) == BAD_INPUT
    said = capsys.readouterr().err
    assert "auto_map" in said and "Traceback" not in said


def test_a_folder_without_the_code_that_loads_it(folder, capsys):
    (folder / "backbone_nose_vit.py").unlink()
    assert "no code to load it by (backbone_nose_vit.py)" in refused(capsys, folder, "--repo_id", "you/vit")
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "no auto_map in config.json): `hf-nose export`" in refused(capsys, folder, "--repo_id", "you/vit")


def test_links_lead_out(folder, tmp_path, capsys):
    (tmp_path / "secret.txt").write_text("secret")
    os.symlink(tmp_path / "secret.txt", folder / "notes.txt")
    assert "notes.txt" in (line := refused(capsys, folder, "--repo_id", "you/vit")) and "is a link" in line
    (folder / "notes.txt").unlink()
    (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "elsewhere", folder / "more")
    assert "more" in refused(capsys, folder, "--repo_id", "you/vit")


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.pt", "sub/old.pkl", "MODEL.PTH"])
def test_pickles_stay_at_home(name, folder, capsys):
    (folder / name).parent.mkdir(exist_ok=True)
    torch.save({}, folder / name)
    assert f"{name} in" in (line := refused(capsys, folder, "--repo_id", "you/vit")) and "pickle" in line


def test_paths_of_this_machine_stay_at_home(folder, capsys):
    (folder / "README.md").write_text(CARD + "Trained in /home/somebody/runs.\n")
    assert "an absolute path" in refused(capsys, folder, "--repo_id", "you/vit")


def test_a_token_in_a_file_stays_at_home(folder, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_this_machine")
    assert set(listed_files(folder)) == set(contents(folder))
    (folder / "selection.json").write_text('{"token": "hf_secret_of_this_machine"}')
    line = refused(capsys, folder, "--repo_id", "you/vit")
    assert "selection.json in" in line and "access token" in line and "hf_secret" not in line


@pytest.mark.parametrize("start", [0, 2**20 - 5, 2**20, 2**20 + 1])
def test_a_secret_is_found_across_the_pieces_it_is_read_in(start, tmp_path):
    (tmp_path / "file").write_bytes(b"x" * start + b"hf_secret" + b"y" * 10)
    assert holds(tmp_path / "file", b"hf_secret") and not holds(tmp_path / "file", b"hf_public")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda weights: weights.pop("vit.layers.0.attention.q_proj.weight"), "1 missing"),
        (lambda weights: weights.pop("vit.dilution_mask"), "1 missing"),
        (lambda weights: weights.update({"vit.extra": torch.zeros(1)}), "1 unexpected"),
        (
            lambda weights: weights.update({"classifier.weight": torch.zeros(3, 12)}),
            "has shape [3, 12]",
        ),
    ],
)
def test_weights_of_another_configuration(change, message, folder, capsys):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    line = refused(capsys, folder, "--repo_id", "you/vit", "--dry_run")
    assert message in line


def test_weights_that_are_cut_short(folder, capsys):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert "corrupt or truncated" in refused(capsys, folder, "--repo_id", "you/vit")


def test_a_hostile_configuration_is_refused_before_it_is_built(folder, capsys):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2000}))
    assert "num_hidden_layers must be in [1, 1000]" in refused(capsys, folder, "--repo_id", "you/vit")


# The card


def test_a_card_that_says_everything_is_sent_as_it_is():
    text = completed_card(CARD, None, TASK)
    assert completed_card(text, "other/model", TASK) == text
    odd = text.replace("license: apache-2.0", "license:   apache-2.0  # mine")
    assert completed_card(odd, None, TASK) == odd


def test_only_what_a_card_lacks_is_added():
    card = "---\nlibrary_name: mine\nbase_model: my/model\npipeline_tag: other\n---\nText\n"
    data = ModelCard(completed_card(card, "other/model", TASK)).data
    assert (data.library_name, data.base_model, data.pipeline_tag) == ("mine", "my/model", "other")
    assert data.tags == list(TAGS)


@pytest.mark.parametrize(
    "architecture, task",
    [
        (TASK, "image-classification"),
        ("ViTForImageClassification", "image-classification"),
        ("NoseViTModel", "image-feature-extraction"),
    ],
)
def test_a_card_without_metadata_gets_all(architecture, task):
    text = completed_card("# Mine\n", "facebook/deit-tiny-patch16-224", architecture)
    data = ModelCard(text).data
    assert text.endswith("---\n# Mine\n") and data.pipeline_tag == task
    assert data.base_model == "facebook/deit-tiny-patch16-224" and data.library_name == "transformers"
    assert "base_model" not in ModelCard(completed_card("# Mine\n", None, architecture)).data.to_dict()


def test_a_card_with_metadata_that_is_none(folder, capsys):
    (folder / "README.md").write_text("---\n- a\n- b\n---\nText\n")
    assert "metadata block should be a dict" in refused(capsys, folder, "--repo_id", "you/vit")
