"""Where an export reads from: the folder of a run, the folder of a checkpoint, or a Hub id; never outside of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedConfig

from .card_text import CARD
from .configuration_nose_vit import NoseViTConfig
from .images import load_processor
from .inspection import check_weights, read_config
from .modeling_nose_vit import NoseViTForImageClassification
from .records import Records, public_id, read_records
from .weights import load_classifier


# What of a repository is fetched: no code, and no pickle.
PATTERNS = ["*.json", "*.safetensors", "figures/*.png", CARD]


@dataclass(frozen=True)
class ExportSource:
    """
    A checkpoint that is safe to load, and what was recorded of it.

    Attributes:
        name (`str`): the last part of what was asked for.
        model (`Path`): the folder of weights, configuration and image processor.
        records (`dict`): the records of the run that made it; empty where there is no run.
        selection (`Path`, *optional*): the `selection.json` of the run, or beside the checkpoint.
        figures (`list[Path]`): the figures of the run, or beside the checkpoint.
        hub_id (`str`, *optional*): the Hub id that was asked for.
    """

    name: str
    model: Path
    records: Records
    selection: Path | None
    figures: list[Path]
    hub_id: str | None

    def load(self) -> NoseViTForImageClassification:
        """The model, in evaluation mode, as [`NoseViTForImageClassification`] whatever it was saved as."""
        return load_classifier(self.model)

    def card(self) -> str | None:
        """The card that a NoseViT brings along; that of another model tells how the other one is loaded."""
        path = self.model / CARD
        config, _ = PreTrainedConfig.get_config_dict(self.model)
        is_ours = config["model_type"] == NoseViTConfig.model_type
        return path.read_text(encoding="utf-8") if is_ours and path.is_file() else None

    def processor(self):
        """Its image processor."""
        return load_processor(self.model)


def open_source(source: str | os.PathLike[str]) -> ExportSource:
    """
    Finds what is to be exported and checks, before anything is loaded, that every file stands inside of it, that the
    configuration is valid, and that the headers of the weights fit the configuration.

    Raises:
        `ValueError`: where `source` is no checkpoint, a link leads out of it, or the weights do not fit.
        `OSError`: where a Hub id cannot be found or downloaded.
    """
    folder, hub_id = Path(source), None
    if not folder.is_dir():
        hub_id = os.fspath(source)
        if public_id(hub_id) is None:
            raise ValueError(f"{hub_id} is neither a folder nor a Hub id.")
        check_hub_id(hub_id, "model")
        folder = Path(snapshot_download(hub_id, allow_patterns=PATTERNS))
    is_run = not (folder / "config.json").is_file() and (folder / "model").is_dir()
    model = folder / "model" if is_run else folder
    # A snapshot of the Hub's cache links to the files beside it, by the cache's own doing.
    check_inside(entries(folder, model), folder if hub_id is None else folder.parents[1])
    check_model(model)
    check_classifier(model)
    return ExportSource(
        name=folder.resolve().name if hub_id is None else hub_id.split("/")[-1],
        model=model,
        records=read_records(folder) if is_run else {},
        selection=folder / "selection.json" if (folder / "selection.json").is_file() else None,
        figures=sorted((folder / "figures").glob("*.png")),
        hub_id=hub_id,
    )


def entries(folder: Path, model: Path) -> Iterator[Path]:
    """Everything below `folder` that an export may read."""
    yield from (*folder.glob("*.json"), *folder.glob("export/*"), *folder.glob("export/*/README.md"))
    for part in {model, folder / "figures"}:
        yield from part.rglob("*")


def check_inside(paths: Iterator[Path], folder: Path) -> None:
    """`ValueError` naming the first of `paths` that is a link out of `folder`."""
    root = folder.resolve()
    for path in paths:
        if not path.resolve().is_relative_to(root):
            raise ValueError(
                f"{path} is a link out of {folder}: an export reads nothing from outside. Put the file itself there."
            )


def check_model(model: Path) -> None:
    """Refuses a folder whose configuration is no ViT's, or whose weights are not those it describes."""
    if not (model / "config.json").is_file():
        raise ValueError(f"{model} holds no config.json: give the folder of a run, of a checkpoint, or a Hub id.")
    if (model / "adapter_config.json").is_file():
        raise ValueError(f"{model} holds an adapter, which is no checkpoint: merge it into its model first.")
    check_weights(model)


def check_classifier(model: Path) -> None:
    """`ValueError` where a checkpoint has no head, which would be left to chance."""
    _, architecture = read_config(str(model))
    if not architecture.endswith("ForImageClassification"):
        raise ValueError(
            f"{model} holds a {architecture}, which has no classifier: an export is one, with its head. Give the "
            "checkpoint that it was taken from, or train a head: NoseViTForImageClassification.from_vit(..., "
            "num_labels=...) starts one."
        )


def check_hub_id(name: str, argument: str) -> None:
    """`ValueError` naming the argument where `name` cannot be the id of a repository of the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{argument} must be a Hub id such as 'facebook/deit-base-patch16-224': {error}") from error
