"""What model cards are rendered from: of a run's folder, or of a recipe that nobody has run yet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .card_text import repository_name
from .card_words import TOLD
from .cards import render_card
from .command_line import read_recipe, recipe_path
from .configuration_nose_vit import NoseViTConfig, __version__
from .inspection import check_weights, dense, layers, on_meta, read_config
from .plan import parse_layers
from .profiling import count_macs, count_parameters
from .published import BASES, IMAGENET, NUM_BLOCKS, checkpoint_name, published_figures
from .records import Records, public_name, read_records
from .report import CAPTIONS
from .shapes import shape_config


ARCHITECTURE = "NoseViTForImageClassification"


def card_record(name: str, model: dict[str, Any], **values: Any) -> dict[str, Any]:
    """A card's record, described at [`cards.render_card`], of which `values` says what is known."""
    record: dict[str, Any] = {
        "name": name,
        "repo_id": None,
        "trained_by": "us",
        "base_model": "a model trained from random weights",
        "base_model_id": None,
        "license": None,
        "dataset": "a local data set",
        "dataset_id": None,
        "model": model,
        "records": {},
        "recipe": None,
        "settings": None,
        "published": None,
        "counted": None,
        "experiment": None,
        "source": None,
        "figures": {},
        "hf_nose_version": __version__,
    }
    unknown = sorted(set(values) - set(record))
    if unknown:
        raise ValueError(f"A card has no {unknown}; known are {sorted(record)}.")
    return {**record, **values}


def model_record(config: NoseViTConfig, mask: Sequence[float] = (), chosen_by: str = "as given") -> dict[str, Any]:
    """What a card says of the model itself; `chosen_by` where no search of the run's did."""
    return {
        "num_hidden_layers": config.num_hidden_layers,
        "num_removed": len(config.removed_attention_layers),
        "removed": list(config.removed_attention_layers),
        "diluted": list(config.diluted_attention_layers),
        "mask": list(mask),
        "image_size": config.image_size,
        "chosen_by": chosen_by,
    }


def run_record(folder: Path, repo_id: str | None = None, license: str | None = None) -> dict[str, Any]:
    """
    The card's record of a finished run, or of a transfer.

    Args:
        folder (`Path`): the run's folder, with `model/` in it, whose weights are held against their configuration.
        repo_id (`str`, *optional*): where it is pushed to.
        license (`str`, *optional*): of the base model, as the Hub spells it; DeiT's is known.

    Raises:
        `ValueError`: where the folder holds no model, or its records are damaged.
    """
    if not (folder / "model").is_dir():
        raise ValueError(f"{folder.name} is not the folder of a finished run: it holds no model.")
    config, _ = read_config(str(folder / "model"))
    record = measured_record(
        folder.resolve().name, config, read_records(folder), check_weights(folder / "model")["mask"]
    )
    return {**record, "repo_id": repo_id, "license": license, "figures": figures_in(folder)}


def figures_in(folder: Path) -> dict[str, str]:
    """Those figures that a card knows what to say of, by name."""
    return {name: f"figures/{name}.png" for name in CAPTIONS if (folder / "figures" / f"{name}.png").is_file()}


def measured_record(
    name: str,
    config: NoseViTConfig,
    records: Records,
    mask: Sequence[float] = (),
    base_model_id: str | None = None,
    dataset_id: str | None = None,
) -> dict[str, Any]:
    """The card's record of a model of `config` from the `records` of its run, of a transfer, or of none."""
    metrics = records.get("metrics", {})
    is_transfer = "method" in metrics
    start = metrics if is_transfer else records.get("prepare")
    # None in the settings of a stage stands for what suits the others; what was done stands beside.
    stages = [records[stage] for stage in ("prepare", "dilution") if stage in records]
    settings = {key: value for stage in stages for key, value in stage["settings"].items()}
    settings |= {key: value for stage in stages for key, value in stage.items() if key in TOLD}
    told = {key: settings[key] for key in TOLD if key in settings}
    if settings.get("teacher") is not None:
        told["teacher"] = public_name(settings["teacher"])
    known: dict[str, Any] = {
        "trained_by": "unknown",
        "base_model": base_model_id or "a model this card was not told of",
    }
    if start is not None:
        known = {"base_model": base_model_id or start["model"]["source"], "dataset": start["data"]["dataset"]}
        base_model_id = base_model_id or start["model"]["base_model_id"]
        dataset_id = dataset_id or start["data"]["dataset_id"]
    return card_record(
        name,
        model_record(config, mask),
        **known,
        base_model_id=base_model_id,
        dataset_id=dataset_id,
        records={} if is_transfer else records,
        settings=told,
        experiment=transfer_experiment(metrics) if is_transfer else None,
        published=published_figures(base_model_id, dataset_id, len(config.removed_attention_layers)),
    )


