"""A page for people: the folder of a Gradio Space that runs a dense and a compressed model side by side."""

from __future__ import annotations

import os
import platform
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from huggingface_hub import SpaceCardData

from .card_text import CARD, marked
from .configuration_nose_vit import NoseViTConfig, __version__
from .export import exported, known_id, save_checkpoint
from .export_source import ExportSource, check_inside, open_source
from .files import write_json, write_text
from .remote_code import auto_map, copy_travelling_files


# The one that the page was looked at with, in a browser; gradio itself is no part of an installation.
GRADIO = "6.31.0"
# The dense models that a run keeps, the fairer first: it was trained for the same total steps.
RIVALS = ("dense_control", "dense")
# What both must have alike, or their times would differ by more than the removed layers.
ALIKE = (
    "num_labels",
    "image_size",
    "num_channels",
    "patch_size",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
)
# How both compute, for the same reason: the class token alone behind the last attention, nothing in slices.
COMPUTED = {"class_token_tail": True, "chunk_size_feed_forward": 0, "chunk_size_attention": 0}


def export_space(
    source: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    dense: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """
    Writes a folder that `python app.py` serves as a page in the browser, and that is a Space of the Hub as it stands:
    upload a picture, and both models' predictions and times appear side by side, under the layers that are gone.

    In it: `app.py`, `requirements.txt`, `README.md`, `space.json`, and `dense/` and `compressed/`, each with weights,
    configuration, image processor and travelling code. It needs no network and no hf_nose.

    Args:
        source (`str` or `os.PathLike`):
            The compressed model: the folder of a run or of a checkpoint, or a Hub id.
        output_dir (`str` or `os.PathLike`):
            The folder to write; it must be empty or not there.
        dense (`str` or `os.PathLike`, *optional*):
            The dense model: a folder or a Hub id. By default the run's own, which its report compares with: the one
            trained for the same total steps, where there is one.
        overwrite (`bool`, *optional*, defaults to `False`):
            Replaces an earlier export.

    Returns:
        `Path`: the folder.

    Raises:
        `ValueError`: as [`~hf_nose.export.export_folder`]; where there is no dense model, `source` is dense or still
            in dilution, `dense` is not dense, or the two are not models of the same classes and sizes.
        `OSError`: as `export_folder`.
    """
    compressed = open_source(source)
    opened = {"dense": open_dense(compressed, Path(source), dense), "compressed": compressed}
    with exported(compressed, output_dir, overwrite, marker="app.py") as folder:
        models = {name: part.load() for name, part in opened.items()}
        check_pair(models["dense"].config, models["compressed"].config)
        for name, model in models.items():
            (folder / name).mkdir()
            model.config.auto_map = auto_map()
            for field, value in COMPUTED.items():
                setattr(model.config, field, value)
            save_checkpoint(opened[name], model, folder / name)
            copy_travelling_files(folder / name)
        write_text(folder / "app.py", app_source())
        write_text(folder / "requirements.txt", requirements())
        rival = opened["dense"].name if dense is None else None
        about = {"name": compressed.name, "dense": rival, "top1": measured_pair(compressed, rival)}
        write_json(folder / "space.json", about)
        card = space_card(about, models["compressed"].config, hub_ids(opened))
        write_text(folder / CARD, marked(card))
    return Path(output_dir)


def open_dense(compressed: ExportSource, run: Path, dense: str | os.PathLike[str] | None) -> ExportSource:
    """The dense model that was asked for, else the run's own."""
    if dense is not None:
        return open_source(dense)
    found = [run / name for name in RIVALS if (run / name / "config.json").is_file()]
    if not found:
        raise ValueError(
            f"dense is needed: {compressed.name} holds no dense model to compare with, as the folder of a run does. "
            "Give the model that was compressed, a folder or a Hub id."
        )
    check_inside(iter(found), run)
    return open_source(found[0])


def check_pair(dense: NoseViTConfig, compressed: NoseViTConfig) -> None:
    """`ValueError` where the two are not the same model with and without some attention."""
    gone = sorted({*dense.removed_attention_layers, *dense.diluted_attention_layers})
    if gone:
        raise ValueError(f"dense must have all its attention, but layers {gone} are removed or diluted in it.")
    if compressed.diluted_attention_layers:
        raise ValueError(
            f"space takes compressed models, but layers {compressed.diluted_attention_layers} are still diluted. "
            "Finish the dilution, set_mask(0.0), and fold first."
        )
    if not compressed.removed_attention_layers:
        raise ValueError("space takes compressed models, but this one has all its attention: nothing to compare.")
    for name in ALIKE:
        theirs, ours = getattr(dense, name), getattr(compressed, name)
        if theirs != ours:
            raise ValueError(
                f"dense must be the model that was compressed, but its {name} is {theirs}, that of the compressed "
                f"model {ours}. Give the dense model of the same classes, image size and architecture."
            )
    theirs, ours = (
        {int(index): name for index, name in (part.id2label or {}).items()} for part in (dense, compressed)
    )
    for index, name in ours.items():
        if theirs[index] != name:
            raise ValueError(
                f"dense must name the same classes, but class {index} is {theirs[index]!r} in it and {name!r} in the "
                "compressed model. Give the dense model of the same data, or mend id2label in its config.json."
            )


def app_source() -> str:
    """The page's code, under two lines saying its licence and where it is from: strangers execute it."""
    head = f"# SPDX-License-Identifier: Apache-2.0\n# app.py of hf_nose {__version__}\n"
    return head + (resources.files("hf_nose") / "assets" / "space_app.py").read_text(encoding="utf-8")


def requirements() -> str:
    """What the page needs: gradio as it was tested, which brings Pillow, and the rest as it is installed here."""
    installed = {name: metadata.version(name).partition("+")[0] for name in ("torch", "transformers")}
    return "".join(f"{name}=={version}\n" for name, version in {"gradio": GRADIO, **installed}.items())


def measured_pair(source: ExportSource, rival: str | None) -> dict[str, Any] | None:
    """The accuracy of both models, where the run has measured it; `rival` is the run's name of the dense one."""
    models = source.records.get("metrics", {}).get("models", {})
    if rival not in models:
        return None
    compressed = models["compressed"]
    return {"dense": models[rival]["top1"], "compressed": compressed["top1"], "num_images": compressed["num_images"]}


def hub_ids(opened: dict[str, ExportSource]) -> list[str]:
    """The ids of the two models, or of the one that was compressed, as far as they are known; sorted."""
    base = known_id(None, opened["compressed"].records, "model", "base_model_id")
    return sorted({name for name in (base, *(part.hub_id for part in opened.values())) if name is not None})


def space_card(about: dict[str, Any], config: NoseViTConfig, models: list[str]) -> str:
    """`README.md`: the settings of the Space in YAML, and how to run and upload it."""
    python = ".".join(platform.python_version_tuple()[:2])
    data = SpaceCardData(
        title=f"{about['name']}, dense and compressed",
        sdk="gradio",
        sdk_version=GRADIO,
        python_version=python,
        app_file="app.py",
        models=models or None,
        tags=["hf_nose", "nose_vit"],
    )
    removed = config.removed_attention_layers
    parts = [
        f"---\n{data.to_yaml()}\n---",
        "# Dense and compressed, side by side",
        f"Upload a picture: a Vision Transformer with all its attention (`dense/`) and the same without that of "
        f"{len(removed)} of its {config.num_hidden_layers} blocks (`compressed/`, blocks "
        f"{', '.join(map(str, removed))}) classify it, and the page shows both predictions and how long each took.",
        f"On your own machine, with Python {python} or newer, in this folder; no network is needed once it is "
        "installed:",
        "```bash\npip install -r requirements.txt && python app.py\n```",
        "As a Space of the Hub:",
        "```bash\nhf upload OWNER/NAME . --repo-type space\n```",
        "The page runs the code in `dense/` and `compressed/` (`trust_remote_code=True`), which is that of "
        f"hf_nose {__version__}; its method is that of [MLP Can Be A Good Transformer Learner]"
        "(https://arxiv.org/abs/2404.05657). Times are those of the machine that it runs on, "
        "at batch 1; where the compressed model is not faster, the page says so.",
    ]
    return "\n\n".join(parts) + "\n"
