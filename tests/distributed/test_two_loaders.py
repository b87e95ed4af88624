"""Two processes, as torchrun really starts them: which images they are fed, counted."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from made_data import numbers, write_numbered
from test_two_processes import on_two
from two_loaders import BATCH_SIZE, COUNTS, EPOCHS, KINDS, STOP, WORKERS, accumulate


pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parent
SHARDS = 3


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What either rank was fed."""
    folder = tmp_path_factory.mktemp("two")
    for count in COUNTS.values():
        write_numbered(folder / str(count), train=count, evaluation=4, shards=SHARDS)
    code, output = on_two(HERE / "two_loaders.py", folder, folder=folder)
    assert code == 0, output
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def steps_of(two, name, workers, epoch):
    """The numbers that either rank was fed in each of the three steps of an epoch."""
    batches = [found["counted"][name, workers] for found in two]
    assert all(sorted(found) == [(step, 0) for step in range(3 * EPOCHS)] for found in batches)
    return [[numbers(found[step, 0]) for found in batches] for step in range(3 * epoch, 3 * epoch + 3)]


@pytest.mark.parametrize("epoch", range(EPOCHS))
@pytest.mark.parametrize("workers", WORKERS)
def test_every_image_comes_exactly_once_where_they_divide(two, workers, epoch):
    steps = steps_of(two, "divides", workers, epoch)
    assert [[len(batch) for batch in step] for step in steps] == [[BATCH_SIZE, BATCH_SIZE]] * 3
    assert sorted(sum(sum(steps, []), [])) == list(range(24))


@pytest.mark.parametrize("epoch", range(EPOCHS))
@pytest.mark.parametrize("workers", WORKERS)
def test_one_image_comes_twice_where_they_do_not_and_only_to_fill_the_last_batch(two, workers, epoch):
    assert COUNTS["does not divide"] % 2 == SHARDS % 2 == 1
    steps = steps_of(two, "does not divide", workers, epoch)
    assert [[len(batch) for batch in step] for step in steps] == [[BATCH_SIZE, BATCH_SIZE]] * 3
    counted = Counter(sum(sum(steps, []), []))
    assert sorted(counted) == list(range(23))
    assert sorted(counted.values()) == [1] * 22 + [2]
    # Without the last image of the last rank's last batch nothing comes twice.
    (repeated,) = [number for number, times in counted.items() if times == 2]
    assert steps[-1][-1][-1] == repeated


@pytest.mark.parametrize("name", COUNTS)
def test_neither_workers_nor_epochs_before_change_what_comes(two, name):
    for epoch in range(EPOCHS):
        assert steps_of(two, name, 0, epoch) == steps_of(two, name, 2, epoch)
    assert steps_of(two, name, 0, 0) != steps_of(two, name, 0, 1)


def test_accumulating_on_two_processes_is_training_on_one(two, tmp_path):
    """The same images in every global batch, the same loss, and after ten steps of SGD the same weights."""
    write_numbered(tmp_path / "24", train=24, evaluation=4, shards=SHARDS)
    alone = accumulate(tmp_path, batch_size=4)
    ranks = [found["accumulated"] for found in two]
    for step in range(10):
        fed = [numbers(found["batches"][step, micro_step]) for found in ranks for micro_step in range(2)]
        expected = [numbers(alone["batches"][step, micro_step]) for micro_step in range(2)]
        assert [len(batch) for batch in fed] == [2] * 4 and [len(batch) for batch in expected] == [4] * 2
        assert sorted(sum(fed, [])) == sorted(sum(expected, []))
    for found in ranks:
        assert found["losses"][0] == pytest.approx(alone["losses"][0], abs=1e-6)
        assert len(found["losses"]) == 10
        for name, tensor in alone["weights"].items():
            torch.testing.assert_close(found["weights"][name], tensor, rtol=0, atol=1e-6, msg=name)


def test_images_must_fill_a_batch_of_both_processes(two):
    for found in two:
        assert "have 23 images, fewer than the 24 of one batch, all processes together" in found["refusal"]


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_resumed_in_their_second_epoch_see_the_same_and_end_alike(two, kind, workers):
    for never, resumed in (found["resumed"][kind, workers] for found in two):
        assert sorted(resumed["batches"]) == [(step, 0) for step in range(STOP - 1, 8)]
        for place, pixel_values in resumed["batches"].items():
            assert torch.equal(pixel_values, never["batches"][place]), place
        assert never["weights"].keys() == resumed["weights"].keys()
        for name, tensor in never["weights"].items():
            assert torch.equal(tensor, resumed["weights"][name]), name
        assert resumed["epoch"] == never["epoch"] == pytest.approx(2 + 2 / 3)
