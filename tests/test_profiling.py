"""Parameters and MACs against METHOD's formulas; what a number was measured on."""

import csv
import getpass
import os
import platform
import socket
from importlib import resources

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from hf_nose import NoseViTConfig, NoseViTForImageClassification
from hf_nose.profiling import count_macs, count_parameters, hardware, macs_by_part
from hf_nose.shapes import formula_macs


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


def test_macs_by_part():
    found = count_macs(deit("T", removed_attention_layers=[2]))
    parts = macs_by_part(found["by_module"])
    tokens, width = 197, 192
    assert sum(parts.values()) == found["total"]
    assert parts["attention"] == 11 * (4 * tokens * width**2 + 2 * tokens**2 * width)
    assert parts["mlp"] == 12 * 8 * tokens * width**2
    # Two norms a block, one where attention is gone, and the last.
    assert parts["norms"] == (11 * 2 + 1 + 1) * 5 * tokens * width
    assert parts["embeddings"] == 196 * 3 * 16**2 * width and parts["head"] == width * 1000


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


class ClassTokenOnly(NoseViTForImageClassification):
    """Carries nothing but the class token through its last block, unless hidden states are asked for."""

    def forward(self, pixel_values, output_hidden_states=False):
        tokens = self.vit.embeddings(pixel_values)
        for block in self.vit.layers:
            is_tail = block.layer == 2 and not output_hidden_states
            tokens = block(tokens[:, :1] if is_tail else tokens)
        return self.classifier(self.vit.layernorm(tokens)[:, 0])


def test_macs_as_published_and_as_computed():
    model = ClassTokenOnly(small_model(removed_attention_layers=[2]).config)
    published, computed = count_macs(model), count_macs(model, class_token_tail=True)
    assert published == count_macs(small_model(removed_attention_layers=[2]))
    # 16 of 17 tokens of width 16 less, in an MLP of width 32 and two LayerNorms.
    assert published["total"] - computed["total"] == 16 * (2 * 16 * 32 + 2 * 5 * 16)
    assert computed["by_module"]["vit.layers.1.attention"] == published["by_module"]["vit.layers.1.attention"]


@pytest.mark.parametrize("removed", [[], [0, 1, 3, 4, 6], [10, 11]])
def test_macs_with_the_tail_are_the_formula_s(removed):
    config = deit("T", removed_attention_layers=removed)
    assert count_macs(config, class_token_tail=True)["total"] == formula_macs(config, class_token_tail=True)


def test_a_stock_vit_has_no_tail():
    config = deit("T", ViTConfig)
    assert count_macs(config, class_token_tail=True) == count_macs(config)


def test_macs_of_fused_projections():
    model = small_model(removed_attention_layers=[1])
    before = {tail: count_macs(model, class_token_tail=tail) for tail in (False, True)}
    model.fuse_qkv_projections()
    assert {tail: count_macs(model, class_token_tail=tail) for tail in (False, True)} == before
    assert model.vit.layers[0].attention.qkv_weight is not None


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
