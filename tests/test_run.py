"""The main job: folders, resume, refusals, single stages."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
from tiny_run import TINY, files, finished_run, flags, record, rerun, resume, run, tiny_model

from hf_nose.command_line import parse_settings
from hf_nose.context import RunContext
from hf_nose.files import RunLockedError, locked
from hf_nose.modeling_nose_vit import NoseViTForImageClassification
from hf_nose.records import RECORDS
from hf_nose.run import FILES, FOLDERS, folder_settings, run_job, schedule_points, steps_per_epoch
from hf_nose.settings import STAGES, Settings


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run through all stages; only read."""
    return finished_run(tmp_path_factory)


@pytest.fixture
def copy(finished, tmp_path):
    """A run through all stages, to be changed."""
    return shutil.copytree(finished, tmp_path / "run")


# What a run leaves


def test_the_folder_holds_what_is_named_and_nothing_else(finished):
    names = {path.name for path in finished.iterdir()} - {".lock"}
    assert names == {*FILES, *FOLDERS} - {"export"}
    assert not [path for path in finished.rglob("*") if path.name.endswith((".partial", ".old", ".staging"))]


def test_the_last_words_are_a_table_and_the_line_that_loads(copy, capsys):
    resume(copy)
    words = capsys.readouterr().out
    metrics = record(copy, "metrics")["models"]
    for found in metrics.values():
        assert f"{100 * found['top1']:.1f}" in words
    assert f"AutoModelForImageClassification.from_pretrained('{copy / 'model'}')" in words
    assert words.rstrip().endswith("report.md")


def test_the_default_model_goes_through(tmp_path, capsys):
    """The embedded 12-block ViT on the digits, as `hf-nose run` takes it."""
    run(tmp_path / "run", model="digits-vit", dense_steps=1, steps=2, control="false")
    assert record(tmp_path / "run", "prepare")["model"]["num_hidden_layers"] == 12
    assert record(tmp_path / "run", "prepare")["model"]["source"] == "digits-vit"
    assert len(record(tmp_path / "run", "fold")["removed_attention_layers"]) == TINY["num_removed"]
    assert "[7/7] report" in capsys.readouterr().out


def test_saved_settings_repeat_the_run(finished, tmp_path):
    again = tmp_path / "again"
    run_job(parse_settings([f"--recipe={finished / 'settings.yaml'}", f"--output_dir={again}", "--device=cpu"]))
    first, second = files(finished), files(again)
    assert set(first) == set(second)
    assert first["settings.yaml"] == second["settings.yaml"]
    for name in ("dense", "diluted", "dense_control", "model"):
        assert first[f"{name}/model.safetensors"] == second[f"{name}/model.safetensors"]
    for name in ("selection", "profile", "fold"):
        one, two = record(finished, name), record(again, name)
        one.pop("seconds", None), two.pop("seconds", None)
        assert one == two


def test_another_seed_gives_another_model(finished, tmp_path):
    run(tmp_path / "run", seed=1, stages="prepare")
    assert files(tmp_path / "run")["dense/model.safetensors"] != files(finished)["dense/model.safetensors"]


# Some of the stages


def test_some_stages_then_the_others(tmp_path, capsys):
    folder = tmp_path / "run"
    run(folder, stages="report,select,prepare", control="false")
    assert sorted(path.name for path in folder.glob("*.json")) == ["prepare.json", "report.json", "selection.json"]
    assert "not run" in (folder / "report.md").read_text()
    words = capsys.readouterr().out
    assert words.index("[1/3] prepare") < words.index("[2/3] select") < words.index("[3/3] report")
    resume(folder)
    words = capsys.readouterr().out
    assert "[1/7] prepare: finished before" in words and "[3/7] select: finished before" in words
    assert {path.name for path in folder.glob("*.json")} == set(RECORDS.values())
    assert "comparison.png" in (folder / "report.md").read_text()


# Dry run


