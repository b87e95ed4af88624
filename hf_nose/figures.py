"""Figures of a run, drawn from its saved JSON files and nothing else."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .files import write_bytes
from .records import Records, read_records


INK, GRID = "#2b2d42", "#e6e8ec"
ATTENTION, MLP = "#1f6f9f", "#e07a1f"
COLOURS = {"dense": "#8d99ae", "dense_control": "#4f5d75", "compressed": "#d1495b"}
LINES = {name: {"lw": 1.8, "ls": "--" if name == "dense_control" else "-"} for name in COLOURS}
MARKERS: dict[str, dict[str, Any]] = {"mask": {}, "loss": {}, "eval_top1": {"marker": "o", "ms": 4}}
MODEL_NAMES = {"dense": "dense", "dense_control": "dense, trained on", "compressed": "compressed"}
STYLE: Any = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK) | {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "legend.frameon": False,
}


def draw_figures(folder: str | os.PathLike[str]) -> list[Path]:
    """
    Draw `figures/{entropy,trajectory,training,comparison}.png` of a run's folder, each from the JSON files it needs.

    A figure whose files are not there is left out, and one that an earlier run had left is removed: pictures always
    belong to the JSON beside them. Each file appears whole or not at all. Returns the paths of those drawn.

    Raises:
        ValueError: from [`files.read_json`], where a file is corrupt or newer than this code.
    """
    records = read_records(folder)
    target = Path(folder) / "figures"
    target.mkdir(exist_ok=True)
    drawn = []
    for name, draw in FIGURES.items():
        path = target / f"{name}.png"
        with matplotlib.rc_context(STYLE):
            figure = draw(records)
            if figure is None:
                path.unlink(missing_ok=True)
            else:
                _save(figure, path)
                drawn.append(path)
    return drawn


def _save(figure: Figure, path: Path) -> None:
    picture = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(picture, format="png", dpi=160, metadata={"Software": None})
    write_bytes(path, picture.getvalue())


def entropy_figure(records: Records) -> Figure | None:
    """Entropy of every attention and MLP layer, bottom to top (Fig. 1); the layers that were picked are shaded."""
    if "profile" not in records:
        return None
    layers = records["profile"]["layers"]
    picked = records["selection"]["layers"] if "selection" in records else []
    figure = Figure(figsize=(10, 3.9), layout="constrained")
    panels = {"stream": "Residual stream after the layer", "branch": "The layer's own branch"}
    indices = [layer["layer"] for layer in layers]
    for axes, (part, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for index in picked:
            axes.axvspan(index - 0.4, index + 0.4, color=ATTENTION, alpha=0.12, lw=0)
        for kind, colour, marker in (("attention", ATTENTION, "o"), ("mlp", MLP, "s")):
            name = "attention" if kind == "attention" else "MLP"
            raw, scale_free = (
                [_entropy(layer[kind], key) for layer in layers] for key in (part, f"{part}_scale_free")
            )
            axes.plot(indices, raw, color=colour, marker=marker, ms=5, label=name)
            if not np.allclose(raw, scale_free, equal_nan=True):
                axes.plot(indices, scale_free, color=colour, marker=marker, ms=3, ls="--", label=f"{name}, scale-free")
        axes.set(title=title, xlabel="block", ylabel="entropy H = Σ log std (nats)", xticks=indices)
        axes.grid(axis="y")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if picked:
        handles.append(Rectangle((0, 0), 1, 1, color=ATTENTION, alpha=0.12, lw=0))
        labels.append("attention picked for removal")
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.suptitle("Entropy of attention and MLP layers", x=0.01, ha="left", fontweight="bold")
    return figure


def _entropy(entry: dict[str, Any] | None, key: str) -> float:
    """A block without attention has no such entropy: a gap in the line."""
    value = None if entry is None else entry[key]
    return math.nan if value is None else value


def scaled_scores(trace: list[dict[str, Any]], num_layers: int, absolute: bool = True) -> np.ndarray:
    """
    The scores of a greedy search, scaled to [0, 1] in each round: 0 is the round's least, 1 its greatest.

    Args:
        trace (`list[dict]`): one dict a round, `{"picked": layer, "scores": {layer: score}}`.
        num_layers (`int`): columns of the matrix.
        absolute (`bool`, *optional*, defaults to `True`): scale |score|, which the search minimises with
            `sign="absolute"`; otherwise the score itself.

    Returns:
        `np.ndarray` of shape `(rounds, num_layers)`: NaN where a layer was no candidate; 0 where all are equal.
    """
    matrix = _score_matrix(trace, num_layers)
    if absolute:
        matrix = np.abs(matrix)
    least, greatest = np.nanmin(matrix, axis=1, keepdims=True), np.nanmax(matrix, axis=1, keepdims=True)
    span = np.where(greatest > least, greatest - least, 1.0)
    return (matrix - least) / span


def _score_matrix(trace: list[dict[str, Any]], num_layers: int) -> np.ndarray:
    matrix = np.full((len(trace), num_layers), math.nan)
    for row, step in enumerate(trace):
        for layer, score in step["scores"].items():
            matrix[row, int(layer)] = score
    return matrix


def trajectory_boxes(trace: list[dict[str, Any]]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The cells, as (round, layer) from 0, of each round's choice and, in every round, of the choices before it."""
    picked = [step["picked"] for step in trace]
    chosen = list(enumerate(picked))
    earlier = [(row, layer) for row in range(len(picked)) for layer in picked[:row]]
    return chosen, earlier


