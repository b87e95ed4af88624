"""The Pareto plot of a benchmark, drawn from its record and nothing else; a module that needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from .benchmark_tables import paper_figures
from .figures import STYLE
from .files import write_bytes
from .profiling import machine_name


# Dark to light would order what has no order: distinct hues, and a marker each for those who cannot tell them apart.
COLOURS = ("#4f5d75", "#1f6f9f", "#e07a1f", "#d1495b", "#3a7d44", "#7b4ea3", "#b08900", "#17808a")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# Latencies that lie further apart than this stand on a logarithmic axis.
WIDE = 4


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """
    Indices of the points (cost, gain) that no other one beats: none costs at most as much and gains at least as much,
    and is better in one of the two.
    """
    return [
        index
        for index, (cost, gain) in enumerate(points)
        if not any(
            other_cost <= cost and other_gain >= gain and (other_cost, other_gain) != (cost, gain)
            for other_cost, other_gain in points
        )
    ]


def draw_pareto(record: dict[str, Any], path: Path) -> bool:
    """
    Draw images per second against latency, a panel for what was measured side by side in one shape, data type and
    attention, a line a model over its batch sizes, the points that no other beats in a ring; beside it, for a shape
    that the paper has, images per second at the largest batch against the paper's accuracy. Returns whether there was
    anything to draw.
    """
    panels: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for group in record["groups"]:
        if "images_per_s" in group["models"][0]:
            names = tuple(model["name"] for model in group["models"])
            key = (group["shape"], group["dtype"], group["attention"], group["torch_compile"], names)
            panels.setdefault(key, []).append(group)
    if not panels:
        path.unlink(missing_ok=True)
        return False
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 0.6 + 4.2 * len(panels)), layout="constrained")
        grid = figure.subplots(len(panels), 2, squeeze=False)
        for (left, right), (key, groups) in zip(grid, panels.items(), strict=True):
            shape, dtype, attention, is_compiled, _ = key
            ordered = sorted(groups, key=lambda group: group["batch_size"])
            latency_panel(left, ordered)
            left.set_title(f"{shape}, {dtype}, {attention}{', compiled' if is_compiled else ''}")
            accuracy_panel(right, shape, ordered[-1])
        figure.suptitle(f"Speed on {machine_name(record['hardware'])}", x=0.01, ha="left", fontweight="bold")
        FigureCanvasAgg(figure)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=100, metadata={"Software": None})
    write_bytes(path, picture.getvalue())
    return True


def latency_panel(axes: Any, groups: list[dict[str, Any]]) -> None:
    """Images per second against milliseconds of a forward; every batch size is a point."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for group in groups:
        for model in group["models"]:
            lines.setdefault(model["name"], []).append((1e3 * model["latency_s"], model["images_per_s"]))
    for index, (name, points) in enumerate(lines.items()):
        style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
        axes.plot(*zip(*points, strict=True), lw=1.4, ms=5, label=name, **style)
    points = [point for line in lines.values() for point in line]
    front = [points[index] for index in pareto_front(points)]
    axes.plot(*zip(*front, strict=True), ls="", marker="o", ms=12, mfc="none", mec="#2b2d42", label="not beaten")
    axes.set(xlabel="latency of a forward (ms)", ylabel="images per second")
    axes.set_ylim(0, 1.08 * max(speed for _, speed in points))
    latencies = [latency for latency, _ in points]
    if max(latencies) > WIDE * min(latencies):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter("{x:g}")
    axes.grid()
    axes.legend(fontsize=8, loc="lower right")


def accuracy_panel(axes: Any, shape: str, group: dict[str, Any]) -> None:
    """Our images per second against the paper's accuracy, see [`~benchmark_tables.paper_figures`]."""
    shown = {}
    for index, model in enumerate(group["models"]):
        top1 = paper_figures(shape, model).get("top1")
        if top1 is not None:
            shown[index] = (model["name"], model["images_per_s"], top1)
    if not shown:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "The paper has no accuracy\nof these models.", ha="center", va="center")
        return
    for index, (name, speed, top1) in shown.items():
        style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
        axes.plot([speed], [top1], ls="", ms=7, label=name, **style)
    values = list(shown.values())
    # Fewer seconds an image is the cost, accuracy the gain.
    front = [values[index] for index in pareto_front([(1 / speed, top1) for _, speed, top1 in values])]
    speeds, accuracies = [speed for _, speed, _ in front], [top1 for _, _, top1 in front]
    axes.plot(speeds, accuracies, ls="", marker="o", ms=13, mfc="none", mec="#2b2d42", label="not beaten")
    axes.set(
        title=f"accuracy is the paper's, not measured here; batch {group['batch_size']}",
        xlabel="images per second (measured)",
        ylabel="top-1 % (paper)",
    )
    axes.margins(0.15, 0.3)
    axes.grid()
    axes.legend(fontsize=8)
