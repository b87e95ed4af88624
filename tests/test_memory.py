"""How many images fit: the search against counting, the peaks against what a forward must hold, and bad budgets."""

import os
from mmap import PAGESIZE, mmap

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_nose.contenders import Contender
from hf_nose.memory import check_budget, images_in_budget, parse_bytes, probe
from hf_nose.memory_probe import largest_batch, peak_bytes, reset_peak, resident_bytes


CPU = torch.device("cpu")
MIB = 2**20
DENSE = Contender("dense", "deit-tiny", "nose")
CHUNKED = Contender("dense chunked", "deit-tiny", "nose", (), 394, 2)


@given(st.integers(0, 1000), st.integers(1, 100), st.integers(0, 60_000), st.integers(1, 40), st.floats(1.0, 1.3))
def test_the_search_finds_what_counting_finds(weights, an_image, budget, first, bend):
    tried = []

    def peak_at(images):
        tried.append(images)
        return int(weights + an_image * images**bend)

    found = largest_batch(peak_at, budget, first, weights)
    images = 0
    while (
        weights + an_image * (images + 1) ** bend < budget + 1
        and int(weights + an_image * (images + 1) ** bend) <= budget
    ):
        images += 1
    assert found == images
    assert len(set(tried)) == len(tried) and min(tried) >= 1


@given(st.integers(1, 5000), st.integers(1, 40))
def test_the_search_needs_no_figures_from_a_device_that_refuses(fits, first):
    tried = []

    def peak_at(images):
        tried.append(images)
        return 1000 if images <= fits else None

    assert largest_batch(peak_at, 1000, first, 0) == fits
    assert max(tried) <= max(first, 4 * fits)
    assert len(tried) < 40


def test_the_search_takes_few_forwards_where_memory_is_a_line():
    tried = []

    def peak_at(images):
        tried.append(images)
        # 330 MiB of weights, 7.9 MiB an image, and some noise.
        return int((330 + 7.9 * images + 0.5 * (images % 3)) * MIB)

    assert largest_batch(peak_at, 1024 * MIB, 8, 330 * MIB) == 87
    assert len(tried) <= 6 and max(tried) <= 100


@given(st.integers(9, 400), st.lists(st.floats(0, 8), min_size=8, max_size=8))
def test_the_search_hardly_passes_the_budget(fits, noise):
    """Else it would be killed where the budget is what the machine has: memory is taken before it is measured."""
    tried = []

    def peak_at(images):
        tried.append(images)
        # 330 MiB of weights, 20 of scratch memory, 7.9 an image, and a few more or less.
        return int((330 + 20 + 7.9 * images + noise[len(tried) % 8]) * MIB)

    budget = int((350 + 7.9 * fits) * MIB)
    found = largest_batch(peak_at, budget, 8, 330 * MIB)
    assert fits - 2 <= found <= fits
    assert 350 + 7.9 * max(tried) < 1.15 * budget / MIB


def test_a_search_that_takes_too_long_says_what_to_do(monkeypatch):
    monkeypatch.setattr("hf_nose.memory.PROBE_SECONDS", 0.01)
    with pytest.raises(RuntimeError, match="memory of dense took longer than 0.01 seconds: give a smaller"):
        probe(DENSE, 1, CPU, "float32", "sdpa", 1)


