"""The header of a checkpoint's safetensors, in a folder or on the Hub: names, shapes and dtypes, and no numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import get_safetensors_metadata
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
from safetensors import SafetensorError, safe_open


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
MASK = "dilution_mask"


class Tensor(NamedTuple):
    """What the header of the weights says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    file: str


Header = dict[str, Tensor]


def local_header(folder: Path) -> Header:
    """The tensors in a folder's safetensors, whose header is held against the length of the file by safetensors."""
    expected: dict[str, str] = {}
    if (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():
        expected = weight_map(folder / INDEX)
    elif not (folder / WEIGHTS).is_file():
        pickles = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl"))
        found = f"; {pickles} are pickles, which may run code and are never loaded" if pickles else ""
        raise ValueError(f"{folder.name} holds neither {WEIGHTS} nor {INDEX}{found}.")
    header: Header = {}
    for name in sorted(set(expected.values())) or [WEIGHTS]:
        try:
            with safe_open(folder / name, "pt") as file:
                for key in file.keys():
                    part = file.get_slice(key)
                    if key in header:
                        raise ValueError(f"{key} is in two files, {header[key].file} and {name}.")
                    header[key] = Tensor(part.get_dtype(), tuple(part.get_shape()), name)
        except (SafetensorError, FileNotFoundError) as error:
            raise ValueError(f"The weights in {name} are missing, corrupt or truncated: {error}.") from error
    check_map(expected, header)
    return header


def remote_header(source: str, revision: str | None) -> Header:
    """The same of a Hub id, by a request for the first bytes of its files."""
    try:
        found = get_safetensors_metadata(source, revision=revision)
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise ValueError(
            f"{source} has no weights that can be read, or this token cannot see them: {error}"
        ) from error
    strangers = sorted(name for name in found.files_metadata if not is_shard(name))
    if strangers:
        raise ValueError(f"{INDEX} must name safetensors files beside it, got {strangers[:4]}.")
    header = {
        key: Tensor(item.dtype, tuple(item.shape), name)
        for name, file in found.files_metadata.items()
        for key, item in file.tensors.items()
    }
    if found.sharded:
        check_map(found.weight_map, header)
    return header


def weight_map(path: Path) -> dict[str, str]:
    """The file of every tensor, from the index of a checkpoint in shards; files outside its folder are refused."""
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = set(files.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name} is no index of weights: {error!r}.") from error
    strangers = [str(name) for name in names if not is_shard(name)]
    if strangers or not names:
        raise ValueError(f"{path.name} must name safetensors files beside it, got {sorted(strangers)[:4]}.")
    return files


def is_shard(name: object) -> bool:
    """Whether this is the bare name of a safetensors file."""
    return isinstance(name, str) and name.endswith(".safetensors") and not set(name) & set("/\\:") and name[0] != "."


def check_map(expected: dict[str, str], header: Header) -> None:
    """Refuses shards that hold other tensors than their index says; without an index there is nothing to say."""
    wrong = sorted(key for key in {*expected, *header} if key not in header or expected.get(key) != header[key].file)
    if expected and wrong:
        raise ValueError(f"{INDEX} and the files disagree on {len(wrong)} tensors: {wrong[:4]}.")


def summary(header: Header) -> dict[str, Any]:
    """The header in numbers."""
    return {
        "files": sorted({tensor.file for tensor in header.values()}),
        "tensors": len(header),
        "parameters": sum(math.prod(tensor.shape) for key, tensor in header.items() if not key.endswith(MASK)),
        "dtypes": sorted({DTYPES.get(tensor.dtype, tensor.dtype) for tensor in header.values()}),
    }
