"""Runs of the main job that are killed, over and over, and end with the same weights bit for bit."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_driver import Driver

from hf_nose.checkpoints import PREFIX, STAGING
from hf_nose.images import digits_processor
from hf_nose.records import RECORDS


pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "run_nose.py"
# 100 images in batches of 16, two a step: four steps an epoch, the last of one batch of four images. Neither training
# ends with an epoch.
STEPS = {"dense": 14, "dilution": 17, "dense_control": 17}
SETTINGS = {
    "dataset": "digits",
    "num_removed": 2,
    "dense_steps": STEPS["dense"],
    "steps": STEPS["dilution"],
    "control": True,
    "batch_size": 16,
    "gradient_accumulation_steps": 2,
    "drop_path_rate": 0.1,
    "shift": 1,
    "max_train_samples": 100,
    "max_eval_samples": 40,
    "num_calibration": 32,
    "save_steps": 3,
    "eval_steps": 5,
    "logging_steps": 1,
    "random_controls": 1,
    "throughput_batch_size": 4,
    "throughput_rounds": 2,
}
TRAINED = "prepare,profile,select,dilute,fold"
MODELS = ("dense", "diluted", "dense_control", "model")


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    driver = Driver(tmp_path_factory.mktemp("driver"))
    yield driver
    driver.close()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A small run on the real digits, with everything in it that draws."""
    folder = tmp_path_factory.mktemp("recipe")
    sizes = {
        "model_type": "vit",
        "hidden_size": 24,
        "num_hidden_layers": 6,
        "num_attention_heads": 3,
        "intermediate_size": 48,
    }
    sizes |= {"image_size": 8, "patch_size": 2, "num_channels": 3, "initializer_range": 0.1}
    (folder / "config.json").write_text(json.dumps(sizes))
    digits_processor().save_pretrained(folder)
    # JSON is YAML.
    (folder / "short.yaml").write_text(json.dumps({"model": str(folder / "config.json"), **SETTINGS}))
    return folder / "short.yaml"


def command(recipe, folder, workers=0, resume=False, stages=TRAINED):
    words = ["run", "--recipe", str(recipe), "--output_dir", str(folder), "--stages", stages]
    return [*words, "--device", "cpu", "--num_workers", str(workers), *(["--resume"] if resume else [])]


def contents(folder):
    """Every byte of the models of a run, and what was logged while they were trained."""
    files = {name: (folder / name / "model.safetensors").read_bytes() for name in MODELS}
    records = {stage: json.loads((folder / RECORDS[stage]).read_text()) for stage in ("prepare", "dilute")}
    trainings = records["prepare"]["dense_training"], records["dilute"], records["dilute"]["control"]
    keys = ("step", "loss", "mask", "learning_rate", "eval_loss", "eval_top1")
    for name, training in zip(STEPS, trainings, strict=True):
        lines = [{key: line[key] for key in keys if key in line} for line in training["log"]]
        files[f"log of {name}"] = [line for line in lines if "loss" in line or "eval_loss" in line]
        assert training["steps"] == STEPS[name]
    return files


def assert_same(folder, expected):
    found = contents(folder)
    assert [name for name in expected if found[name] != expected[name]] == []
    # Neither a half-written model nor an unfinished checkpoint is left behind.
    assert [path.name for path in folder.rglob("*") if ".partial" in path.name or path.name == STAGING] == []


