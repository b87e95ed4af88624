"""Parameters and MACs against METHOD's formulas; speed side by side."""

import csv
import getpass
import os
import platform
import socket
import time
from importlib import resources

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from hf_nose import NoseViTConfig, NoseViTForImageClassification, profiling
from hf_nose.profiling import compare_throughput, count_macs, count_parameters, hardware


HIDDEN_AND_HEADS = {"T": (192, 3), "S": (384, 6), "B": (768, 12)}
# METHOD section 8: exact parameter counts (millions, as many digits as it gives) of the published sets.
PUBLISHED = [
    ("T", [], 5.72),
    ("T", [0, 2, 4], 5.27),
    ("T", [0, 2, 4, 6], 5.12),
    ("S", [], 22.05),
    ("S", [0, 2, 4], 20.27),
    ("S", [0, 2, 4, 6], 19.68),
    ("S", [0, 1, 2, 3, 4], 19.09),
    ("B", [], 86.57),
    ("B", [0, 1, 3, 4, 6], 74.75),
    ("B", [0, 1, 3, 4, 6, 9], 72.38),
]
# The rows of published.csv for these sets (the paper rounds to one digit), by table and method.
PUBLISHED_GMACS = [
    ("8", "DeiT-T", "T", []),
    ("8", "NOSE 25%", "T", [0, 2, 4]),
    ("8", "NOSE 30%", "T", [0, 2, 4, 6]),
    ("8", "DeiT-S", "S", []),
    ("8", "NOSE 25%", "S", [0, 2, 4]),
    ("8", "NOSE 30%", "S", [0, 2, 4, 6]),
    ("8", "NOSE 40%", "S", [0, 1, 2, 3, 4]),
    ("1", "DeiT-B", "B", []),
    ("1", "NOSE 40%", "B", [0, 1, 3, 4, 6]),
]


def deit(size, config_class=NoseViTConfig, **fields):
    hidden, heads = HIDDEN_AND_HEADS[size]
    if config_class is NoseViTConfig:
        # The paper counts all tokens to the end.
        fields = {"class_token_tail": False, **fields}
    return config_class(
        hidden_size=hidden, num_attention_heads=heads, intermediate_size=4 * hidden, num_labels=1000, **fields
    )


def by_formula(size, removed, tokens=197):
    """METHOD section 8, a LayerNorm at 5 per element."""
    hidden, _ = HIDDEN_AND_HEADS[size]
    attention = 4 * tokens * hidden**2 + 2 * tokens**2 * hidden + 5 * tokens * hidden
    mlp = 8 * tokens * hidden**2 + 5 * tokens * hidden
    patches_and_head = (tokens - 1) * 3 * 16**2 * hidden + 1000 * hidden
    return (12 - len(removed)) * attention + 12 * mlp + patches_and_head + 5 * tokens * hidden


def published_gmacs(table, method, size):
    with (resources.files("hf_nose") / "assets" / "published.csv").open() as file:
        rows = [
            row for row in csv.DictReader(file) if row["table"] == table and row["setting"].startswith(f"DeiT-{size}")
        ]
    (value,) = [row["value"] for row in rows if row["method"] == method and row["metric"] == "gmacs"]
    return float(value)


@pytest.mark.parametrize(("size", "millions"), [("T", 5.717), ("S", 22.051), ("B", 86.568)])
def test_parameters_and_macs_of_stock_vit(size, millions):
    config = deit(size, ViTConfig)
    with torch.device("meta"):
        model = ViTForImageClassification(config)
    assert round(count_parameters(model) / 1e6, 3) == millions
    assert count_macs(config)["total"] == count_macs(model)["total"] == by_formula(size, [])


@pytest.mark.parametrize(("size", "removed", "millions"), PUBLISHED)
def test_parameters_and_macs_with_removed_layers(size, removed, millions):
    config = deit(size, removed_attention_layers=removed)
    with torch.device("meta"):
        model = NoseViTForImageClassification(config)
    assert round(count_parameters(model) / 1e6, 2) == millions
    macs = count_macs(config)
    assert macs["total"] == by_formula(size, removed)
    for layer in range(12):
        named = [name for name in macs["by_module"] if f"layers.{layer}.attention" in name]
        assert len(named) == (0 if layer in removed else 5)


@pytest.mark.parametrize(("table", "method", "size", "removed"), PUBLISHED_GMACS)
def test_macs_reproduce_the_published_rows(table, method, size, removed):
    gmacs = count_macs(deit(size, removed_attention_layers=removed))["total"] / 1e9
    assert round(gmacs, 1) == published_gmacs(table, method, size)


