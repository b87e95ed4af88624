"""Two processes, as torchrun really starts them: the same answers as one, or a message."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_shards
from tiny_training import Images, arguments, model, weights
from transformers import ViTConfig, ViTForImageClassification
from two_processes import CLASSES, STEPS, train_all

from hf_nose.images import digits_processor
from hf_nose.launch import LaunchError
from hf_nose.modeling_nose_vit import NoseViTForImageClassification
from hf_nose.training import NoseTrainer


pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parent
SCRIPT = HERE.parents[1] / "scripts" / "run_nose.py"
BIN = Path(sys.executable).parent
LAUNCHERS = ("ACCELERATE_", "MASTER_", "TORCHELASTIC_")


def start(*command, folder):
    """Exit code and output of a command, in an environment without a launcher."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        environ.pop(name, None)
    environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(folder), "TQDM_DISABLE": "1"}
    words = [str(BIN / command[0]), *map(str, command[1:])]
    done = subprocess.run(words, env=environ, capture_output=True, text=True, timeout=240, check=False)
    return done.returncode, done.stdout + done.stderr


def on_two(*command, folder):
    # --standalone takes a free port.
    return start("torchrun", "--standalone", "--nproc_per_node", "2", *command, folder=folder)


# --- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What either rank found."""
    folder = tmp_path_factory.mktemp("two")
    code, output = on_two(HERE / "two_processes.py", folder, folder=folder)
    assert code == 0, output
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_processes_train_on_after_the_mask_has_reached_zero(two, checkpointing):
    ranks = [found[f"checkpointing {checkpointing}"] for found in two]
    for found in ranks:
        assert (found["world_size"], found["checkpointing"]) == (2, checkpointing)
        assert found["masks"] == ranks[0]["masks"]
        zeros = [values == [0.0, 0.0] for values in found["masks"]]
        assert zeros == [False] * 5 + [True] * (STEPS - 5)
        assert sum(zeros) >= 6
    one, other = (found["weights"] for found in ranks)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process finds with batches twice as large."""
    return train_all(tmp_path_factory.mktemp("one"), batch_size=8)


@pytest.mark.parametrize("name", ["float64", "soft 1", "soft 2"])
def test_loss_and_weights_do_not_depend_on_the_number_of_processes(two, one, name):
    # Of one process without accumulation.
    expected = one[name.replace("2", "1")]
    assert expected["world_size"] == 1
    for found in (*(rank[name] for rank in two), one[name]):
        # Losses are logged in float32.
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        for name, tensor in expected["weights"].items():
            torch.testing.assert_close(found["weights"][name], tensor, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("labels", ["mixed", "class ids"])
def test_the_loss_of_zero_logits_is_the_log_of_the_classes(two, one, labels, accumulation):
    for ranks, world_size in ((two, 2), ([one], 1)):
        for found in (rank[f"zero logits {labels} {accumulation}"] for rank in ranks):
            assert (found["world_size"], found["images_per_step"]) == (world_size, 8)
            assert found["losses"] == pytest.approx([math.log(CLASSES)] * STEPS, rel=1e-6)


# --- shards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compensation", [False, True])
def test_sharded_weights_end_where_whole_ones_do(shards, compensation):
    found = model([])
    found.dilute([1, 2], feature_compensation=compensation)
    expected = weights(two_shards.train(found, rank=0, world_size=1))
    assert expected["vit.dilution_mask"].tolist() == [0.0, 0.0]
    count = sum(parameter.numel() for parameter in found.parameters())
    # Either rank's, and what was saved.
    for rank in (each for each in shards if each[compensation]):
        assert rank[compensation]["sharded"] == len(list(found.parameters()))
        # Each holds its part and no more, but for what does not divide evenly.
        assert rank[compensation]["local"] < 0.6 * count
        assert rank[compensation]["weights"].keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(rank[compensation]["weights"][name], tensor, rtol=1e-6, atol=1e-6, msg=name)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """What either rank found of a sharded training."""
    folder = tmp_path_factory.mktemp("shards")
    code, output = on_two(HERE / "two_shards.py", folder, folder=folder)
    assert code == 0, output
    found = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]
    for compensation in (False, True):
        saved = NoseViTForImageClassification.from_pretrained(folder / f"saved-{compensation}")
        found.append({compensation: found[0][compensation] | {"weights": weights(saved)}, not compensation: None})
    return found


def test_shards_that_would_be_whole_copies_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(LaunchError, match="FSDP was asked for, but accelerate shards on GPUs alone"):
        NoseTrainer(model=model([1]), args=arguments(tmp_path), train_dataset=Images(), eval_dataset=Images(4))


# --- the whole job ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A ViT for digits with random weights, so that both runs select in the same model."""
    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 5, "num_attention_heads": 3, "intermediate_size": 48}
    config = ViTConfig(**sizes, image_size=8, patch_size=2, num_labels=10, initializer_range=0.3)
    config.id2label = {number: str(number) for number in range(10)}
    config.label2id = {str(number): number for number in range(10)}
    ViTForImageClassification(config).save_pretrained(folder)
    digits_processor().save_pretrained(folder)
    return folder


