"""The folder of a checkpoint that anyone can load: weights, code, image processor, card, figures, search."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
from transformers import PreTrainedModel

from .card_records import export_card
from .card_text import CARD, completed_card, marked, own_card
from .configuration_nose_vit import NoseViTConfig
from .export_source import ExportSource, check_hub_id, open_source
from .files import put_back, read_json, whole_folder, write_text
from .privacy import check_publishable
from .records import Records
from .remote_code import auto_map, copy_travelling_files


logger = logging.getLogger(__name__)
# From the folder, complete but for README.md, the configuration of the model, the records of the run (none without
# one) and the base model's Hub id, where it is known, to the text of README.md.
Card = Callable[[Path, NoseViTConfig, Records, str | None], str]
KEPT = "%s is somebody's own words and stays: see that it still says the truth. Deleted, it is written anew."


def export_folder(
    source: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    base_model_id: str | None = None,
    dataset_id: str | None = None,
    task_id: str | None = None,
    card: Card | None = None,
    overwrite: bool = False,
) -> Path:
    """
    Writes a folder to be published: it loads by the Auto classes after `import hf_nose`, and with
    `trust_remote_code=True` where hf_nose is not installed, offline in both cases.

    In it: `model.safetensors`, `config.json` with the `auto_map`, the travelling code, `preprocessor_config.json`,
    `README.md`, and, where the source has them, `selection.json` and `figures/`. It appears whole or not at all. A
    card that somebody has changed in an earlier export stays as it is.

    Args:
        source (`str` or `os.PathLike`):
            The folder of a run, of which `model/` is taken; the folder of a checkpoint, dense, half-diluted or
            folded; or a Hub id. A stock ViT becomes a dense NoseViT.
        output_dir (`str` or `os.PathLike`):
            The folder to write; it must be empty or not there.
        base_model_id (`str`, *optional*):
            Hub id of the model that was compressed; by default what the run knows.
        dataset_id (`str`, *optional*):
            Hub id of the data set that the accuracy was measured on; by default what the run knows.
        task_id (`str`, *optional*):
            The task registered for that data set; with both, `.eval_results/*.yaml` is written.
        card (`Callable`, *optional*):
            Makes the text of `README.md` from folder, configuration, the run's records and the base model's id. By
            default the card that a NoseViT's checkpoint brings along, else [`~hf_nose.card_records.export_card`].
        overwrite (`bool`, *optional*, defaults to `False`):
            Replaces an earlier export.

    Returns:
        `Path`: the folder.

    Raises:
        `ValueError`: where the source is no checkpoint or leads out of its folder, its weights do not fit its
            configuration, the output folder is in use, an id is no Hub id or would have no say, or a file would hold a
            path or a token.
        `OSError`: naming the path, where the disk is full or the folder cannot be written.
    """
    opened = open_source(source)
    with exported(opened, output_dir, overwrite) as folder:
        model = opened.load()
        model.config.auto_map = auto_map()
        save_checkpoint(opened, model, folder)
        copy_travelling_files(folder)
        copy_records(opened, folder)
        base = known_id(base_model_id, opened.records, "model", "base_model_id")
        dataset = known_id(dataset_id, opened.records, "data", "dataset_id")
        write_eval_results(folder, opened.records, dataset, task_id)
        brought = opened.card() if card is None else None
        if brought is not None and dataset_id is not None and task_id is None:
            raise ValueError(
                f"dataset_id {dataset_id} would have no say: the checkpoint brings its own card, which stays. Leave "
                "dataset_id out."
            )
        card = card or partial(export_card, name=opened.name, dataset_id=dataset)
        text = completed_card(brought, base, type(model).__name__) if brought is not None else None
        write_text(folder / CARD, text or marked(card(folder, model.config, opened.records, base)))
    return Path(output_dir)


@contextmanager
def exported(
    source: ExportSource, output_dir: str | os.PathLike[str], overwrite: bool = False, marker: str = "config.json"
) -> Iterator[Path]:
    """
    Yields an empty folder that takes the place of `output_dir` when the block ends and nothing in it is private. Only
    a folder that holds the file `marker`, as every export of this format does, is replaced. The card of an earlier
    export stays where somebody has changed it, also where nothing else is left of that.

    Raises:
        `ValueError`: where `output_dir` is in use, holds the source, or something in it is not to be published.
    """
    output = Path(output_dir)
    if source.model.resolve().is_relative_to(output.resolve()):
        raise ValueError(f"output_dir {output} holds the model that is exported: name another folder.")
    output.parent.mkdir(parents=True, exist_ok=True)
    # With the card in it that somebody may have written.
    put_back(output)
    names = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if names and not (names == {CARD} and own_card(output)):
        if not overwrite:
            raise ValueError(f"output_dir {output} is not empty: replace it by overwrite, or name another folder.")
        if not (output / marker).is_file():
            raise ValueError(f"output_dir {output} is no earlier export (no {marker}): name another folder.")
    own = own_card(output)
    with whole_folder(output) as folder:
        yield folder
        if own is not None:
            write_text(folder / CARD, own)
            logger.warning(KEPT, output / CARD)
        check_publishable(folder)


def save_checkpoint(source: ExportSource, model: PreTrainedModel, folder: Path) -> None:
    """Weights, configuration and image processor."""
    model.save_pretrained(folder)
    source.processor().save_pretrained(folder)


def copy_records(source: ExportSource, folder: Path) -> None:
    """The search and the figures, where the source has them."""
    if source.selection is not None:
        read_json(source.selection)
        shutil.copyfile(source.selection, folder / "selection.json")
    if source.figures:
        (folder / "figures").mkdir()
    for figure in source.figures:
        shutil.copyfile(figure, folder / "figures" / figure.name)


def known_id(given: str | None, records: Records, part: str, name: str) -> str | None:
    """The Hub id that was given, else the one that the run knows; checked, `None` where there is none."""
    found = given if given is not None or "prepare" not in records else records["prepare"][part][name]
    if found is not None:
        check_hub_id(found, name)
    return found


def measured(records: Records) -> dict[str, Any] | None:
    """The accuracy of the exported model, `{"top1", "num_images", ...}`, where the run has measured it."""
    metrics = records.get("metrics", {})
    # A transfer measures one model, the main job several.
    return metrics["models"].get("compressed") if "models" in metrics else metrics.get("metrics")


def write_eval_results(folder: Path, records: Records, dataset: str | None, task_id: str | None) -> None:
    """`.eval_results/NAME.yaml`, which the Hub takes only for its own data sets and their registered tasks."""
    if task_id is None:
        return
    accuracy = measured(records)
    if dataset is None or accuracy is None:
        what = "the Hub id of the data set is not known: give dataset_id" if accuracy else "no accuracy was measured"
        raise ValueError(f"task_id {task_id!r} was given to publish a result, but {what}.")
    entry = EvalResultEntry(
        dataset, task_id, accuracy["top1"], notes=f"top-1 accuracy on {accuracy['num_images']} images"
    )
    path = folder / ".eval_results" / f"{dataset.split('/')[-1]}.yaml"
    path.parent.mkdir()
    write_text(path, yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False))
