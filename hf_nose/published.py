"""The paper's figures and the names that go with them, from the project's one copy of its tables."""

from __future__ import annotations

import csv
from functools import cache
from importlib import resources
from typing import Any, NamedTuple


class Published(NamedTuple):
    """Where the figures of one base model stand in the paper, and how its compressed ones are called there."""

    size: str
    # As `shapes.SHAPES` calls it.
    shape: str
    table: str
    setting: str
    dense: str
    compressed: dict[int, str]


IMAGENET = "ILSVRC/imagenet-1k"
# By the id of the base model: the methods by how many of its 12 attention layers they remove.
BASES = {
    "facebook/deit-base-patch16-224": Published(
        "b", "deit-base", "1", "DeiT-B ImageNet-1k V100-32GB batch 128", "DeiT-B", {5: "NOSE 40%", 6: "NOSE 50%"}
    ),
    "facebook/deit-small-patch16-224": Published(
        "s",
        "deit-small",
        "8",
        "DeiT-S ImageNet-1k RTX3090 batch 256",
        "DeiT-S",
        {3: "NOSE 25%", 4: "NOSE 30%", 5: "NOSE 40%"},
    ),
    "facebook/deit-tiny-patch16-224": Published(
        "t", "deit-tiny", "8", "DeiT-T ImageNet-1k RTX3090 batch 256", "DeiT-T", {3: "NOSE 25%", 4: "NOSE 30%"}
    ),
}
HEAD_SIZE, NUM_BLOCKS = 64, 12
# The paper's ratios are nominal: N = round(ratio x blocks).
NOMINAL_PERCENT = (25, 30, 40, 50, 75)


@cache
def rows() -> list[dict[str, str]]:
    """Every number of the paper's tables: table, setting, method, metric, value."""
    text = (resources.files("hf_nose") / "assets" / "published.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def figures(table: str, setting: str, method: str) -> dict[str, str]:
    """The figures of one method by their metric, as printed."""
    key = (table, setting, method)
    return {row["metric"]: row["value"] for row in rows() if (row["table"], row["setting"], row["method"]) == key}


def published_figures(base_model_id: str | None, dataset_id: str | None, num_removed: int) -> dict[str, Any] | None:
    """
    The paper's figures for a base model without `num_removed` attention layers: `table`, `setting`, and by metric
    those of the `dense` model and the `compressed` one. `None` where the paper has none.
    """
    if dataset_id != IMAGENET or base_model_id not in BASES or num_removed not in BASES[base_model_id].compressed:
        return None
    base = BASES[base_model_id]
    return {
        "table": base.table,
        "setting": base.setting,
        "dense": figures(base.table, base.setting, base.dense),
        "compressed": figures(base.table, base.setting, base.compressed[num_removed]),
    }


def shape_figures(shape: str, num_removed: int) -> dict[str, float]:
    """
    The paper's figures of a named shape with so many layers removed, by the metrics of published.csv (`gmacs`,
    `params_m`, `images_per_s`, `images_in_10gb`, `top1`, ...); empty where the paper has no such row.
    """
    for base in BASES.values():
        method = {0: base.dense, **base.compressed}.get(num_removed)
        if base.shape == shape and method is not None:
            return {metric: float(value) for metric, value in figures(base.table, base.setting, method).items()}
    return {}


def shape_setting(shape: str) -> str:
    """What the paper's figures of a named shape were measured on."""
    return next(base.setting for base in BASES.values() if base.shape == shape)


def checkpoint_name(base_model_id: str, num_removed: int, num_blocks: int = NUM_BLOCKS) -> str:
    """The name that repository, card and recipe share, such as `deit-b-nose40`."""
    nominal = [percent for percent in NOMINAL_PERCENT if round(percent / 100 * num_blocks) == num_removed]
    percent = nominal[0] if nominal else round(100 * num_removed / num_blocks)
    return f"deit-{BASES[base_model_id].size}-nose{percent}"