def test_published_row_that_is_known_not_to_be_reproduced():
    gmacs = count_macs(deit("B", removed_attention_layers=[0, 1, 3, 4, 6, 9]))["total"] / 1e9
    assert (round(gmacs, 2), published_gmacs("1", "NOSE 50%", "B")) == (14.43, 14.5)


def small_model(**fields):
    config = NoseViTConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=2,
        num_labels=10,
        **fields,
    )
    return NoseViTForImageClassification(config)


def test_macs_count_what_is_computed():
    model = small_model()
    dense = count_macs(model)
    model.dilute([1])
    assert count_macs(model)["total"] == dense["total"]
    model.set_mask(0.0)
    off = count_macs(model)
    assert set(dense["by_module"]) - set(off["by_module"]) == {
        f"vit.layers.1.{name}"
        for name in ("layernorm_before", "attention", *(f"attention.{letter}_proj" for letter in "qkvo"))
    }
    assert off["total"] == count_macs(small_model(removed_attention_layers=[1]))["total"] < dense["total"]


def test_macs_do_not_depend_on_chunks_or_attention_implementation():
    dense = count_macs(small_model())["total"]
    assert count_macs(small_model(chunk_size_feed_forward=5))["total"] == dense
    assert count_macs(small_model(attn_implementation="eager"))["total"] == dense


def test_macs_at_another_image_size():
    small, large = count_macs(small_model())["by_module"], count_macs(small_model(), image_size=(8, 16))["by_module"]
    assert small["vit.layers.0.attention"] == 2 * 17**2 * 16
    assert large["vit.layers.0.attention"] == 2 * 33**2 * 16
    assert count_macs(small_model(), image_size=8)["by_module"] == small


def test_counting_leaves_the_model_alone():
    model = small_model().to(torch.bfloat16).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    count_macs(model)
    assert model.training
    assert all(not module._forward_hooks for name, module in model.named_modules() if name.endswith("_proj"))
    for name, value in model.state_dict().items():
        assert value.device.type == "cpu" and torch.equal(value, before[name])


def test_macs_refuse_a_model_with_nothing_to_count():
    class Empty(nn.Module):
        config = ViTConfig(image_size=8, patch_size=2)

        def forward(self, pixel_values):
            return pixel_values

    with pytest.raises(ValueError, match="config_or_model: Empty has no Linear"):
        count_macs(Empty())


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
    assert results["A"]["ratio_to_first"] == 1.0
    assert results["B"]["ratio_to_first"] == pytest.approx(1 / 3, rel=0.2)
    for result in results.values():
        lower, upper = result["quartiles"]
        assert lower <= result["images_per_s"] <= upper


def test_throughput_statistics(monkeypatch):
    seconds = iter([1.0, 2.0, 2.0, 1.0, 4.0, 8.0, 1.0, 1.0])
    monkeypatch.setattr(profiling, "_clock_seconds", lambda model, batch: next(seconds))
    results = compare_throughput({"A": nn.Identity(), "B": nn.Identity()}, torch.zeros(8, 3, 2, 2), rounds=3, warmup=1)
    # The warm-up round (1.0, 2.0) is not counted: rates A 4, 2, 8 and B 8, 1, 8; ratios 2, 0.5, 1.
    assert results["A"] == {"images_per_s": 4.0, "quartiles": [3.0, 6.0], "ratio_to_first": 1.0}
    assert results["B"] == {"images_per_s": 8.0, "quartiles": [4.5, 8.0], "ratio_to_first": 1.0}


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_throughput_on_cuda():
    model = small_model().cuda()
    results = compare_throughput({"A": model, "B": model}, torch.zeros(8, 3, 8, 8, device="cuda"))
    assert results["B"]["ratio_to_first"] == pytest.approx(1.0, abs=0.3)
    assert hardware("cuda")["accelerator"] == torch.cuda.get_device_name()


def test_hardware_tells_the_machine_but_not_whose_it_is():
    record = hardware(dtype=torch.bfloat16)
    assert list(record) == [
        "device",
        "accelerator",
        "processor",
        "system",
        "cores",
        "threads",
        "dtype",
        "float32_precision",
    ]
    assert (record["device"], record["accelerator"], record["dtype"]) == ("cpu", None, "bfloat16")
    assert record["threads"] == torch.get_num_threads() and record["cores"] >= 1 and record["processor"]
    words = set(repr(record).replace("'", " ").replace(",", " ").split())
    assert not words & {socket.gethostname(), platform.node(), getpass.getuser(), os.getcwd(), os.path.expanduser("~")}