@pytest.fixture(scope="module")
def never_killed(driver, recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("never_killed") / "run"
    assert driver.run(command(recipe, folder)) == 0, driver.log
    return contents(folder)


def unfinished(folder):
    """Checkpoints in staging that are not in place."""
    staged = folder.glob(f"training/*/{STAGING}/{PREFIX}*")
    return [path for path in staged if not (path.parents[1] / path.name).exists()]


def kills(seed, count=10, while_saving=4):
    """Ten kills: four while a checkpoint is being written, the others after some batches and a moment more."""
    draw = random.Random(seed)
    places = ("weights", "optimizer", "manifest", "moving")
    while_writing = [{"halt": place, "nth": draw.randint(1, 2)} for place in places[:while_saving]]
    anywhere = [{"batches": draw.randint(1, 9), "moment": draw.uniform(0, 0.15)} for _ in range(count - while_saving)]
    found = while_writing + anywhere
    draw.shuffle(found)
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_killed_ten_times_ends_with_the_same_weights(driver, recipe, never_killed, tmp_path, workers):
    folder, while_writing, batches = tmp_path / "run", 0, 0
    for number, kill in enumerate(kills(seed=workers)):
        driver.start(command(recipe, folder, workers, resume=number > 0), kill.get("halt"), kill.get("nth", 1))
        if "halt" in kill:
            driver.wait_for(lambda: driver.is_halted)
        else:
            driver.wait_for(lambda kill=kill: driver.steps >= kill["batches"])
            time.sleep(kill["moment"])
        assert driver.kill(signal.SIGKILL) == -signal.SIGKILL
        batches += driver.steps
        if "halt" in kill:
            (staged,) = unfinished(folder)
            assert (staged / "model.safetensors").exists()
            assert (staged / "manifest.json").exists() == (kill["halt"] == "moving")
            while_writing += 1
    assert while_writing >= 3
    assert not (folder / RECORDS["fold"]).exists()
    assert driver.run(command(recipe, folder, workers, resume=True)) == 0, driver.log
    assert_same(folder, never_killed)
    # Work was lost and done again, but not all of it every time.
    batches += driver.steps
    needed = sum(step // 4 * 7 + step % 4 * 2 for step in STEPS.values())
    assert needed < batches < 4 * needed


STAGES = "prepare,profile,select,dilute,fold,evaluate,report"
# Each stage is stopped once with its work done and its record not written, and models while they are written.
PLACES = {
    "model .dense.partial": signal.SIGKILL,
    "record of prepare": signal.SIGTERM,
    "record of profile": signal.SIGKILL,
    "record of select": signal.SIGINT,
    "rotating": signal.SIGKILL,
    "manifest": signal.SIGTERM,
    "moving": signal.SIGINT,
    "model .dense_control.partial": signal.SIGINT,
    "model .diluted.partial": signal.SIGKILL,
    "record of dilute": signal.SIGKILL,
    "model .model.partial": signal.SIGTERM,
    "record of fold": signal.SIGTERM,
    "record of evaluate": signal.SIGINT,
    "record of report": signal.SIGKILL,
}
CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}


def test_a_run_stopped_in_every_stage_by_every_signal_ends_with_the_same_weights(
    driver, recipe, never_killed, tmp_path
):
    folder = tmp_path / "run"
    for number, (place, sent) in enumerate(PLACES.items()):
        driver.start(command(recipe, folder, resume=number > 0, stages=STAGES), place)
        driver.wait_for(lambda: driver.is_halted)
        assert driver.kill(sent) == CODES[sent], driver.log
        stage = place.removeprefix("record of ")
        assert stage == place or not (folder / RECORDS[stage]).exists()
        if sent != signal.SIGKILL:
            assert "Finished stages and checkpoints are kept: continue with --resume." in driver.log
            assert "Traceback" not in driver.log
        if place.startswith("model"):
            assert not (folder / place.split(".")[1]).exists()
    assert driver.run(command(recipe, folder, resume=True, stages=STAGES)) == 0, driver.log
    assert_same(folder, never_killed)
    assert (folder / "report.md").is_file()


def test_a_damaged_checkpoint_of_a_killed_run_is_passed_over(driver, recipe, never_killed, tmp_path):
    folder = tmp_path / "run"
    driver.start(command(recipe, folder), "weights", nth=3)
    driver.wait_for(lambda: driver.is_halted)
    driver.kill(signal.SIGKILL)
    last = folder / "training" / "dense" / f"{PREFIX}6"
    file = last / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 4
    file.write_bytes(content)
    assert driver.run(command(recipe, folder, resume=True)) == 0, driver.log
    assert "Passing over checkpoint-6" in driver.log
    assert "model.safetensors has changed" in driver.log
    assert json.loads((folder / "prepare.json").read_text())["dense_training"]["resumed_from"] == f"{PREFIX}3"
    assert_same(folder, never_killed)


def test_a_killed_run_frees_its_folder_while_its_loaders_still_live(driver, recipe, tmp_path):
    folder = tmp_path / "run"
    driver.start(command(recipe, folder, workers=2), "weights")
    driver.wait_for(lambda: driver.is_halted)
    driver.kill(signal.SIGKILL)
    driver.start(command(recipe, folder, workers=2, resume=True), "optimizer")
    driver.wait_for(lambda: driver.is_halted)
    driver.kill(signal.SIGKILL)


def test_the_script_itself_ends_with_143_on_sigterm(recipe, tmp_path):
    folder = tmp_path / "run"
    words = [sys.executable, str(SCRIPT), *command(recipe, folder)[1:], "--dense_steps", "100000"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        deadline = time.monotonic() + 120
        while not list(folder.glob(f"training/dense/{PREFIX}*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Terminated. Finished stages and checkpoints are kept: continue with --resume." in errors
