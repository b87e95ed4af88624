"""The code that travels with a checkpoint, so that it loads with `trust_remote_code=True` where hf_nose is missing."""

from __future__ import annotations

import inspect
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from .backbone_nose_vit import NoseViTBackbone
from .configuration_nose_vit import NoseViTConfig, __version__
from .files import write_text
from .modeling_nose_vit import NoseViTForImageClassification, NoseViTModel


# What each Auto class loads. `save_pretrained` alone would name only the class that it saves.
AUTO_CLASSES: dict[str, type] = {
    "AutoConfig": NoseViTConfig,
    "AutoModel": NoseViTModel,
    "AutoModelForImageClassification": NoseViTForImageClassification,
    "AutoBackbone": NoseViTBackbone,
}


def auto_map() -> dict[str, str]:
    """The `auto_map` of an exported configuration: for each Auto class `"file.class"`."""
    return {auto: f"{found.__module__.split('.')[-1]}.{found.__name__}" for auto, found in AUTO_CLASSES.items()}


def travelling_files() -> list[Path]:
    """The source files of the Auto classes and, through their relative imports, of all that they need; sorted."""
    starts = {inspect.getfile(found) for found in AUTO_CLASSES.values()}
    needed = {file for start in starts for file in get_relative_import_files(start)}
    return sorted(Path(file) for file in starts | needed)


def copy_travelling_files(folder: Path) -> list[Path]:
    """
    Copies the travelling files side by side into `folder`, under two lines saying which licence they have and which
    version of hf_nose they are from: strangers execute them. Returns the copies.
    """
    copies = []
    for file in travelling_files():
        head = f"# SPDX-License-Identifier: Apache-2.0\n# {file.name} of hf_nose {__version__}\n"
        copies.append(folder / file.name)
        write_text(copies[-1], head + file.read_text(encoding="utf-8"))
    return copies
