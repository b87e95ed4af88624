"""Batches dealt, findings merged."""

from collections.abc import Sequence

import pytest
import torch
from process_pair import run_on_two

from hf_nose.entropy import Moments
from hf_nose.processes import deal, merge_across_processes


class Counted(Sequence):
    """Batches that note which of them were built."""

    def __init__(self, count: int):
        self.count = count
        self.built: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < self.count:
            raise IndexError(index)
        self.built.append(index)
        return f"batch {index}"


@pytest.mark.parametrize("kind", [Counted, lambda count: (f"batch {index}" for index in range(count))])
@pytest.mark.parametrize("count", [0, 1, 4, 7])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_whole_batches_are_dealt_in_turn_and_once(kind, count, world_size):
    hands = [list(deal(kind(count), rank, world_size)) for rank in range(world_size)]
    assert sorted(pair for hand in hands for pair in hand) == [(index, f"batch {index}") for index in range(count)]
    for rank, hand in enumerate(hands):
        assert [number for number, _ in hand] == list(range(rank, count, world_size))


def test_of_a_sequence_a_rank_builds_only_its_own():
    batches = Counted(5)
    list(deal(batches, 1, 2))
    assert batches.built == [1, 3]


def test_one_process_merges_into_fresh_values():
    found = {"a": Moments().update(torch.randn(3, 2)), "b": Moments()}
    merged = merge_across_processes(found, Moments)
    assert list(merged) == ["a", "b"] and merged["a"] is not found["a"]
    assert torch.equal(merged["a"].m2, found["a"].m2) and merged["b"].count == 0


def merge_on_rank(rank: int, world_size: int) -> dict:
    return merge_across_processes({"a": Moments().update(torch.tensor([[float(rank)]]))}, Moments)


@pytest.mark.slow
def test_two_processes_hold_the_same(tmp_path):
    first, second = run_on_two(merge_on_rank, tmp_path)
    assert first["a"].count == second["a"].count == 2
    assert first["a"].mean.tolist() == second["a"].mean.tolist() == [0.5]
    assert first["a"].std().tolist() == second["a"].std().tolist() == [0.5]