def test_two_processes_do_the_whole_job_and_select_the_same_layers(dense, tmp_path):
    settings = {
        "model": dense,
        "dataset": "digits",
        "device": "cpu",
        "num_removed": 2,
        "dense_steps": 0,
        "steps": 6,
        "batch_size": 8,
        "shift": 1,
        "max_train_samples": 120,
        "max_eval_samples": 50,
        # Three batches, the last one short: one rank is dealt two.
        "num_calibration": 75,
        "calibration_batch_size": 32,
        "eval_batch_size": 16,
        "save_steps": 3,
        "eval_steps": 3,
        "random_controls": 1,
        "throughput_batch_size": 4,
        "throughput_rounds": 2,
    }
    flags = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    one, two = tmp_path / "one", tmp_path / "two"
    stages = ["--stages", "prepare,profile,select"]
    code, output = start("python", SCRIPT, *flags, *stages, "--output_dir", one, folder=tmp_path)
    assert code == 0, output
    code, output = on_two(SCRIPT, *flags, "--output_dir", two, folder=tmp_path)
    assert code == 0, output
    # One process speaks.
    assert output.count("Picked, in this order") == 1

    records = [
        {name: json.loads((folder / f"{name}.json").read_text()) for name in ("profile", "selection")}
        for folder in (one, two)
    ]
    selections = [found["selection"] for found in records]
    assert [found["num_processes"] for found in selections] == [1, 2]
    assert selections[0]["layers"] == selections[1]["layers"]
    assert selections[0]["calibration"] == selections[1]["calibration"]
    for alone, joined in zip(*(found["trace"] for found in selections), strict=True):
        assert alone["picked"] == joined["picked"]
        assert joined["scores"] == pytest.approx(alone["scores"], rel=1e-9)
    for alone, joined in zip(*(found["profile"]["layers"] for found in records), strict=True):
        for part in ("attention", "mlp"):
            assert joined[part] == pytest.approx(alone[part], rel=1e-9)

    dilution = json.loads((two / "dilution.json").read_text())
    assert (dilution["steps"], dilution["log"][-1]["mask"]) == (6, 0.0)
    assert json.loads((two / "fold.json").read_text())["bitwise_equal"]
    metrics = json.loads((two / "metrics.json").read_text())
    assert metrics["models"]["compressed"]["num_images"] == 50
    assert (two / "report.md").is_file()
    assert json.loads((two / "model" / "config.json").read_text())["removed_attention_layers"] == sorted(
        selections[1]["layers"]
    )


# --- launches that would run fewer processes than asked for ----------------------------------------------------------


def test_accelerate_with_cpu_and_two_processes_is_stopped(tmp_path):
    command = ("accelerate", "launch", "--cpu", "--num_processes", "2", SCRIPT, "--output_dir", tmp_path / "run")
    code, output = start(*command, folder=tmp_path)
    # accelerate's launcher turns every failure into 1.
    assert code == 1
    assert "accelerate launch was asked for several processes and started one" in output
    assert "torchrun --standalone --nproc_per_node 2 scripts/run_nose.py --device cpu" in output
    assert not (tmp_path / "run").exists()


def test_a_trainer_that_was_not_told_to_use_the_cpu_is_stopped_under_torchrun(tmp_path):
    code, output = on_two(HERE / "two_processes.py", tmp_path, "--without_use_cpu", folder=tmp_path)
    assert code != 0
    assert "2 processes were started (WORLD_SIZE) but only 1 found each other" in output
    assert "TrainingArguments(use_cpu=True)" in output
    assert "would have been trained" not in output