def test_dry_run_shows_what_would_happen_and_writes_nothing(tmp_path, capsys, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("hf_nose.context.choose_device", lambda name: __import__("torch").device("cpu"))
    run_job(parse_settings(["--dry_run"]))
    assert list((tmp_path / "work").iterdir()) == []
    words = capsys.readouterr().out
    for line in (
        "num_removed: 5",
        "Stages: prepare, profile, select, dilute, fold, evaluate, report; folder: runs/digits",
        "Layers: to be searched, 5 of 12",
        "Parameters: 0.34 M -> 0.29 M (-13.9 %)",
        "MACs: 0.01 G -> 0.01 G",
        "Schedule: linear (together), M at step 0: 1.000, 250: 0.666, 500: 0.332, 750: 0.000, 999: 0.000, of 1000 "
        "steps; compensation on",
        "One forward on cpu: (1, 3, 8, 8) -> (1, 10), finite: True",
        "nothing was written",
    ):
        assert line in words.replace("%", " %").replace("  %", " %"), line


def test_dry_run_of_given_layers_and_an_existing_folder(finished, capsys):
    before = files(finished)
    run(finished, "--dry_run", num_removed=None, layers="3,0", schedule="one_shot")
    assert files(finished) == before
    words = capsys.readouterr().out
    assert "Layers: [0, 3], 2 of 4" in words
    assert "one_shot (together), M at step 0: 0.000" in words and "compensation off" in words


def test_dry_run_refuses_classes_that_do_not_fit(finished, tmp_path):
    shutil.copytree(finished / "dense", tmp_path / "dense")
    model = NoseViTForImageClassification.from_vit(str(tmp_path / "dense"), num_labels=7)
    model.save_pretrained(tmp_path / "dense")
    for switches in ([], ["--dry_run"]):
        with pytest.raises(ValueError, match="The model has 7 classes, the data set 10"):
            run(tmp_path / "run", *switches, dense_steps=0, model=tmp_path / "dense")
    run(tmp_path / "run", "--dry_run", model=tmp_path / "dense")


def test_dry_run_counts_what_the_run_then_has(finished, tmp_path, capsys):
    run(tmp_path / "run", "--dry_run")
    metrics = record(finished, "metrics")["models"]
    before, after = (metrics[name]["parameters"] / 1e6 for name in ("dense", "compressed"))
    assert f"Parameters: {before:.2f} M -> {after:.2f} M ({after / before - 1:+.1%})" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("removed, millions", [(3, "5.27"), (4, "5.12")])
def test_dry_run_of_the_real_model(deit_tiny, imagenet, tmp_path, capsys, removed, millions):
    run_job(
        parse_settings(
            ["--dry_run", f"--model={deit_tiny}", f"--dataset={imagenet}", f"--num_removed={removed}"]
            + ["--device=cpu", f"--output_dir={tmp_path / 'run'}"]
        )
    )
    words = capsys.readouterr().out
    assert f"Parameters: 5.72 M -> {millions} M" in words
    assert "MACs: 1.26 G -> " in words
    assert "(1, 3, 224, 224) -> (1, 1000), finite: True" in words
    assert not (tmp_path / "run").exists()


def test_dry_run_refuses_what_the_run_would(tmp_path):
    with pytest.raises(ValueError, match=r"num_removed must be in \[1, 3\], got 4"):
        run(tmp_path / "run", "--dry_run", num_removed=4)
    assert not (tmp_path / "run").exists()


def test_schedule_points_of_epochs():
    # 30 images in batches of 4 on one process: 8 batches, 4 steps an epoch.
    settings = Settings(epochs=4.0, unit="epoch", decay=2.0, batch_size=4, gradient_accumulation_steps=2)
    run = SimpleNamespace(
        settings=settings, data=SimpleNamespace(num_train=30), state=SimpleNamespace(num_processes=1)
    )
    assert steps_per_epoch(run) == 4
    assert schedule_points(run, 2) == (
        "linear (together), M at step 0: 1.000, 4: 0.000, 8: 0.000, 12: 0.000, 15: 0.000, of 16 steps"
    )
    settings.order = "ascending"
    assert schedule_points(run, 2) == (
        "linear (ascending), M at step 0: 0.000 1.000, 4: 0.000 0.000, 8: 0.000 0.000, 12: 0.000 0.000, "
        "15: 0.000 0.000, of 16 steps"
    )
    run.state.num_processes = 2
    assert steps_per_epoch(run) == 2


@pytest.mark.parametrize("gib, kept", [(0.25, True), (0.0, False)])
def test_processed_images_are_kept_up_to_the_cache(finished, gib, kept):
    context = RunContext(parse_settings(flags(finished, cache_gib=gib)))
    for split in ("train", "evaluation"):
        assert (context.images(split, 10).pixel_values is not None) is kept
        # Processed once, however many trainings there are; another head checks its labels anew.
        assert context.images(split, 10) is context.images(split, 10) is not context.images(split, 11)


# The folder


@pytest.mark.parametrize("name", ["prepare.json", "settings.yaml", "notes.txt", "training/"])
def test_a_folder_that_is_not_empty_is_refused(tmp_path, name):
    folder = tmp_path / "run"
    (folder / name).mkdir(parents=True) if name.endswith("/") else folder.mkdir()
    if not name.endswith("/"):
        (folder / name).write_text("mine")
    before = files(folder)
    with pytest.raises(ValueError, match=rf"is not empty \({name.strip('/')}\).*--resume.*--overwrite"):
        run(folder)
    assert files(folder) == before
    assert {path.name for path in folder.iterdir()} - {".lock"} == {name.strip("/")}


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "run").mkdir()
    run(tmp_path / "run", stages="prepare", dense_steps=1)
    assert (tmp_path / "run" / "prepare.json").is_file()


