"""Files of a run's folder: they appear whole or not at all, and a damaged one is noticed before it is used."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .configuration_nose_vit import __version__


SCHEMA = 1
LOCK_NAME = ".lock"

_VERSIONED_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "evaluate",
    "peft",
    "huggingface_hub",
    "safetensors",
    "numpy",
    "pillow",
    "scikit-learn",
)


class RunLockedError(RuntimeError):
    """Another process is at work in the folder."""


def versions() -> dict[str, str]:
    """Versions of hf_nose, Python and the packages that decide a result, from their metadata: nothing is imported."""
    packages = {name: metadata.version(name) for name in _VERSIONED_PACKAGES}
    return {"hf_nose": __version__, "python": platform.python_version(), **packages}


@contextmanager
def _naming(path: Path, partial: Path) -> Iterator[None]:
    """
    Name in an OSError the path that was asked for: `write` and `fsync` (disk full, quota, file too large) name none,
    `open` and `mkdir` the partial one.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, partial, str(partial)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _sync(path: Path) -> None:
    """Bring a file's bytes, or a folder's entries, from the system's cache to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """
    Write a file so that it appears whole or not at all: beside its place, synced, then moved into it.

    Args:
        path (`str` or `os.PathLike`): the file; its folder must exist. An older one is replaced.
        content (`bytes`): the content.

    Raises:
        OSError: naming the path, when the disk is full or the folder cannot be written; an older file is untouched.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    with _naming(path, partial):
        try:
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            if partial.is_file():
                partial.unlink()
            raise
        _sync(path.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """[`write_bytes`] of a text in UTF-8."""
    write_bytes(path, text.encode())


def stamped(record: dict[str, Any]) -> dict[str, Any]:
    """`record` with `schema` and the `versions` that write it in front."""
    content = {key: value for key, value in record.items() if key not in ("schema", "versions")}
    return {"schema": SCHEMA, "versions": versions(), **content}


def write_json(path: str | os.PathLike[str], record: dict[str, Any]) -> None:
    """
    Write a record whole or not at all, with `schema` and the `versions` that wrote it in front (those that the record
    may already have, because it was read from an older file, are replaced).

    Args:
        path (`str` or `os.PathLike`): the file; its folder must exist.
        record (`dict`): what `json` takes; keys keep their order.

    Raises:
        ValueError: where a number is NaN or infinite, which JSON cannot hold.
        OSError: as [`write_text`].
    """
    try:
        text = json.dumps(stamped(record), indent=2, allow_nan=False, ensure_ascii=False)
    except ValueError as error:
        raise ValueError(
            f"The record for {path} cannot be written as JSON: {error}. Write null for what is not known."
        ) from error
    write_text(path, text + "\n")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """
    Read a record that [`write_json`] wrote.

    Raises:
        ValueError: naming the file, where it is truncated or corrupt, or has no schema or one newer than is known.
        FileNotFoundError: where there is none.
    """
    try:
        record = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{path} is truncated or corrupt ({error}). Delete it and run the stage that writes it again."
        ) from error
    if not isinstance(record, dict) or not isinstance(record.get("schema"), int):
        raise ValueError(f"{path} was not written by hf_nose: expected a JSON object with an integer `schema`.")
    if record["schema"] > SCHEMA:
        raise ValueError(
            f"{path} has schema {record['schema']}, but this hf_nose knows up to {SCHEMA}. Update hf_nose to read it."
        )
    return record


def _remove_folder(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def put_back(path: str | os.PathLike[str]) -> None:
    """Moves the folder `path` back where a kill inside [`whole_folder`] left it aside, between its two moves."""
    path = Path(path)
    old = path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():
        os.replace(old, path)


@contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """
    Make a folder that appears whole or not at all.

    Yields an empty staging folder beside `path` (`.<name>.partial`) to write into. When the block ends, everything in
    it is synced and the staging folder moves to `path`; a folder that was there is replaced. When the block raises,
    the staging folder is removed and an older folder stays as it was.

    A directory cannot replace a full one in one step, so an older folder first steps aside to `.<name>.old`. A kill
    exactly between the two moves leaves it there; [`put_back`], or the next `whole_folder` of the path, puts it back.

    Args:
        path (`str` or `os.PathLike`): the folder to make; the one it stands in must exist.

    Raises:
        NotADirectoryError: where `path` is a file.
        OSError: naming the path, when the disk is full or the place cannot be written.
    """
    path = Path(path)
    staging, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file; expected a folder, or nothing, to put a folder in its place.")
    put_back(path)
    _remove_folder(staging)
    _remove_folder(old)
    with _naming(path, staging):
        staging.mkdir()
        try:
            yield staging
            for entry in [*staging.rglob("*"), staging]:
                _sync(entry)
            if path.exists():
                os.replace(path, old)
            os.replace(staging, path)
        except BaseException:
            _remove_folder(staging)
            put_back(path)
            raise
        _sync(path.parent)
        _remove_folder(old)


@contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """
    Hold a folder for this process alone, through the file `.lock` in it. The system frees it when the process ends, by
    kill -9 too; the empty `.lock` stays behind. The folder is made where there is none.

    Args:
        folder (`str` or `os.PathLike`): the folder of a run.

    Raises:
        RunLockedError: where another process holds it.
        OSError: where the folder cannot be made or written, or its file system has no `flock`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Without flock, filelock would fall back to a lock that kill -9 leaves behind: refuse that.
    lock = FileLock(folder / LOCK_NAME, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise RunLockedError(
            f"Another process is at work in {folder}: wait until it has ended, or give another folder."
        ) from error
    try:
        yield
    finally:
        lock.release()
