"""Distillation and the moving average on two processes, as torchrun really starts them: the same answers as one."""

import math

import pytest
import torch
from test_two_processes import HERE, on_two
from tiny_training import NUM_LABELS
from two_processes_targets import STEPS, train_all


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What one process found, and either rank of two."""
    folder = tmp_path_factory.mktemp("targets")
    code, output = on_two(HERE / "two_processes_targets.py", folder, folder=folder)
    assert code == 0, output
    two = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]
    return [train_all(tmp_path_factory.mktemp("alone"), processes=1), *two]


@pytest.mark.parametrize("kind", ["accumulation 1", "accumulation 2", "tokens 1", "tokens 2"])
def test_a_distilled_loss_does_not_depend_on_processes_and_accumulation(found, kind):
    expected = found[0]["accumulation 1"]
    assert [each[kind]["world_size"] for each in found] == [1, 2, 2]
    for training in (each[kind] for each in found):
        assert len(training["losses"]) == STEPS
        # Losses are logged in float32.
        assert training["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert training["evaluations"] == pytest.approx(expected["evaluations"], rel=1e-5)
        for part in ("weights", "average"):
            for name, tensor in expected[part].items():
                torch.testing.assert_close(training[part][name], tensor, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_distilled_loss_of_a_model_that_knows_nothing(found, accumulation):
    """It is the share of the labels times ln(classes); the teacher knows nothing either, and adds nothing."""
    for each in found:
        first = each[f"zero {accumulation}"]["losses"][0]
        assert first == pytest.approx(0.75 * math.log(NUM_LABELS), rel=1e-6)


def test_every_rank_holds_the_same_average(found):
    one, other = (each["accumulation 1"]["weights"] for each in found[1:])
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_a_resume_on_two_processes_gives_back_every_bit(found):
    for each in found:
        for part in ("weights", "average"):
            one, other = each["resumed"][part], each["accumulation 2"][part]
            assert [name for name in one if not torch.equal(one[name], other[name])] == []