def test_overwrite_deletes_what_a_run_left_and_nothing_else(copy):
    (copy / "notes.txt").write_text("mine")
    (copy / "photos").mkdir()
    (copy / "photos" / "cat.png").write_text("mine")
    (copy / "model" / "leftover").write_text("of the old run")
    run(copy, "--overwrite", stages="prepare", dense_steps=1)
    assert (copy / "notes.txt").read_text() == "mine" and (copy / "photos" / "cat.png").read_text() == "mine"
    left = {path.name for path in copy.iterdir()}
    assert left == {"notes.txt", "photos", ".lock", "settings.yaml", "prepare.json", "dense", "training"}
    assert len(record(copy, "prepare")["dense_training"]["log"]) < 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dataset": "nowhere.parquet"}, "nowhere.parquet"),
        ({"model": "nowhere/config.json"}, "nowhere"),
        ({"num_removed": None, "model": "{folder}/dense"}, "lies in output_dir .* name another one"),
    ],
)
def test_overwrite_deletes_nothing_for_a_job_that_cannot_start(values, message, copy):
    values = {name: value and value.format(folder=copy) for name, value in values.items()}
    before = files(copy)
    with pytest.raises((ValueError, OSError), match=message):
        run(copy, "--overwrite", **values)
    assert files(copy) == before


def test_overwrite_refuses_nothing_that_an_empty_folder_would_not(tmp_path):
    run(tmp_path / "new", "--overwrite", stages="prepare", dense_steps=1)
    assert (tmp_path / "new" / "prepare.json").is_file()


def test_two_runs_in_one_folder(finished, tmp_path):
    folder = tmp_path / "run"
    with locked(folder):
        with pytest.raises(RunLockedError, match=f"Another process is at work in {folder}"):
            run(folder)
        assert files(folder) == {}
    before = files(finished)
    with locked(finished):
        for call in (
            lambda: resume(finished),
            lambda: rerun(finished, "select"),
            lambda: run(finished, "--overwrite"),
        ):
            with pytest.raises(RunLockedError):
                call()
    assert files(finished) == before


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OSError, match="file"):
            run(folder, model=tiny_model(tmp_path / "model"))
    assert (tmp_path / "file").read_text() == "mine"


# Resume


def test_resume_runs_nothing_again_but_the_report(copy, capsys):
    before = files(copy)
    resume(copy)
    after = files(copy)
    assert {name for name in before if before[name] != after[name]} <= {"report.json", "report.md"} | {
        name for name in before if name.startswith("figures/")
    }
    assert set(after) == set(before)
    words = capsys.readouterr().out
    assert [f"[{number}/7] {stage}: finished before" in words for number, stage in enumerate(STAGES, 1)] == 6 * [
        True
    ] + [False]


def test_resume_runs_what_is_missing_from_what_is_there(copy):
    before = files(copy)
    for name in ("metrics.json", "fold.json"):
        (copy / name).unlink()
    shutil.rmtree(copy / "model")
    resume(copy)
    after = files(copy)
    assert after["model/model.safetensors"] == before["model/model.safetensors"]
    assert after["dilution.json"] == before["dilution.json"] and set(after) == set(before)


