"""The main job told everything that training can be told."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import flags, record, resume, run
from tiny_training import differing

from hf_nose.augmentation import BatchAugmentation
from hf_nose.cli import BAD_INPUT, FAILED, main
from hf_nose.mixing import Mixing


pytestmark = pytest.mark.slow

EVERYTHING = {
    "optimizer": "sgd",
    "base_learning_rate": 0.8,
    "warmup": 2,
    "warmup_unit": "step",
    "max_grad_norm": 0,
    "drop_path_rate": 0.1,
    "drop_path_schedule": "constant",
    "flip": True,
    "shift": 1,
    "rand_augment": 9,
    "random_erasing": 0.25,
    "color_jitter": 0.4,
    "mixup": 0.8,
    "cutmix": 1.0,
}


USED = []


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for kind in (BatchAugmentation, Mixing):
            patch.setattr(kind, "__call__", noted(kind.__call__))
        run(folder, stages="prepare,profile,select,dilute,fold", **EVERYTHING)
    return folder


def noted(draw):
    def call(self, *tensors, step, **place):
        USED.append((vars(self), step))
        return draw(self, *tensors, step=step, **place)

    return call


def test_both_trainings_are_augmented_and_mixed_by_the_settings(whole):
    # Four steps of dense training, eight of dilution and eight of its control.
    steps = [*range(4), *range(8), *range(8)]
    augmentations, mixings = ([each for each in USED if ("mixup" in each[0]) == is_mixing] for is_mixing in (0, 1))
    assert [step for _, step in augmentations] == [step for _, step in mixings] == steps
    for found, _ in augmentations:
        names = ("shift", "flip", "rand_augment", "random_erasing", "color_jitter")
        assert {name: found[name] for name in names} == {name: EVERYTHING[name] for name in names}
        # The processor of the digits takes them to [-1, 1].
        assert found["mean"].tolist() == found["std"].tolist() == [0.5] * 3 and found["seed"] == 0
    for found, _ in mixings:
        assert found == {"num_labels": 10, "mixup": 0.8, "cutmix": 1.0, "seed": 0}


def test_the_job_trains_by_its_settings(whole):
    for log in (record(whole, "prepare")["dense_training"]["log"], record(whole, "dilution")["log"]):
        rates = {line["step"]: line["learning_rate"] for line in log if "learning_rate" in line}
        # Half of 0.8 x 8 images / 512 in the second step, the last one of the warm-up.
        assert rates[2] == pytest.approx(0.8 * 8 / 512 / 2)
    config = json.loads((whole / "diluted" / "config.json").read_text())
    assert (config["drop_path_rate"], config["drop_path_schedule"]) == (0.1, "constant")
    assert config.get("problem_type") is None
    assert (
        record(whole, "dilution")["settings"].items()
        >= {"mixup": 0.8, "rand_augment": 9.0, "optimizer": "sgd"}.items()
    )


def test_a_killed_job_resumes_to_the_same_weights(whole, tmp_path, monkeypatch):
    draw = BatchAugmentation.__call__

    def killed(self, pixel_values, step, **place):
        if step == 6:
            raise KeyboardInterrupt
        return draw(self, pixel_values, step, **place)

    with monkeypatch.context() as patch:
        patch.setattr(BatchAugmentation, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", stages="prepare,profile,select,dilute,fold", **EVERYTHING)
    torch.manual_seed(99)
    resume(tmp_path / "run", "--stages=prepare,profile,select,dilute,fold")
    assert record(tmp_path / "run", "dilution")["resumed_from"] == "checkpoint-4"
    one, other = (load_file(folder / "diluted" / "model.safetensors") for folder in (whole, tmp_path / "run"))
    assert differing(one, other) == []


def test_another_mixing_is_another_training(whole, capsys):
    assert main(["run", "--resume", f"--output_dir={whole}", "--mixup=0.2"]) == BAD_INPUT
    assert "mixup (stage prepare: 0.8, now 0.2)" in capsys.readouterr().err


@pytest.mark.parametrize("switches", [[], ["--dry_run"]])
def test_a_missing_extra_is_one_line_before_anything_is_trained(tmp_path, capsys, monkeypatch, switches):
    def missing():
        raise ImportError("rand_augment and color_jitter need kornia")

    monkeypatch.setattr("hf_nose.augmentation.check_kornia", missing)
    monkeypatch.setattr("hf_nose.context.fit", lambda *args, **kwargs: pytest.fail("trained first"))
    assert main(["run", *flags(tmp_path / "run", *switches, dense_steps=8, rand_augment=9)]) == FAILED
    said = capsys.readouterr().err
    assert "hf-nose: rand_augment and color_jitter need kornia" in said and "Traceback" not in said


def test_a_data_set_smaller_than_a_step_is_refused_before_anything_is_searched(whole, tmp_path, capsys):
    sizes = {"batch_size": 16, "gradient_accumulation_steps": 4, "model": whole / "dense", "dense_steps": 0}
    assert main(["run", *flags(tmp_path / "run", **sizes)]) == BAD_INPUT
    assert "The training data have 48 images, fewer than the 64 of one step" in capsys.readouterr().err
    assert not (tmp_path / "run" / "prepare.json").exists()


def test_a_floor_above_the_peak_is_refused_by_the_dry_run(tmp_path, capsys):
    values = {"base_learning_rate": 1e-4, "min_learning_rate": 1e-5}
    assert main(["run", *flags(tmp_path / "run", "--dry_run", **values)]) == BAD_INPUT
    assert (
        "min_learning_rate 1e-05 is above the peak: learning rate 1.5625e-06 = 0.0001 x 8" in capsys.readouterr().err
    )


def test_the_words_of_a_run_say_how_the_learning_rate_came_about(tmp_path, capsys):
    run(tmp_path / "run", stages="prepare", base_learning_rate=0.064)
    assert "learning rate 0.001 = 0.064 x 8 images a step / 512" in capsys.readouterr().out
