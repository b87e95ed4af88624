"""Speed side by side: an injected sleep is reported by that much, a drifting clock is not; "not faster" in words."""

import random
import statistics
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hf_nose.devices import choose_device, stopwatch
from hf_nose.timing import compare_throughput, interleaved, median_interval, summarised, verdict


class Timed(nn.Module):
    """Sleeps as long as it is told and writes down when it was called, in which state."""

    def __init__(self, name, seconds, calls):
        super().__init__()
        self.name, self.seconds, self.calls = name, seconds, calls

    def forward(self, pixel_values):
        self.calls.append((self.name, self.training, torch.is_inference_mode_enabled(), tuple(pixel_values.shape)))
        time.sleep(self.seconds)


def test_throughput_interleaves_and_restores_the_modes():
    calls = []
    models = {name: Timed(name, 0.0, calls) for name in "AB"}
    models["B"].eval()
    compare_throughput(models, torch.zeros(4, 3, 8, 8), rounds=3, warmup=2)
    assert [name for name, *_ in calls] == ["A", "B"] * 5
    assert {call[1:] for call in calls} == {(False, True, (4, 3, 8, 8))}
    assert (models["A"].training, models["B"].training) == (True, False)


def test_throughput_reports_an_injected_sleep():
    models = {"A": Timed("A", 0.02, []), "B": Timed("B", 0.06, [])}
    results = compare_throughput(models, torch.zeros(8, 3, 8, 8), rounds=7, warmup=1)
    assert list(results) == ["A", "B"]
    # A sleep may last longer than asked, by little and never shorter.
    assert 0.75 * 400 < results["A"]["images_per_s"] <= 400
    assert 0.75 * 133 < results["B"]["images_per_s"] <= 134
    assert results["B"]["latency_s"] - results["A"]["latency_s"] == pytest.approx(0.04, abs=0.01)
    assert results["A"]["ratio_to_first"] == 1.0
    assert results["B"]["ratio_to_first"] == pytest.approx(1 / 3, rel=0.2)
    assert verdict(results["B"]["ratio_interval"]) == "not faster: slower"
    for result in results.values():
        lower, upper = result["quartiles"]
        assert lower <= result["images_per_s"] <= upper


class Machine:
    """A simulated clock and a simulated machine: work takes `seconds x slowness(now)` of its time."""

    def __init__(self, slowness):
        self.now, self.slowness = 0.0, slowness

    def model(self, seconds):
        def forward(batch):
            self.now += seconds * self.slowness(self.now)

        module = nn.Identity()
        module.forward = forward
        return module

    def watch(self):
        return stopwatch(torch.device("cpu"), clock=lambda: self.now)


@pytest.mark.parametrize(
    "slowness",
    [
        lambda now: 1 + now / 60,  # gets hot: three times as slow in the end
        lambda now: 3 / (1 + now / 30),  # the neighbour goes home
        lambda now: 1.0 if now % 40 < 20 else 2.5,  # a neighbour that comes and goes
        lambda now: 10.0 if 30 < now < 36 else 1.0,  # a hiccup
    ],
)
def test_interleaving_cancels_a_drifting_clock(slowness):
    machine = Machine(slowness)
    models = {"A": machine.model(1.3), "B": machine.model(1.0)}
    results = compare_throughput(models, torch.zeros(4, 3, 2, 2), rounds=40, warmup=2, watch=machine.watch())
    assert results["B"]["ratio_to_first"] == pytest.approx(1.3, rel=0.03)
    assert verdict(results["B"]["ratio_interval"]) == "faster"


def test_one_after_the_other_would_not_have_cancelled_it():
    """Otherwise the test above would show nothing."""
    machine = Machine(lambda now: 1 + now / 60)
    watch, batch = machine.watch(), torch.zeros(4, 3, 2, 2)
    blocks = {}
    for name, seconds in (("A", 1.3), ("B", 1.0)):
        model = machine.model(seconds)
        blocks[name] = statistics.median(watch(lambda model=model: model(batch)) for _ in range(40))
    assert blocks["A"] / blocks["B"] < 0.8


def test_the_same_model_twice_is_not_faster_under_noise():
    """Twelve comparisons of a model with itself, on a noisy machine: at most a few lie outside of 95 %."""
    draw = random.Random(0)
    machine = Machine(lambda now: draw.lognormvariate(0, 0.1))
    models = {f"{number}": machine.model(1.0) for number in range(13)}
    results = compare_throughput(models, torch.zeros(1, 3, 2, 2), rounds=31, watch=machine.watch())
    words = [verdict(result["ratio_interval"]) for name, result in results.items() if name != "0"]
    assert words.count("not faster: no difference shown") >= 10