def test_resume_inside_training_goes_on_from_the_checkpoint(finished, copy):
    """What a kill between the last checkpoint and the record leaves."""
    for name in ("dilution.json", "fold.json", "metrics.json"):
        (copy / name).unlink()
    shutil.rmtree(copy / "diluted")
    shutil.rmtree(copy / "training" / "dilution" / "checkpoint-8")
    shutil.rmtree(copy / "training" / "dense_control")
    resume(copy)
    assert record(copy, "dilution")["resumed_from"] == "checkpoint-4"
    assert record(copy, "dilution")["control"]["resumed_from"] is None
    for name in ("diluted", "dense_control", "model"):
        assert files(copy)[f"{name}/model.safetensors"] == files(finished)[f"{name}/model.safetensors"]
    lines = [[line["step"] for line in record(folder, "dilution")["log"]] for folder in (copy, finished)]
    assert lines[0] == lines[1]


@pytest.mark.parametrize(
    "changed, named",
    [
        (["--seed=1"], [f"seed (stage {stage}: 0, now 1)" for stage in ("prepare", "select", "dilute")]),
        (["--num_removed=1"], ["num_removed (stage select: 2, now 1)"]),
        (["--ratio=0.5"], ["num_removed (stage select: 2, now None)", "ratio (stage select: None, now 0.5)"]),
        (
            ["--mask=double", "--steps=9"],
            ["mask (stage select: 'skip', now 'double')", "steps (stage dilute: 8, now 9)"],
        ),
        (["--throughput_rounds=3"], ["throughput_rounds (stage evaluate: 2, now 3)"]),
        (["--feature_compensation=false"], ["feature_compensation (stage dilute: None, now False)"]),
    ],
)
def test_resume_refuses_changed_settings_by_key(finished, changed, named):
    before = files(finished)
    with pytest.raises(ValueError) as caught:
        resume(finished, *changed)
    for text in named:
        assert text in str(caught.value)
    assert str(caught.value).count("(stage") == len(named)
    assert files(finished) == before


def test_resume_refuses_only_for_stages_that_are_finished(copy):
    for name in ("dilution.json", "fold.json", "metrics.json"):
        (copy / name).unlink()
    shutil.rmtree(copy / "training")
    resume(copy, "--steps=2", "--throughput_rounds=3", "--control=false", "--save_steps=7", "--logging_steps=1")
    assert record(copy, "dilution")["steps"] == 2
    assert parse_settings(["--resume", f"--output_dir={copy}"]).steps == 2


def test_resume_refuses_other_settings_inside_a_training(copy):
    """No record yet, but checkpoints: going on under another schedule would mix two trainings."""
    for name in ("dilution.json", "fold.json", "metrics.json"):
        (copy / name).unlink()
    before = files(copy)
    with pytest.raises(ValueError, match=r"steps \(stage dilute: 8, now 9\)"):
        resume(copy, "--steps=9")
    assert files(copy) == before
    rerun(copy, "dilute", "--steps=3", "--control=false")
    assert record(copy, "dilution")["steps"] == 3 and record(copy, "dilution")["resumed_from"] is None


def test_settings_that_change_no_result_may_change(copy):
    (copy / "fold.json").unlink()
    resume(copy, "--save_steps=100", "--logging_steps=3", "--num_workers=1", "--device=auto")
    assert (copy / "fold.json").is_file()


def test_a_model_that_was_not_trained_depends_on_no_settings_of_training(finished, tmp_path):
    folder = tmp_path / "run"
    run(folder, model=finished / "dense", dense_steps=0, stages="prepare,select")
    resume(folder, "--stages=dilute", "--learning_rate=0.01", "--steps=2", "--control=false")
    assert record(folder, "dilution")["settings"]["learning_rate"] == 0.01


def test_a_truncated_record_is_named(copy):
    path = copy / "selection.json"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="selection.json is truncated or corrupt"):
        resume(copy)


def test_an_interrupted_stage_leaves_no_record(tmp_path, monkeypatch):
    folder = tmp_path / "run"

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hf_nose.stages.select_attention_layers", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(folder, stages="prepare,profile,select")
    assert (folder / "profile.json").is_file() and not (folder / "selection.json").exists()
    resume(folder, "--stages=select")
    assert (folder / "selection.json").is_file()


# One stage again


def test_a_stage_again_drops_what_later_stages_made_of_it(copy):
    before = files(copy)
    rerun(copy, "select", "--num_removed=1")
    kept = {"prepare.json", "profile.json", "selection.json"}
    assert {path.name for path in copy.glob("*.json")} == kept
    after = files(copy)
    assert after["profile.json"] == before["profile.json"] and after["prepare.json"] == before["prepare.json"]
    assert len(record(copy, "selection")["layers"]) == 1
    assert parse_settings(["--resume", f"--output_dir={copy}"]).num_removed == 1


