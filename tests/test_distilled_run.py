"""The main job with a teacher and with a moving average of the weights."""

import json
import shutil

import pytest
from run_records import records, write_run
from safetensors.torch import load_file
from tiny_run import files, finished_run, flags, record, rerun, resume, run

from hf_nose.cli import BAD_INPUT, main
from hf_nose.command_line import parse_settings
from hf_nose.ema import EMA_FILE
from hf_nose.report import write_report
from hf_nose.run import run_job
from hf_nose.settings import Settings
from hf_nose.training import NoseTrainer


TAUGHT = {
    "distillation_weight": 0.7,
    "distillation_temperature": 3.0,
    "distillation_features": "both",
    "distillation_blocks": "3,1",
    "distillation_feature_weight": 0.5,
}
TARGETS = {"weight": 0.7, "temperature": 3.0, "features": "both", "blocks": [1, 3], "feature_weight": 0.5}
WORDS = "logits at temperature 3, weight 0.7; class token and patches behind blocks 1, 3, weight 0.5"
WEIGHTS = [f"{name}/model.safetensors" for name in ("dense", "diluted", "dense_control", "model")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run without a teacher through all stages; only read."""
    return finished_run(tmp_path_factory)


@pytest.fixture(scope="module")
def taught(finished, tmp_path_factory):
    """The same run distilled and averaged, with what draws; only read."""
    folder = tmp_path_factory.mktemp("taught") / "run"
    run(folder, **TAUGHT, ema_decay=0.9, gradient_accumulation_steps=2)
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


# --- settings --------------------------------------------------------------------------------------------------------


def test_by_default_there_is_neither():
    settings = parse_settings([])
    assert not settings.is_distilled and settings.has_own_teacher and settings.ema_decay is None


@pytest.mark.parametrize(
    "given", [{"distillation_weight": 0.5}, {"distillation_features": "patches", "distillation_blocks": "3"}]
)
def test_a_weight_or_features_ask_for_the_dense_model(given):
    settings = Settings(steps=5, **given)
    assert settings.is_distilled and settings.has_own_teacher
    assert Settings(steps=5, teacher="dense", **given).has_own_teacher
    assert not Settings(steps=5, teacher="./dense", **given).has_own_teacher


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"distillation_weight": 1.5}, r"distillation_weight must be in \[0, 1\], got 1.5"),
        ({"distillation_temperature": 0.0}, "distillation_temperature must be positive, got 0.0"),
        ({"distillation_feature_weight": 0.0}, "distillation_feature_weight must be positive, got 0.0"),
        ({"distillation_features": "patches"}, "need each other, got 'patches' and None: say which tokens"),
        ({"distillation_blocks": "1,2"}, "need each other, got 'none' and '1,2': say which tokens"),
        ({"distillation_weight": 0.5, "steps": 0}, "distillation needs training: set steps or epochs"),
        ({"teacher": "dense"}, "teacher 'dense' has no part: set distillation_weight or distillation_features"),
        ({"distillation_control": True, "control": True}, "distillation_control needs control, and a distillation_w"),
        ({"distillation_control": True, "distillation_weight": 0.5}, "distillation_control needs control, and a dis"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \(0, 1\), got 1.0"),
        ({"ema_decay": 0.0}, r"ema_decay must be in \(0, 1\), got 0.0"),
    ],
)
def test_settings_that_cannot_be_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        Settings(**{"steps": 5, **values})


def test_unknown_features_end_with_usage(capsys):
    with pytest.raises(SystemExit):
        parse_settings(["--distillation_features", "logits"])
    assert "argument --distillation_features" in capsys.readouterr().err


# --- records, report and dry run -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_record_and_report_say_what_was_learnt(taught):
    content = record(taught, "dilution")
    assert content["distillation"] == {"teacher": "dense", **TARGETS, "control": False}
    assert content["ema_decay"] == 0.9
    assert {name: content["settings"][name] for name in TAUGHT} == TAUGHT
    assert record(taught, "prepare")["settings"]["ema_decay"] == 0.9
    last = {key: value for line in content["log"] for key, value in line.items()}
    text = (taught / "report.md").read_text()
    assert f"- Distilled from the dense model: {WORDS}; the dense control not." in text
    assert (
        "- The result is the moving average of the weights, decay 0.9: at the end of training top-1 "
        f"{100 * last['eval_ema_top1']:.1f} %, against {100 * last['eval_top1']:.1f} % of the last weights." in text
    )
    # The average is what is evaluated in the end: it was diluted to M = 0, saved and folded.
    compressed = record(taught, "metrics")["models"]["compressed"]
    assert compressed["top1"] == pytest.approx(last["eval_ema_top1"])
    assert record(taught, "fold")["bitwise_equal"]


@pytest.mark.slow
def test_without_them_record_and_report_name_neither(finished):
    content = record(finished, "dilution")
    assert content["distillation"] is None and content["ema_decay"] is None
    text = (finished / "report.md").read_text()
    assert "istill" not in text and "moving average" not in text
    assert not list(finished.rglob(EMA_FILE))


def test_records_from_before_are_still_reported(tmp_path):
    content = records()
    assert "distillation" not in content["dilution"]
    assert "Distilled" not in write_report(write_run(tmp_path, content)).read_text()
    content["dilution"]["distillation"] = {"teacher": "some/teacher", **TARGETS, "weight": 0.0, "control": True}
    text = write_report(write_run(tmp_path, content)).read_text()
    assert "- Distilled from some/teacher: class token and patches behind blocks 1, 3, weight 0.5; the dense" in text
    assert "the dense control too." in text


@pytest.mark.slow
def test_dry_run(finished, tmp_path, capsys):
    run(tmp_path / "run", "--dry_run", **TAUGHT, ema_decay=0.9)
    words = capsys.readouterr().out
    assert f"Distillation: from dense, {WORDS.replace('1, 3', '3, 1')}" in words
    assert "EMA: of the weights, over some 10 steps" in words
    run(tmp_path / "run", "--dry_run", distillation_weight=0.5, teacher=finished / "model")
    words = capsys.readouterr().out
    assert f"Distillation: from {finished / 'model'}, logits at temperature 2, weight 0.5" in words
    assert "EMA" not in words
    with pytest.raises(ValueError, match=r"distinct blocks in \[0, 3\], at least one .* got \[4\]"):
        run(tmp_path / "run", "--dry_run", distillation_features="both", distillation_blocks="4")
    with pytest.raises(ValueError, match="distillation_blocks must be indices such as 0,1,3,4,6, got 'all'"):
        run(tmp_path / "run", "--dry_run", distillation_features="both", distillation_blocks="all")
    assert not (tmp_path / "run").exists()


# --- what is trained -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_only_the_dilution_is_distilled_unless_asked(finished, tmp_path):
    plain = files(finished)
    for control in (False, True):
        folder = tmp_path / str(control)
        run(folder, **TAUGHT, distillation_control=control, stages="prepare,profile,select,dilute")
        found = files(folder)
        same = {name: found[name] == plain[name] for name in WEIGHTS[:3]}
        assert same == {WEIGHTS[0]: True, WEIGHTS[1]: False, WEIGHTS[2]: not control}
        assert record(folder, "dilution")["distillation"]["control"] is control


@pytest.mark.slow
def test_every_training_ends_with_its_average(taught):
    for arm, name in (("dense", "dense"), ("dilution", "diluted"), ("dense_control", "dense_control")):
        last = max((taught / "training" / arm).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        average, result = load_file(last / EMA_FILE), load_file(taught / name / "model.safetensors")
        raw = load_file(last / "model.safetensors")
        for key, tensor in average.items():
            assert result[key].equal(tensor), (arm, key)
        assert not all(raw[key].equal(tensor) for key, tensor in average.items())


@pytest.mark.slow
@pytest.mark.parametrize("batches", [5, 9, 15, 23, 31, 38])
def test_a_killed_run_ends_with_the_same_bits(taught, tmp_path, monkeypatch, batches):
    """In dense training, dilution and control, before and behind checkpoints: 8, 16 and 16 batches, two a step."""
    folder, left, training_step = tmp_path / "run", [batches], NoseTrainer.training_step

    def killed(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return training_step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(NoseTrainer, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            run(folder, **TAUGHT, ema_decay=0.9, gradient_accumulation_steps=2)
    resume(folder)
    found, expected = files(folder), files(taught)
    assert [name for name in WEIGHTS if found[name] != expected[name]] == []


# --- teachers from elsewhere, and those that do not fit --------------------------------------------------------------


@pytest.mark.slow
def test_a_teacher_from_a_folder(finished, tmp_path):
    folder = tmp_path / "run"
    stages = "prepare,profile,select,dilute,fold,report"
    run(folder, teacher=finished / "dense_control", stages=stages, control="false", **TAUGHT)
    content = record(folder, "dilution")
    assert content["distillation"]["teacher"] == "a local folder"
    text = (folder / "report.md").read_text()
    assert f"- Distilled from a local folder: {WORDS}." in text
    # No path, and another teacher than the dense model.
    assert str(finished) not in json.dumps({k: v for k, v in content.items() if k != "settings"}) + text
    own = tmp_path / "own"
    run(own, stages="prepare,profile,select,dilute", control="false", **TAUGHT)
    assert files(own)[WEIGHTS[1]] != files(folder)[WEIGHTS[1]]


@pytest.fixture(scope="module")
def teachers(finished, tmp_path_factory):
    """Folders of teachers that do not fit."""
    folder = tmp_path_factory.mktemp("teachers")

    def copied(name, file, **values):
        path = shutil.copytree(finished / "dense", folder / name) / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    names = [str(number) for number in range(9)]
    copied("nine", "config.json", id2label=dict(enumerate(names)), label2id={name: int(name) for name in names})
    copied("swapped", "config.json", id2label=dict(enumerate(["1", "0", *names[2:], "9"])))
    copied("bright", "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3])
    copied("strange", "config.json", model_type="bert")
    copied("truncated", "config.json")
    weights = folder / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    shutil.copytree(finished / "dense", folder / "blind")
    (folder / "blind" / "preprocessor_config.json").unlink()
    return folder


BAD = {
    "nine": r"the same classes: the teacher has 9, the student 10\. Train the teacher",
    "swapped": r"class 0 is '1' to the teacher and '0' to the student",
    "bright": r"expects pixels with image_mean .*0\.1.*, but would see the model's, with .*0\.5",
    "strange": r"teacher .*strange: model_type is 'bert'; supported are",
    "blind": r"blind' holds no preprocessor_config.json",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD)
def test_a_teacher_that_does_not_fit_is_refused_before_anything_is_trained(teachers, tmp_path, capsys, name):
    words = flags(tmp_path / "run", distillation_weight=0.5, teacher=teachers / name)
    for switches in ([], ["--dry_run"]):
        with pytest.raises(ValueError, match=BAD[name]):
            run_job(parse_settings([*words, *switches]))
    assert not (tmp_path / "run" / "dense").exists() and not list((tmp_path / "run").glob("training/dense"))
    assert main(["run", *words, "--overwrite"]) == BAD_INPUT
    assert capsys.readouterr().err.count("\n") == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD)
def test_a_refused_teacher_loses_no_earlier_result(copy, teachers, name):
    before = files(copy)
    with pytest.raises(ValueError, match=BAD[name]):
        rerun(copy, "dilute", "--distillation_weight=0.5", f"--teacher={teachers / name}")
    assert files(copy) == before


@pytest.mark.slow
def test_a_truncated_teacher_is_named(teachers, tmp_path):
    with pytest.raises(ValueError, match="The weights of .*truncated are corrupt or truncated"):
        run(tmp_path / "run", distillation_weight=0.5, teacher=teachers / "truncated")


@pytest.mark.slow
def test_a_stage_again_with_a_teacher(copy):
    rerun(copy, "dilute", "--distillation_weight=0.5", "--control=false")
    content = record(copy, "dilution")
    assert content["distillation"]["weight"] == 0.5 and content["distillation"]["blocks"] == []


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["distillation_weight=0.1", "teacher=dense", "ema_decay=0.5"])
def test_resume_refuses_another_teacher_or_average(taught, changed):
    name = changed.split("=")[0]
    with pytest.raises(ValueError, match=rf"{name} \(stage .*now"):
        resume(taught, f"--{changed}")