def test_a_peak_measured_wrongly_does_not_fill_the_machine():
    tried = []

    def peak_at(images):
        tried.append(images)
        # Eight and thirty-two images look alike: the line through them never meets the budget.
        return 1000 + (images if images > 32 else images // 8)

    assert largest_batch(peak_at, 3000, 8, 1000) == 2000
    assert all(guess <= 4 * max(tried[:number]) for number, guess in enumerate(tried) if number)


def test_nothing_fits():
    assert largest_batch(lambda images: 2000, 1000, 8, 500) == 0
    assert largest_batch(lambda images: None, 1000, 1, 500) == 0


def test_the_peak_is_of_this_process_and_since_the_reset():
    """getrusage's maximum would keep what was before, and what the parent had."""
    reset_peak()
    start = resident_bytes()
    # Pages of its own: malloc would take a freed chunk of the heap that is still resident.
    with mmap(-1, 40 * MIB) as block:
        for page in range(0, len(block), PAGESIZE):
            block[page] = 1
    high = peak_bytes()
    assert 39 * MIB < high - start < 60 * MIB
    reset_peak()
    assert peak_bytes() < high - 30 * MIB


def in_a_forward(contender, images):
    """Megabytes beyond the weights at the peak of a forward, in a process that has held nothing else."""
    found = probe(contender, images, CPU, "float32", "sdpa", 1)
    assert found["allocated_bytes"] is found["reserved_bytes"] is None
    return (found["peak_bytes"] - contender.weights_bytes(torch.float32)) / MIB


@pytest.mark.slow
def test_a_forward_holds_its_input_its_tokens_and_in_slices_far_fewer():
    tokens = 197 * 192 * 4 / MIB
    image = 3 * 224**2 * 4 / MIB
    whole, sliced = in_a_forward(DENSE, 48), in_a_forward(CHUNKED, 48)
    # The MLP alone: what goes in and stays, the normed, and four times that before and behind the activation.
    # And a few megabytes whatever the batch: kernels that load when they are first used, pages that are huge.
    spare = 16
    assert 48 * (image + 10 * tokens) < whole < 48 * (image + 20 * tokens) + spare
    assert 48 * (image + 2 * tokens) < sliced < 48 * (image + 6 * tokens) + spare
    assert whole > 1.8 * sliced


@pytest.mark.slow
def test_a_fresh_process_measures_the_same_however_large_this_one_is():
    ballast = torch.ones(400 * MIB // 4)
    found = probe(DENSE, 16, CPU, "float32", "sdpa", 1)
    assert float(ballast[0]) == 1.0
    weights = DENSE.weights_bytes(torch.float32)
    assert weights + 16 * 3 * 224**2 * 4 < found["peak_bytes"] < weights + 120 * MIB


@pytest.mark.slow
def test_images_in_a_budget():
    budget = 64 * MIB
    found = images_in_budget(CHUNKED, budget, CPU, "float32", "sdpa", 1)
    weights = CHUNKED.weights_bytes(torch.float32)
    assert found["weights_bytes"] == weights and found["peak_bytes"] <= budget
    assert found["bytes_per_image"] == (found["peak_bytes"] - weights) / found["images"]
    # 0.6 MiB of pixels and at least 0.3 of tokens an image, in the 42 MiB that are left.
    assert 10 <= found["images"] <= 45


@pytest.mark.slow
def test_a_process_that_fails_says_why():
    with pytest.raises(RuntimeError, match="Measuring the memory of lost failed: .*nowhere"):
        probe(Contender("lost", "./nowhere", "nose"), 1, CPU, "float32", "sdpa", 1)


@pytest.mark.parametrize(
    ("text", "size"),
    [("10GB", 10**10), ("10 GiB", 10 * 2**30), ("1.5MiB", 3 * 2**19), (" 512kB ", 512_000), ("1KiB", 1024)],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["10", "GB", "-1GB", "0GB", "1TB", "1e3MB", "10gb", "ten GB", "", "1..5GB"])
def test_sizes_refused(text):
    with pytest.raises(ValueError, match="memory_budget must be a positive size such as 10GB"):
        parse_bytes(text)


def test_a_budget_smaller_than_the_weights():
    weights = DENSE.weights_bytes(torch.float32)
    for budget in (weights, weights // 2):
        with pytest.raises(
            ValueError, match="memory_budget must be larger than the weights: dense in float32 has 21.8"
        ):
            check_budget(budget, DENSE, "float32", CPU)
    # Half as large.
    check_budget(weights // 2 + 1, DENSE, "bfloat16", CPU)


def test_a_budget_that_the_machine_does_not_have():
    there = psutil.virtual_memory().total
    with pytest.raises(ValueError, match="memory_budget must be at most what cpu has free"):
        check_budget(2 * there, DENSE, "float32", CPU)


def test_memory_is_not_measured_where_it_cannot_be():
    with pytest.raises(ValueError, match="Peak memory is measured on cuda, and on cpu under Linux, not on mps"):
        probe(DENSE, 1, torch.device("mps"), "float32", "sdpa", 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_allocator_is_held_to_the_budget():
    budget = 256 * MIB
    found = images_in_budget(DENSE, budget, torch.device("cuda"), "float32", "sdpa", os.cpu_count())
    assert found["images"] > 10 and found["allocated_bytes"] <= found["reserved_bytes"] <= budget