def test_after_another_selection_no_checkpoint_of_the_old_one_is_resumed(copy):
    old = record(copy, "selection")["layers"]
    new = [layer for layer in range(4) if layer not in old]
    rerun(copy, "select", f"--layers={','.join(map(str, new))}")
    resume(copy, "--stages=dilute,fold", "--control=false")
    assert record(copy, "dilution")["resumed_from"] is None
    assert record(copy, "fold")["removed_attention_layers"] == new


def test_what_later_stages_made_of_an_old_result_goes_with_it(copy):
    rerun(copy, "select", "--layers=0,1")
    left = {path.name for path in copy.iterdir()}
    assert left == {"dense", "training", "prepare.json", "profile.json", "selection.json", "settings.yaml", ".lock"}


def test_a_stage_again_under_the_same_settings_gives_the_same(copy):
    before = files(copy)
    for stage in ("select", "dilute", "fold"):
        rerun(copy, stage)
        assert json.loads(files(copy)[RECORDS[stage]])["settings"] == json.loads(before[RECORDS[stage]])["settings"]
    for name in ("diluted", "model"):
        assert files(copy)[f"{name}/model.safetensors"] == before[f"{name}/model.safetensors"]


@pytest.mark.parametrize(
    "stage, arguments, message",
    [
        ("select", ["--num_removed=4"], r"num_removed must be in \[1, 3\], got 4"),
        ("select", ["--layers=0,9"], "9"),
        ("select", ["--ratio=0.01"], "rounds to no layer"),
        ("dilute", ["--decay=1", "--unit=epoch", "--epochs=1"], "one step or epoch for M to fall"),
        ("dilute", ["--num_removed=1"], r"num_removed \(stage select: 2, now 1\)"),
        ("fold", ["--steps=6"], r"steps \(stage dilute: 8, now 6\)"),
        ("select", ["--dry_run"], "dry_run belong to `hf-nose run`"),
        ("dilute", ["--resume", "--recipe=digits"], "resume belong to `hf-nose run`"),
        ("dilute", ["--overwrite"], "overwrite belong to `hf-nose run`"),
    ],
)
def test_a_stage_that_is_refused_loses_nothing(finished, stage, arguments, message):
    before = files(finished)
    with pytest.raises(Exception, match=message) as caught:
        rerun(finished, stage, *arguments)
    assert type(caught.value).__name__ in ("ValueError", "StrictDataclassClassValidationError")
    assert files(finished) == before


def test_the_report_again_takes_only_records(copy):
    for name in FOLDERS:
        shutil.rmtree(copy / name, ignore_errors=name == "export")
    rerun(copy, "report")
    assert len(list((copy / "figures").glob("*.png"))) == 4


def test_a_folder_without_settings_is_no_run(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} is not the folder of a run: it holds no settings.yaml"):
        folder_settings(tmp_path)


# Real model, real images


def test_real_model_and_images_end_in_a_trace_and_figures(deit_tiny, imagenet, tmp_path):
    folder = tmp_path / "run"
    run_job(
        parse_settings(
            [f"--model={deit_tiny}", f"--dataset={imagenet}", f"--output_dir={folder}", "--device=cpu"]
            + ["--base_model_id=facebook/deit-tiny-patch16-224", "--num_removed=5", "--num_calibration=16"]
            + ["--stages=prepare,profile,select,report", "--max_train_samples=16", "--max_eval_samples=8"]
        )
    )
    content = record(folder, "selection")
    assert len(content["layers"]) == len(set(content["layers"])) == 5
    assert [len(line["scores"]) for line in content["trace"]] == [12, 11, 10, 9, 8]
    assert content["calibration"]["num_images"] == 16
    assert any("one split only" in note for note in content["calibration"]["notes"])
    assert {path.name for path in (folder / "figures").iterdir()} == {"entropy.png", "trajectory.png"}
    text = (folder / "report.md").read_text()
    assert "trajectory.png" in text and str(imagenet) not in text
    assert text.count("one split only") == 1


def test_the_context_does_no_work_before_it_is_asked(tmp_path):
    context = RunContext(Settings(output_dir=str(tmp_path / "run"), device="cpu", dataset="/nothing"))
    assert not (tmp_path / "run").exists() and context.is_main
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="there is no file or folder '/nothing'"):
        context.data  # noqa: B018


def test_flags_of_these_tests_are_settings(tmp_path):
    assert parse_settings(flags(tmp_path / "run")).steps == TINY["steps"]
