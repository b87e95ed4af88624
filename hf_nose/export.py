"""The folder of a checkpoint that anyone can load: weights, code, image processor, card, figures, search."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, ModelCardData, eval_result_entries_to_yaml
from transformers import PreTrainedModel

from .configuration_nose_vit import NoseViTConfig
from .export_source import ExportSource, check_hub_id, open_source
from .files import read_json, whole_folder, write_text
from .privacy import check_publishable
from .records import Records
from .remote_code import auto_map, copy_travelling_files
from .report import headline


# From the folder, complete but for README.md, the configuration of the model, the records of the run (none without
# one) and the base model's Hub id, where it is known, to the text of README.md.
Card = Callable[[Path, NoseViTConfig, Records, str | None], str]


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
    `README.md`, and, where the source has them, `selection.json` and `figures/`. It appears whole or not at all.

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
            Makes the text of `README.md` from folder, configuration, the run's records and the base model's id.
        overwrite (`bool`, *optional*, defaults to `False`):
            Replaces an earlier export.

    Returns:
        `Path`: the folder.

    Raises:
        `ValueError`: where the source is no checkpoint or leads out of its folder, its weights do not fit its
            configuration, the output folder is in use, an id is no Hub id, or a file would hold a path or a token.
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
        write_eval_results(folder, opened.records, dataset_id, task_id)
        write_text(folder / "README.md", (card or plain_card)(folder, model.config, opened.records, base))
    return Path(output_dir)


@contextmanager
def exported(
    source: ExportSource, output_dir: str | os.PathLike[str], overwrite: bool = False, marker: str = "config.json"
) -> Iterator[Path]:
    """
    Yields an empty folder that takes the place of `output_dir` when the block ends and nothing in it is private. Only
    a folder that holds the file `marker`, as every export of this format does, is replaced.

    Raises:
        `ValueError`: where `output_dir` is in use, holds the source, or something in it is not to be published.
    """
    output = Path(output_dir)
    if source.model.resolve().is_relative_to(output.resolve()):
        raise ValueError(f"output_dir {output} holds the model that is exported: name another folder.")
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise ValueError(f"output_dir {output} is not empty: replace it by overwrite, or name another folder.")
        if not (output / marker).is_file():
            raise ValueError(f"output_dir {output} is no earlier export (no {marker}): name another folder.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(output) as folder:
        yield folder
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


def write_eval_results(folder: Path, records: Records, dataset_id: str | None, task_id: str | None) -> None:
    """`.eval_results/NAME.yaml`, which the Hub takes only for its own data sets and their registered tasks."""
    if task_id is None:
        return
    dataset = known_id(dataset_id, records, "data", "dataset_id")
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


def plain_card(folder: Path, config: NoseViTConfig, records: Records, base_model_id: str | None) -> str:
    """A card that says what the model is, what was measured, and how it is loaded."""
    is_measured = "models" in records.get("metrics", {})
    parts = [
        front_matter(["hf_nose", "nose_vit"], base_model_id),
        "# Vision Transformer compressed by hf_nose",
        state_of_layers(config),
        " ".join(headline(records)) if is_measured else "Nothing was measured.",
        "```python\nfrom transformers import AutoModelForImageClassification\n\n"
        "# After `import hf_nose`, trust_remote_code is not needed.\n"
        'model = AutoModelForImageClassification.from_pretrained(".", trust_remote_code=True)\n```',
        *(f"![{path.stem}](figures/{path.name})" for path in sorted((folder / "figures").glob("*.png"))),
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(tags: list[str], base_model_id: str | None) -> str:
    """The YAML in front of a card."""
    data = ModelCardData(
        library_name="transformers", pipeline_tag="image-classification", tags=tags, base_model=base_model_id
    )
    return f"---\n{data.to_yaml()}\n---"


def state_of_layers(config: NoseViTConfig) -> str:
    """Which attention layers are gone or on their way, in a sentence."""
    removed, diluted = (
        ", ".join(map(str, layers)) or "none"
        for layers in (config.removed_attention_layers, config.diluted_attention_layers)
    )
    return f"Of {config.num_hidden_layers} attention layers, removed: {removed}; diluted: {diluted}."
