"""What a model card says, sentence by sentence, each from the card's record: text from outside comes escaped."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .card_text import NOBODY
from .markdown import escape, table
from .report import duration, headline, times


# What is known without asking the Hub.
LICENCES = {f"facebook/deit-{size}-patch16-224": "apache-2.0" for size in ("tiny", "small", "base")}
MEASURES = {
    "top1": "top-1 %",
    "top5": "top-5 %",
    "params_m": "parameters, M",
    "gmacs": "MACs, G",
    "mmacs": "MACs, M",
    "images_per_s": "images/s",
    "images_in_10gb": "images in 10 GB",
}
# What a card tells of a training; the rest has no say in its result, or names places.
TOLD = (
    "seed dense_steps steps epochs schedule decay unit feature_compensation batch_size gradient_accumulation_steps "
    "optimizer learning_rate base_learning_rate min_learning_rate warmup warmup_unit weight_decay max_grad_norm "
    "label_smoothing drop_path_rate drop_path_schedule crop flip shift rand_augment random_erasing mixup cutmix "
    "repeated_augmentation ema_decay distillation_weight distillation_temperature lora_rank bf16"
).split()


def word(value: str) -> str:
    """A name or a path inside the repository, as it stands; `ValueError` for anything that could be more."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", value) or ".." in value.split("/"):
        raise ValueError(f"Expected a name, or a path inside the repository, got {value[:80]!r}.")
    return value


