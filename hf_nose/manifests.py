"""Manifests: the hashes of a finished folder's files, kept in it, so that damage is noticed before it is used."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from .files import read_json, stamped, write_json


MANIFEST_NAME = "manifest.json"


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _record_sha256(record: dict[str, Any]) -> str:
    """The SHA-256 of a manifest's own content, without the entry that holds it: a flipped bit shows there too."""
    content = {key: value for key, value in record.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: str | os.PathLike[str], **extra: Any) -> None:
    """
    Write `manifest.json` into a folder that is otherwise complete: the size and SHA-256 of every file in it, those in
    folders below included, and of the manifest itself. Written last and atomically, so a folder that has one was
    finished.

    Args:
        folder (`str` or `os.PathLike`): the folder.
        extra: more entries for the manifest (say `step=400`), as `json` takes them.

    Raises:
        ValueError: where `extra` uses a name that the manifest needs itself.
    """
    folder = Path(folder)
    taken = {"schema", "versions", "files", "manifest_sha256"} & set(extra)
    if taken:
        raise ValueError(f"extra = {sorted(taken)}: the manifest writes these entries itself, choose other names.")
    manifest = folder / MANIFEST_NAME
    names = sorted(entry.relative_to(folder).as_posix() for entry in folder.rglob("*") if entry.is_file())
    files = {
        name: {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size}
        for name in names
        if name != MANIFEST_NAME
    }
    record = stamped({"files": files, **extra})
    # Through JSON and back, because keys become text and tuples lists there.
    write_json(manifest, {**record, "manifest_sha256": _record_sha256(json.loads(json.dumps(record)))})


def manifest_error(folder: str | os.PathLike[str]) -> str | None:
    """
    Compare a folder with the manifest that [`write_manifest`] left in it; files that it does not name are let be.

    Returns:
        `str` or `None`: `None` where every file is whole; otherwise a sentence naming the first that is missing,
        truncated or changed.
    """
    folder = Path(folder)
    manifest = folder / MANIFEST_NAME
    if not manifest.is_file():
        return f"{manifest} is missing: the folder was never finished."
    try:
        record = read_json(manifest)
    except ValueError as error:
        return str(error)
    if record.get("manifest_sha256") != _record_sha256(record):
        return f"{manifest} has changed since it was written."
    for name, expected in record["files"].items():
        file = folder / name
        if not file.is_file():
            return f"{file} is missing."
        size = file.stat().st_size
        if size < expected["bytes"]:
            return f"{file} is truncated: expected {expected['bytes']} bytes but got {size}."
        if size > expected["bytes"] or sha256(file) != expected["sha256"]:
            return f"{file} has changed since it was written: its SHA-256 is not the manifest's."
    return None