def test_warm_up_is_not_counted():
    machine = Machine(lambda now: 100.0 if now < 400 else 1.0)
    results = compare_throughput(
        {"A": machine.model(2.0), "B": machine.model(1.0)},
        torch.zeros(8, 3, 2, 2),
        rounds=3,
        warmup=2,
        watch=machine.watch(),
    )
    assert (results["A"]["images_per_s"], results["B"]["images_per_s"]) == (4.0, 8.0)


def test_statistics():
    results = summarised({"A": [2.0, 4.0, 1.0], "B": [1.0, 8.0, 1.0]}, 8)
    # Rates A 4, 2, 8 and B 8, 1, 8; ratios 2, 0.5, 1.
    assert results["A"] == {
        "images_per_s": 4.0,
        "quartiles": [3.0, 6.0],
        "latency_s": 2.0,
        "latency_quartiles": [1.5, 3.0],
        "ratio_to_first": 1.0,
        "ratio_quartiles": [1.0, 1.0],
        "ratio_interval": [1.0, 1.0],
        "seconds": [2.0, 4.0, 1.0],
    }
    assert results["B"] == {
        "images_per_s": 8.0,
        "quartiles": [4.5, 8.0],
        "latency_s": 1.0,
        "latency_quartiles": [1.0, 4.5],
        "ratio_to_first": 1.0,
        "ratio_quartiles": [0.75, 1.5],
        "ratio_interval": [0.5, 2.0],
        "seconds": [1.0, 8.0, 1.0],
    }


@pytest.mark.parametrize(
    ("count", "rank"),
    # Ranks of the 95 % sign-test interval, from tables of the binomial distribution (Conover, table A3).
    [(2, 1), (5, 1), (6, 1), (8, 1), (9, 2), (15, 4), (20, 6), (30, 10)],
)
def test_interval_of_a_median_is_the_sign_test_s(count, rank):
    values = list(range(1, count + 1))
    random.Random(1).shuffle(values)
    assert median_interval(values) == (rank, count + 1 - rank)


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=40))
def test_interval_holds_the_median(values):
    lower, upper = median_interval(values)
    assert min(values) <= lower <= statistics.median(values) <= upper <= max(values)


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        ((1.01, 1.2), "faster"),
        ((1.0, 1.2), "not faster: no difference shown"),
        ((0.9, 1.2), "not faster: no difference shown"),
        ((0.9, 1.0), "not faster: no difference shown"),
        ((0.8, 0.99), "not faster: slower"),
    ],
)
def test_not_faster_in_words(interval, words):
    assert verdict(interval) == words


def test_throughput_restores_the_modes_after_a_failure():
    class Broken(nn.Module):
        def forward(self, pixel_values):
            raise RuntimeError("broken")

    models = {"A": nn.Identity(), "B": Broken()}
    with pytest.raises(RuntimeError, match="broken"):
        compare_throughput(models, torch.zeros(1, 3, 2, 2))
    assert all(model.training for model in models.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"models": {}}, "models must hold at least one"),
        ({"rounds": 1}, "rounds must be at least 2"),
        ({"warmup": -1}, "warmup must be 0 or more"),
    ],
)
def test_throughput_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        compare_throughput(**{"models": {"A": nn.Identity()}, "batch": torch.zeros(1, 3, 2, 2), **arguments})


def test_every_round_runs_all_in_order():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ABC"}
    seconds = interleaved(calls, rounds=2, warmup=1, watch=stopwatch(torch.device("cpu")))
    assert order == list("ABC") * 3 and {name: len(values) for name, values in seconds.items()} == dict.fromkeys(
        "ABC", 2
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_throughput_on_cuda():
    model = nn.Linear(1024, 1024).cuda()
    results = compare_throughput({"A": model, "B": model}, torch.zeros(4096, 1024, device="cuda"))
    assert results["B"]["ratio_to_first"] == pytest.approx(1.0, abs=0.3)


def test_a_device_that_is_not_there():
    absent = [
        name
        for name, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()))
        if not there
    ]
    for name in [*absent, "tpu"]:
        with pytest.raises(ValueError, match=f"device '{name}' is not there; found .*'cpu'"):
            choose_device(name)
    assert choose_device("cpu") == torch.device("cpu")
