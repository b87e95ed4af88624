"""A training's pace: images per second and seconds left, by a clock of the test's own."""

import pytest
from tiny_training import Images, arguments, model

from hf_nose import progress
from hf_nose.progress import Pace
from hf_nose.training import NoseTrainer


@pytest.fixture
def clock(monkeypatch):
    times = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: times[0])
    return times


def test_pace_of_two_lines(clock):
    found = Pace()
    found.start(40)
    found.start(99)
    clock[0] = 110.0
    assert found.measure(60, 100, 8) == {"images_per_s": 16.0, "seconds_left": 20.0}
    # The second line measures from the first.
    clock[0] = 111.0
    assert found.measure(70, 100, 8) == {"images_per_s": 80.0, "seconds_left": 3.0}


def test_no_pace_without_steps(clock):
    found = Pace()
    assert found.measure(0, 100, 8) == {}
    found.start(40)
    assert found.measure(40, 100, 8) == {}


def test_every_training_line_tells_learning_rate_pace_and_mask(tmp_path):
    args = arguments(tmp_path, 6, logging_steps=2)
    trainer = NoseTrainer(model=model([1]), args=args, train_dataset=Images(), eval_dataset=Images(4))
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert line["images_per_s"] > 0 and line["learning_rate"] >= 0 and line["mask"] == 1.0
    assert lines[0]["seconds_left"] > 0 and lines[-1]["seconds_left"] == 0
    assert not any("images_per_s" in line for line in trainer.state.log_history if "eval_loss" in line)