def trajectory_figure(records: Records) -> Figure | None:
    """The trajectory of a greedy or racing search (Fig. 4): a row a round, a column a block, the choice in red."""
    selection = records.get("selection")
    if selection is None or selection["search"] not in ("greedy", "racing") or not selection["trace"]:
        return None
    trace = selection["trace"]
    num_layers = 1 + max(int(layer) for layer in trace[0]["scores"])
    if "prepare" in records:
        num_layers = records["prepare"]["model"]["num_hidden_layers"]
    is_entropy = selection["criterion"] == "transfer_entropy"
    absolute = is_entropy and selection["sign"] == "absolute"
    name = "TE" if is_entropy else selection["criterion"].replace("_", " ")
    scaled, raw = scaled_scores(trace, num_layers, absolute), _score_matrix(trace, num_layers)

    figure = Figure(figsize=(2.4 + 0.66 * num_layers, 2.0 + 0.52 * len(trace)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(scaled, cmap="Blues", vmin=0, vmax=1.15, aspect="auto")
    for row, column in zip(*np.nonzero(~np.isnan(raw)), strict=True):
        colour = "white" if scaled[row, column] > 0.6 else INK
        axes.text(column, row, _short(raw[row, column]), ha="center", va="center", fontsize=8, color=colour)
    chosen, earlier = trajectory_boxes(trace)
    for cells, colour, line, width in ((earlier, "#7a7f8a", ":", 1.4), (chosen, "#d00000", "--", 2.0)):
        for row, column in cells:
            corner = (column - 0.44, row - 0.42)
            axes.add_patch(Rectangle(corner, 0.88, 0.84, fill=False, ec=colour, ls=line, lw=width))
    axes.set_xticks(range(num_layers))
    axes.set_yticks(range(len(trace)), [str(row + 1) for row in range(len(trace))])
    axes.set(xlabel="attention layer of block", ylabel="round")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, pad=0.02, boundaries=np.linspace(0, 1, 201), ticks=[0, 0.5, 1])
    bar.outline.set_visible(False)
    bar.set_label(f"{'|' + name + '|' if absolute else name}, scaled in each row")
    title = f"Search trajectory: layers {', '.join(str(layer) for layer in selection['layers'])}"
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    axes.set_title(f"numbers: raw {name}; red dashed: chosen; grey dotted: chosen before", fontsize=9)
    return figure


def _short(value: float) -> str:
    """Three digits, so that it fits a cell; with a true minus sign."""
    pattern = ".0f" if abs(value) >= 100 else ".3g" if abs(value) >= 1e-3 else ".0e"
    return f"{value:{pattern}}".replace("-", "−")


def training_figure(records: Records) -> Figure | None:
    """M, loss and accuracy over the dilution, its control beside it; the dense training where there is none."""
    dilution = records.get("dilution")
    if dilution is not None:
        phases = {"dense_control": dilution["control"], "compressed": dilution}
    else:
        phases = {"dense": records["prepare"]["dense_training"] if "prepare" in records else None}
    logs = {name: phase["log"] for name, phase in phases.items() if phase is not None}
    panels = {"mask": "mask M", "loss": "training loss", "eval_top1": "top-1 (%)"}
    shown = {key: label for key, label in panels.items() if any(key in line for log in logs.values() for line in log)}
    if not shown:
        return None

    figure = Figure(figsize=(9, 1.1 + 1.9 * len(shown)), layout="constrained")
    names = {"dense": "dense", "dense_control": "dense, trained on as long", "compressed": "dilution"}
    grid = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (key, label) in zip(grid, shown.items(), strict=True):
        for name, log in logs.items():
            steps, values = _series(log, key)
            axes.plot(steps, values, color=COLOURS[name], label=names[name], **(LINES[name] | MARKERS[key]))
        axes.set_ylabel(label)
        axes.grid(axis="y")
        if key == "mask":
            axes.set_ylim(-0.06, 1.06)
        elif key == "eval_top1" and dilution is not None and "metrics" in records:
            before = 100 * records["metrics"]["models"]["dense"]["top1"]
            axes.axhline(before, color=COLOURS["dense"], lw=1.4, ls=":", label="dense, before")
    figure.align_ylabels(grid.tolist())
    grid[-1].set_xlabel("optimizer step")
    found = [axes.get_legend_handles_labels() for axes in grid]
    legend = {label: handle for handles, labels in found for handle, label in zip(handles, labels, strict=True)}
    figure.legend(list(legend.values()), list(legend), loc="outside lower center", ncols=len(legend))
    title = "Dense training"
    if dilution is not None:
        compensation = "with" if dilution["feature_compensation"] else "without"
        title = f"Dilution: {dilution['schedule'].replace('_', ' ')} schedule, {compensation} feature compensation"
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return figure


def _series(log: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the log lines that hold `key` (an evaluation's line holds no training loss); top-1 in %."""
    factor = 100 if key == "eval_top1" else 1
    lines = [line for line in log if key in line]
    return [line["step"] for line in lines], [factor * line[key] for line in lines]


def comparison_figure(records: Records) -> Figure | None:
    """Dense against compressed: top-1, parameters, MACs, images per second (with quartiles), each bar from 0."""
    models = records["metrics"]["models"] if "metrics" in records else {}
    if "compressed" not in models:
        return None
    names = [name for name in MODEL_NAMES if name in models]
    giga = models["dense"]["macs"] >= 1e8
    panels: list[tuple[str, str, float, str]] = [
        ("top1", "top-1 (%)", 100, ".1f"),
        ("parameters", "parameters (M)", 1e-6, ".3g"),
        ("macs", "MACs (G)" if giga else "MACs (M)", 1e-9 if giga else 1e-6, ".3g"),
        ("images_per_s", "images per second", 1, ".0f" if models["dense"]["images_per_s"] >= 100 else ".1f"),
    ]
    figure = Figure(figsize=(11, 1.4 + 0.45 * len(names)), layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True)
    for axes, (key, title, factor, pattern) in zip(grid, panels, strict=True):
        values = [factor * models[name][key] for name in names]
        ends = values
        axes.barh(range(len(names)), values, height=0.62, color=[COLOURS[name] for name in names])
        if key == "images_per_s":
            quartiles = np.array([models[name]["images_per_s_quartiles"] for name in names])
            spread = np.abs(quartiles.T - np.array(values))
            axes.errorbar(values, range(len(names)), xerr=spread, fmt="none", ecolor=INK, capsize=3)
            ends = quartiles[:, 1].tolist()
        for row, (end, value) in enumerate(zip(ends, values, strict=True)):
            axes.text(end, row, f"  {value:{pattern}}", va="center", fontsize=9)
        axes.set(title=title, xlim=(0, 1.3 * max(ends)), yticks=range(len(names)))
        axes.set_yticklabels([MODEL_NAMES[name] for name in names])
        axes.tick_params(axis="y", length=0)
        axes.locator_params(axis="x", nbins=4)
        axes.grid(axis="x")
    grid[0].invert_yaxis()
    figure.suptitle("Dense against compressed", x=0.01, ha="left", fontweight="bold")
    return figure


FIGURES: dict[str, Callable[[Records], Figure | None]] = {
    "entropy": entropy_figure,
    "trajectory": trajectory_figure,
    "training": training_figure,
    "comparison": comparison_figure,
}