def export_card(
    folder: Path,
    config: NoseViTConfig,
    records: Records,
    base_model_id: str | None,
    name: str | None = None,
    repo_id: str | None = None,
    license: str | None = None,
    dataset_id: str | None = None,
) -> str:
    """
    The text of `README.md` for an exported `folder`, complete but for that: its weights and figures are there.

    `name` is that of a folder, of which only what a repository's name may hold is taken, and by default what recipe
    and card of the base model are called, or `nose-vit`; the other arguments are those of [`measured_record`] and
    [`run_record`]. Raises `ValueError` as these do.
    """
    removed = len(config.removed_attention_layers)
    if name is None:
        is_known = base_model_id in BASES and removed
        name = checkpoint_name(str(base_model_id), removed, config.num_hidden_layers) if is_known else "nose-vit"
    mask = check_weights(folder)["mask"]
    record = measured_record(repository_name(name), config, records, mask, base_model_id, dataset_id)
    return render_card({**record, "repo_id": repo_id, "license": license, "figures": figures_in(folder)})


def transfer_experiment(record: dict[str, Any]) -> dict[str, Any]:
    """What a transfer measured."""
    metrics, training = record["metrics"], record["training"]
    top1, top5 = (f"{100 * metrics[name]:.1f}" for name in ("top1", "top5"))
    return {
        "title": "Transfer",
        "text": f"{record['method']}: {record['trainable_parameters']} parameters trained, {training['steps']} steps.",
        "headline": [f"Top-1 {top1} % on {metrics['num_images']} images; no dense model was trained beside it."],
        "table": [["", "top-1 %", "top-5 %", "loss"], ["this model", top1, top5, f"{metrics['loss']:.4f}"]],
        "note": "Without a dense model trained alike this says nothing of what the removal cost.",
        "results": {"top-1": metrics["top1"], "top-5": metrics["top5"]},
    }


def recipe_record(name: str) -> dict[str, Any]:
    """
    The card's record of a recipe of the paper that nobody has run: its figures, what it costs, and the command.
    `ValueError` where the recipe starts from another model than the paper's.
    """
    recipe = read_recipe(recipe_path(name))
    base = BASES.get(recipe["model"])
    if base is None or recipe["dataset"] != IMAGENET:
        raise ValueError(f"recipe must start from one of {sorted(BASES)} on {IMAGENET}, got {recipe['model']}.")
    config = NoseViTConfig.from_vit(shape_config(base.shape))
    given = parse_layers(recipe["layers"]) if "layers" in recipe else []
    count = len(given) or round(recipe["ratio"] * NUM_BLOCKS)
    # Which layers go changes neither parameters nor MACs.
    compressed = NoseViTConfig.from_vit(config, **layers(removed=given or list(range(count))))
    who = "the paper's set" if base.size == "b" else "the set of the authors' scripts"
    who = (
        who if given else "Which layers go is searched in the run: the paper gives figures for this ratio and no set."
    )
    model = {**model_record(compressed, chosen_by=who), "removed": given}
    return card_record(
        name,
        model,
        trained_by="nobody",
        base_model=recipe["model"],
        base_model_id=recipe["model"],
        dataset=recipe["dataset"],
        dataset_id=recipe["dataset"],
        recipe=name,
        settings={key: value for key, value in recipe.items() if key in TOLD},
        published=published_figures(recipe["model"], recipe["dataset"], count),
        counted={"dense": costs(dense(config)), "compressed": costs(compressed)},
    )


def costs(config: NoseViTConfig) -> dict[str, int]:
    """Parameters and multiply-accumulates of a model, counted without building it."""
    return {"parameters": count_parameters(on_meta(config, ARCHITECTURE)), "macs": count_macs(config)["total"]}
