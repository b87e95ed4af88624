"""The report of a run, rendered from its saved JSON files: every number in it stands there."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from .distillation import describe
from .figures import MODEL_NAMES
from .files import write_text
from .markdown import escape, table
from .records import STAGE_RECORDS, Records, public_name, read_records


CAPTIONS = {
    "comparison": "Dense against compressed; the marks on images per second are quartiles.",
    "entropy": "Entropy of every attention and MLP layer, from the first block to the last (the paper's Fig. 1).",
    "trajectory": "The search, a row a round, a column a block (the paper's Fig. 4).",
    "training": "M, loss and accuracy over the steps of training.",
}
# How layers faded that did not fade together, by the setting's name.
TURNS = {"ascending": ", from the lowest layer up", "descending": ", from the highest layer down"}
COLUMNS = ("top-1 %", "top-5 %", "loss", "params M", "MACs", "images/s", "speed")


def write_report(folder: str | os.PathLike[str]) -> Path:
    """
    Write `report.md` of a run's folder: two sentences on what was gained and lost, dense against compressed, untrained
    controls, entropy, search, training, what was not run, versions and hardware, with those figures that are there.

    Holds no path: a model or data set that was loaded from one goes by its public id where the run was told it, and
    otherwise by the last part of the path. Returns the report's own `Path`.

    Raises:
        ValueError: from [`files.read_json`], where a file is corrupt or newer than this code.
        OSError: where the folder cannot be written.
    """
    folder = Path(folder)
    records = read_records(folder)
    pictures = {
        name: [f"![{name}](figures/{name}.png)", "", f"*{caption}*"]
        for name, caption in CAPTIONS.items()
        if (folder / "figures" / f"{name}.png").is_file()
    }
    sections = {
        "Dense against compressed": (_comparison(records), pictures.get("comparison")),
        "Without training": (_controls(records), None),
        "Entropy of the layers": ([], pictures.get("entropy")),
        "The search": (_search(records), pictures.get("trajectory")),
        "Training and folding": (_training(records), pictures.get("training")),
        "Data": (_data(records), None),
        "What was not run": (_missing(records), None),
        "Measured with": (_provenance(records), None),
    }
    parts = [f"# {_title(records)}", " ".join(headline(records)), *_loading(folder)]
    for title, blocks in sections.items():
        texts = ["\n".join(lines) for lines in blocks if lines]
        if texts:
            parts += [f"## {title}", *texts]
    path = folder / "report.md"
    write_text(path, "\n\n".join(parts) + "\n")
    return path


def load_lines(model: str | os.PathLike[str]) -> list[str]:
    """The lines of code that load a compressed checkpoint."""
    return [
        "import hf_nose",
        "from transformers import AutoModelForImageClassification",
        f"model = AutoModelForImageClassification.from_pretrained({os.fspath(model)!r})",
    ]


def summary_table(folder: str | os.PathLike[str]) -> str:
    """The table for the end of a run on the screen: a line a model; the headline where no model was measured."""
    records = read_records(folder)
    if "metrics" not in records:
        return " ".join(headline(records))
    rows = [("", *COLUMNS), *_model_rows(records)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(row[column].rjust(widths[column]) for column in range(1, len(row)))])
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def headline(records: Records) -> list[str]:
    """
    What was gained and what was lost, a sentence each, from metrics.json alone; without a measured compressed model,
    that there is none and what was selected.

    The loss is told against the dense model of equal total steps where one was trained. The first sentence says "not
    faster" unless the whole confidence interval of the ratio lies above 1, see [`~timing.verdict`].
    """
    models = records["metrics"]["models"] if "metrics" in records else {}
    if "compressed" not in models:
        first = "No compressed model has been measured in this folder, so nothing is known of gain or loss."
        if "selection" not in records:
            return [first, "No attention layer has been selected either."]
        return [first, f"Selected for removal: attention layers {_layers(records['selection']['layers'])}."]
    dense, compressed = models["dense"], models["compressed"]
    speed = f"{compressed['verdict'].partition(':')[0]}, at {times(compressed)} the dense model's images/s"
    gained = (
        f"Gained: {_millions(dense['parameters'])} M parameters become {_millions(compressed['parameters'])} M "
        f"({_change(dense['parameters'], compressed['parameters'])}), {_macs(dense['macs'])} MACs become "
        f"{_macs(compressed['macs'])} ({_change(dense['macs'], compressed['macs'])}), and the model is {speed}."
    )
    rival, meaning = models.get("dense_control"), "the dense model trained for the same total steps"
    if rival is None:
        rival, meaning = dense, "the dense model that went in"
    top1, images = compressed["top1"], compressed["num_images"]
    points = round(100 * (top1 - rival["top1"]), 1)
    verdict = f"{abs(points):.1f} points {'below' if points < 0 else 'above'}" if points else "level with"
    opening = "Lost" if points < 0 else "Nothing lost in accuracy"
    error = math.sqrt(top1 * (1 - top1) / images)
    lost = (
        f"{opening}: top-1 is {_percent(top1)} % against {_percent(rival['top1'])} %, {verdict} {meaning}, on "
        f"{images} images (a standard error of such a figure: {_percent(error)} points)."
    )
    return [gained, lost]


def times(model: dict[str, Any]) -> str:
    """How many times as many images/s as the dense model, with the confidence interval of that."""
    lower, upper = model["ratio_interval"]
    return f"{model['ratio_to_dense']:.2f} times (confidence interval {lower:.2f} to {upper:.2f})"


def _title(records: Records) -> str:
    if "prepare" not in records:
        return "A run of hf_nose"
    model, data = records["prepare"]["model"], records["prepare"]["data"]
    names = public_name(model["source"], model["base_model_id"]), public_name(data["dataset"], data["dataset_id"])
    return escape(" on ".join(dict.fromkeys(names)))


def _loading(folder: Path) -> list[str]:
    if not (folder / "model").is_dir():
        return []
    lines = ["The compressed model loads, from this folder, with", "", "```python", *load_lines("model"), "```"]
    return ["\n".join(lines)]


def _comparison(records: Records) -> list[str]:
    if "metrics" not in records:
        return []
    throughput = records["metrics"]["throughput"]
    return [
        *table(("model", *COLUMNS), _model_rows(records)),
        "",
        f"All models saw the same images. Images/s: median (and quartiles) of {throughput['rounds']} rounds at batch "
        f"{throughput['batch_size']}, the models taking turns in one process; speed: median of the ratios to the "
        "dense model, round by round.",
    ]


def _model_rows(records: Records) -> list[tuple[str, ...]]:
    models = records["metrics"]["models"]
    rows: list[tuple[str, ...]] = []
    for name, model in ((name, models[name]) for name in MODEL_NAMES if name in models):
        rate, lower, upper = map(_rate, (model["images_per_s"], *model["images_per_s_quartiles"]))
        costs = (_millions(model["parameters"]), _macs(model["macs"]), f"{rate} ({lower} to {upper})")
        rows.append((MODEL_NAMES[name], *_scores(model), *costs, f"{model['ratio_to_dense']:.2f}x"))
    return rows


def _scores(record: dict[str, Any]) -> tuple[str, str, str]:
    return _percent(record["top1"]), _percent(record["top5"]), f"{record['loss']:.4f}"


def _controls(records: Records) -> list[str]:
    controls = records["metrics"]["controls"] if "metrics" in records else []
    rows = [
        (
            escape(control["name"]) + (f" (seed {control['seed']})" if "seed" in control else ""),
            _layers(control["layers"]),
            *_scores(control),
        )
        for control in controls
    ]
    note = "What the choice of layers is worth before training: the dense model with these layers masked."
    return [note, "", *table(("layers masked", "which", *COLUMNS[:3]), rows)] if rows else []


def _search(records: Records) -> list[str]:
    if "selection" not in records:
        return []
    selection = records["selection"]
    calibration = selection["calibration"]
    picked = f"Attention layers {_layers(selection['layers'])}"
    if selection["search"] == "given":
        return [f"{picked}, as given: nothing was searched."]
    kinds = ("criterion", "search", "mask", "sign", "target")
    return [
        f"{picked}, in the order picked ({', '.join(f'{kind} {escape(str(selection[kind]))}' for kind in kinds)}).",
        f"{calibration['num_images']} calibration images (SHA-256 `{calibration['sha256']}`), "
        f"{selection['block_forwards']} block forwards, {selection['seconds']:.1f} s, "
        f"{selection['num_processes']} process{'es' if selection['num_processes'] > 1 else ''}.",
        *_certainty(selection),
    ]


def _certainty(selection: dict[str, Any]) -> list[str]:
    """How sure a race is of its layers, and what bfloat16 changed, where there was either."""
    lines = []
    if selection["search"] == "racing":
        sure = f"{selection['confidence']:.4g} confidence or more"
        lines.append(f"A race: with {sure} these are the layers that the greedy search on all images would pick.")
    if checked := selection.get("precision"):
        sets = f"{checked['num_sets']} sets on {checked['num_images']} images"
        lines.append(f"In {checked['dtype']}, {sets} score up to {checked['largest_difference']:.3g} off float32.")
    return lines


def duration(training: dict[str, Any]) -> str:
    """Steps, and the seconds of those that the last call trained."""
    resumed = training.get("resumed_from")
    since = f" since step {resumed.split('-')[-1]}" if resumed else ""
    return f"{training['steps']} steps, {training['seconds']:.1f} s{since}"


def _training(records: Records) -> list[str]:
    lines = []
    dense = records["prepare"]["dense_training"] if "prepare" in records else None
    if dense is not None:
        lines.append(f"- Dense model trained first: {duration(dense)}.")
    if "dilution" in records:
        dilution = records["dilution"]
        compensation = "with" if dilution["feature_compensation"] else "without"
        turns = TURNS.get(dilution.get("order", "together"), "")
        lines.append(
            f"- Dilution: {escape(dilution['schedule'])} schedule{turns}, {compensation} feature compensation, "
            f"{duration(dilution)}."
        )
        lines += _targets(dilution)
        if dilution["control"] is not None:
            lines.append(f"- Dense model trained on beside it: {duration(dilution['control'])}.")
    if "fold" in records:
        fold = records["fold"]
        equal = "equal bit for bit" if fold["bitwise_equal"] else "not equal bit for bit"
        lines.append(
            f"- Logits before and after the fold, {fold['num_images']} images: {equal}, greatest difference "
            f"{fold['max_abs_logit_difference']:.3g}."
        )
    return lines


def _targets(dilution: dict[str, Any]) -> list[str]:
    """A line on the teacher and one on the moving average, where there was one; older records name neither."""
    lines, taught, decay = [], dilution.get("distillation"), dilution.get("ema_decay")
    if taught is not None:
        teacher = "the dense model" if taught["teacher"] == "dense" else escape(public_name(taught["teacher"], None))
        control = "" if dilution["control"] is None else f"; the dense control {'too' if taught['control'] else 'not'}"
        lines.append(f"- Distilled from {teacher}: {describe(taught)}{control}.")
    if decay is not None:
        last = {key: line[key] for line in dilution["log"] for key in ("eval_top1", "eval_ema_top1") if key in line}
        average, weights = (_percent(last[key]) for key in ("eval_ema_top1", "eval_top1"))
        lines.append(
            f"- The result is the moving average of the weights, decay {decay:g}: at the end of training top-1 "
            f"{average} %, against {weights} % of the last weights."
        )
    return lines


def _data(records: Records) -> list[str]:
    lines = []
    if "prepare" in records:
        data = records["prepare"]["data"]
        name = escape(public_name(data["dataset"], data["dataset_id"]))
        lines.append(f"- {name}: {data['num_train']} training images, {data['num_eval']} evaluation images.")
        lines += [f"- {escape(note)}" for note in data["notes"]]
    # Layers that were given needed no calibration images.
    if "selection" in records and records["selection"]["calibration"] is not None:
        lines += [f"- {escape(note)}" for note in records["selection"]["calibration"]["notes"]]
    # Selection repeats the notes on the data.
    return list(dict.fromkeys(lines))


def _missing(records: Records) -> list[str]:
    files = {stage: name.removesuffix(".json") for stage, name in STAGE_RECORDS.items() if stage != "report"}
    stages = [stage for stage, name in files.items() if name not in records]
    lines = [f"- Stages not run in this folder: {', '.join(stages)}."] if stages else []
    if "metrics" in records and "dense_control" not in records["metrics"]["models"]:
        lines.append("- A dense model of equal total steps, so a difference may come from training, not from removal.")
    if "metrics" in records and not records["metrics"]["controls"]:
        lines.append("- Masked, untrained controls.")
    return lines


def _provenance(records: Records) -> list[str]:
    """The hardware, and a line for each set of versions: a resumed run may have been written by several."""
    lines = []
    if "metrics" in records:
        hardware = records["metrics"]["hardware"]
        parts = [f"{key.replace('_', ' ')} {value}" for key, value in hardware.items() if value is not None]
        lines.append(f"- {escape(', '.join(parts))}")
    written: dict[str, list[str]] = {}
    for name, record in records.items():
        versions = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
        written.setdefault(versions, []).append(f"{name}.json")
    return lines + [f"- {', '.join(files)}: {escape(versions)}" for versions, files in written.items()]


def _layers(layers: list[int]) -> str:
    return ", ".join(str(layer) for layer in layers)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def _change(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.1f} %"


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f}" if count >= 1e6 else f"{count / 1e6:.3f}"


def _macs(count: int) -> str:
    return f"{count / 1e9:.2f} G" if count >= 1e8 else f"{count / 1e6:.2f} M"


def _rate(images_per_s: float) -> str:
    return f"{images_per_s:.0f}" if images_per_s >= 100 else f"{images_per_s:.1f}"