def models_of(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Our figures by model: measured, or at least counted."""
    measured = record["records"].get("metrics", {}).get("models", {})
    return measured or record["counted"] or {}


def licence(record: dict[str, Any]) -> str | None:
    """The licence that is known."""
    if record["license"] is not None:
        return record["license"]
    # What others trained from the base may carry another one.
    is_ours = record["trained_by"] in ("us", "nobody")
    return LICENCES.get(record["base_model_id"]) if is_ours else None


def summary(record: dict[str, Any]) -> str:
    """What it is, in a sentence."""
    model, base = record["model"], escape(record["base_model"])
    gone, total = sorted(model["removed"]), model["num_hidden_layers"]
    if model["diluted"]:
        values = ", ".join(f"{value:g}" for value in model["mask"])
        return (
            f"A Vision Transformer in the middle of its compression, made from {base} with hf_nose: the attention of "
            f"blocks {listed(model['diluted'])} is faded out, at M = {values}."
        )
    if not model["num_removed"]:
        return f"A Vision Transformer with all its attention, {base} in hf_nose's format."
    which = f" (blocks {listed(gone)}, counted from 0)" if gone else ""
    return (
        f"A Vision Transformer, {base}, without {model['num_removed']} of its {total} attention layers{which}, by "
        "[MLP Can Be A Good Transformer Learner](https://arxiv.org/abs/2404.05657) (CVPR 2024), in hf_nose's format."
    )


def status(record: dict[str, Any]) -> str:
    """Who trained the weights, without which no figure below means anything."""
    if record["trained_by"] == "nobody":
        return (
            "**Weights not trained by us.** Nobody has run this recipe with hf_nose yet: this card holds the paper's "
            "figures and the command that would make the weights. None of the accuracies below is ours."
        )
    if record["trained_by"] == "authors":
        source = record["source"]
        return (
            f"**Weights not trained by us.** The paper's authors trained them and released `{word(source['file'])}` "
            f"(SHA-256 `{word(source['sha256'])}`); hf_nose has only converted and folded them."
        )
    if record["trained_by"] == "unknown":
        return "**Origin not told.** Who trained these weights, on what and for how long, this card was not told."
    dilution = record["records"].get("dilution")
    if dilution is not None and not dilution["steps"]:
        return "**Not trained after the removal**: the layers were taken out, and nothing made up for them."
    return "**Trained with hf_nose**, on the data and for the steps that stand below, no more."


def gains(record: dict[str, Any]) -> list[str]:
    """What was gained and what was lost."""
    if record["experiment"] is not None and "headline" in record["experiment"]:
        return [escape(line) for line in record["experiment"]["headline"]]
    if "compressed" in record["records"].get("metrics", {}).get("models", {}):
        return headline(record["records"])
    lines = []
    if record["counted"] is not None:
        before, after = record["counted"]["dense"], record["counted"]["compressed"]
        change = [f"{100 * (after[name] / before[name] - 1):+.1f} %" for name in ("parameters", "macs")]
        lines.append(f"Gained, counted from the configuration: parameters {change[0]}, MACs {change[1]}.")
    theirs = "; the paper's figures have columns of their own" if record["published"] is not None else ""
    return [*lines, f"Lost, or not, in accuracy: not measured by us{theirs}."]


def removal(record: dict[str, Any]) -> list[str]:
    """Which layers went, and who says so."""
    selection, model = record["records"].get("selection"), record["model"]
    if selection is None or selection["search"] == "given":
        if not model["removed"]:
            return [escape(model["chosen_by"])]
        chosen = escape(model["chosen_by"])
        return [f"Attention layers {listed(model['removed'])}, {chosen}: nothing was searched here."]
    calibration = selection["calibration"]
    kinds = ", ".join(f"{name} {escape(str(selection[name]))}" for name in ("criterion", "search", "mask", "target"))
    return [
        f"Attention layers {listed(selection['layers'])}, in the order picked: losing them changes the output least, "
        f"by the measure searched with ({kinds}).",
        f"Measured on {calibration['num_images']} calibration images of the training split, SHA-256 "
        f"`{word(calibration['sha256'])}`.",
    ]


def comparison(record: dict[str, Any]) -> str:
    """Dense against compressed; the paper's figures and ours never in one column."""
    models, published = models_of(record), record["published"]
    columns: list[tuple[str, dict[str, str], str]] = []
    for name in ("dense", "dense_control", "compressed"):
        title = name.replace("_control", " trained on")
        if published is not None and name in published:
            columns.append((f"{title}, paper", published[name], "not given"))
        if name in models or name != "dense_control":
            columns.append((f"{title}, ours", cells(models.get(name, {})), "not measured"))
    shown = [measure for measure in MEASURES if any(measure in figures for _, figures, _ in columns)]
    head = ["", *(title for title, _, _ in columns)]
    return rows_of(
        [head, *([MEASURES[name], *(figures.get(name, absent) for _, figures, absent in columns)] for name in shown)]
    )


def cells(model: dict[str, Any]) -> dict[str, str]:
    """Our figures of one model in the paper's units; what was not measured is left out."""
    made: dict[str, str] = {name: f"{100 * model[name]:.1f}" for name in ("top1", "top5") if name in model}
    if "parameters" in model:
        count, macs = model["parameters"], model["macs"]
        made["params_m"] = f"{count / 1e6:.{2 if count >= 1e6 else 3}f}"
        made |= {"gmacs": f"{macs / 1e9:.2f}"} if macs >= 1e8 else {"mmacs": f"{macs / 1e6:.2f}"}
    if "images_per_s" in model:
        made["images_per_s"] = f"{model['images_per_s']:.0f}"
    return made


def notes(record: dict[str, Any]) -> list[str]:
    """How the figures of the comparison were measured."""
    lines = []
    metrics, published = record["records"].get("metrics"), record["published"]
    if metrics is not None:
        hardware, throughput = metrics["hardware"], metrics["throughput"]
        device = hardware["accelerator"] or hardware["processor"]
        count = "" if hardware["accelerator"] else f", {hardware['cores']} cores"
        compressed = metrics["models"].get("compressed", {})
        lines.append(
            f"Ours: {metrics['models']['dense']['num_images']} evaluation images. Speed on {escape(device)}{count}, "
            f"{escape(hardware['dtype'])}, batches of {throughput['batch_size']}, the models in turns in one process."
        )
        if compressed:
            lines.append(
                f"The compressed model is {compressed['verdict'].partition(':')[0]} than the dense one there: "
                f"{times(compressed)} its images/s."
            )
    elif record["counted"] is not None and record["experiment"] is None:
        lines.append("Ours: parameters and MACs counted from the configuration; nothing was run.")
    if published is not None:
        lines.append(
            f"The paper's: Table {escape(published['table'])}, {escape(published['setting'])}, float32. Its speeds "
            "and ours are from different machines and must not be compared."
        )
    elif record["experiment"] is None:
        lines.append("The paper has no figure for this model on these data.")
    return lines


def training(record: dict[str, Any]) -> list[str]:
    """Data, length, hardware and settings."""
    lines = [f"- Base model: {escape(record['base_model'])}; data: {escape(record['dataset'])}."]
    records = record["records"]
    if "prepare" in records:
        data = records["prepare"]["data"]
        lines.append(f"- {data['num_train']} training images, {data['num_eval']} evaluation images.")
        lines += [f"- {escape(note)}" for note in data["notes"]]
    if "dilution" in records:
        dilution = records["dilution"]
        lines.append(f"- Trained while M falls: {duration(dilution)}.")
        if dilution["control"] is not None:
            lines.append(f"- Dense model trained on beside it: {dilution['control']['steps']} steps.")
    settings = {name: record["settings"].get(name) for name in TOLD} if record["settings"] else {}
    told = {name: value for name, value in settings.items() if value not in (None, False, 0, "none")}
    if told:
        made = "The recipe" if record["trained_by"] == "nobody" else "Settings"
        body = [[f"`{name}`", escape(str(value))] for name, value in told.items()]
        lines += ["", f"{made}:", "", rows_of([["setting", "value"], *body])]
        teacher = record["settings"].get("teacher")
        if teacher is not None:
            lines += ["", f"Teacher: {escape(teacher)}."]
    elif record["trained_by"] == "authors":
        lines.append("- How they were trained is told in the paper; the file does not say.")
    return lines


def commands(record: dict[str, Any]) -> list[str]:
    """What makes these weights, as typed."""
    if record["recipe"] is None:
        return []
    name = word(record["recipe"])
    repo = word(record["repo_id"] or f"{NOBODY}/{record['name']}")
    return [
        f"accelerate launch scripts/run_nose.py --recipe {name}",
        f"hf-nose export runs/{name}",
        f"hf-nose push runs/{name} --repo_id {repo}",
    ]


def missing(record: dict[str, Any]) -> list[str]:
    """What nobody measured, said in so many words."""
    models = record["records"].get("metrics", {}).get("models", {})
    lines = []
    if record["trained_by"] == "nobody":
        lines.append("Accuracy and speed of these weights: there are none yet.")
    elif "compressed" not in models and record["experiment"] is None:
        theirs = " by us; the paper's figures are of its authors' own runs" if record["published"] is not None else ""
        lines.append(f"Accuracy and speed of these weights{theirs}.")
    elif record["experiment"] is not None and not models:
        lines.append("Speed: the runs shared their machine, so none of it would be true.")
    elif "dense_control" not in models:
        lines.append("A dense model trained for the same total steps, so a difference may come from training alone.")
    if models and record["experiment"] is None:
        lines.append("Other seeds: this is one run, and no figure is an average.")
    return [
        *lines,
        "Memory, and speed on any machine, dtype or batch size but those named.",
        "Accuracy on other data, robustness to corruption or shift, calibration, bias between groups or places.",
    ]


def limits(record: dict[str, Any]) -> list[str]:
    """What the model is not for."""
    model = record["model"]
    lines = [
        f"It classifies images of {shape(model['image_size'])} px into the classes of {escape(record['dataset'])} and "
        "inherits what is wrong with them; other sizes need `interpolate_pos_encoding=True`.",
        "Attention maps exist for the layers that kept attention, and for no other.",
    ]
    if record["experiment"] is not None:
        lines.append("Trained to compare methods, not to be used: few images, short training.")
    if model["diluted"]:
        lines.append("It is not finished: train on with hf_nose, or end the dilution by `set_mask(0.0)` and `fold`.")
    return lines


def licence_words(record: dict[str, Any]) -> str:
    """Whose licence the weights carry."""
    known = licence(record)
    if known is None:
        base = escape(record["base_model"])
        return f"The weights derive from {base}, whose licence this card does not know. The code is Apache-2.0."
    if record["base_model_id"] is None:
        return f"{escape(known)}."
    return f"{escape(known)}, that of {escape(record['base_model'])}. The code is Apache-2.0."


def versions(record: dict[str, Any]) -> list[str]:
    """What wrote the figures; records of several stages may have been written by several."""
    written: dict[str, list[str]] = {}
    for name, part in record["records"].items():
        line = ", ".join(f"{package} {version}" for package, version in part["versions"].items())
        written.setdefault(line, []).append(name)
    if not written:
        return [f"hf_nose {record['hf_nose_version']}"]
    return [f"{', '.join(names)}: {line}" for line, names in written.items()]


def shape(size: int | Sequence[int]) -> str:
    """An image's height and width."""
    return f"{size} x {size}" if isinstance(size, int) else " x ".join(map(str, size))


def listed(layers: Sequence[int]) -> str:
    """Indices with commas."""
    return ", ".join(map(str, layers))


def rows_of(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first row its head, numbers to the right; its cells come escaped."""
    head, *body = rows
    return "\n".join(table(head, body))
