"""What a run's folder holds for people and programs: one JSON record a stage, and names fit to be published."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Any

from .files import read_json


# The file that each stage leaves.
RECORDS = {
    "prepare": "prepare.json",
    "profile": "profile.json",
    "select": "selection.json",
    "dilute": "dilution.json",
    "fold": "fold.json",
    "evaluate": "metrics.json",
    "report": "report.json",
}
# Named like a model and a data set of the Hub, but part of the package or of scikit-learn.
EMBEDDED = ("digits-vit", "digits")
Records = dict[str, dict[str, Any]]


def read_records(folder: str | os.PathLike[str]) -> Records:
    """The records that a run has left so far, by the name of their file; those of stages not run are absent."""
    paths = {Path(name).stem: Path(folder) / name for stage, name in RECORDS.items() if stage != "report"}
    return {name: read_json(path) for name, path in paths.items() if path.exists()}


def public_id(source: str, given: str | None = None) -> str | None:
    """The id under which a model or data set is public: what was given, else a Hub id; `None` for a path."""
    if given is not None:
        return given
    is_path = Path(source).expanduser().exists() or source.startswith((".", "/", "~")) or source.endswith(".json")
    return None if is_path or source in EMBEDDED else source


def public_name(source: str, given: str | None = None) -> str:
    """The public id where there is one; of a path only the last part (a Hub id has at most one slash)."""
    if given is not None:
        return given
    source = source.replace("\\", "/")
    is_path = source.startswith(("/", ".", "~")) or source.count("/") > 1 or source[1:2] == ":"
    return PurePosixPath(source).name if is_path else source
