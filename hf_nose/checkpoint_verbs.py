"""`hf-nose inspect` and `hf-nose convert`: their command lines; what is heavy is imported once those are read."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path


def inspect_verb(arguments: Sequence[str]) -> None:
    """`hf-nose inspect ID`: what a checkpoint is, for people or as JSON."""
    parser = argparse.ArgumentParser(prog="hf-nose inspect", allow_abbrev=False)
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    options = parser.parse_args(arguments)
    from .inspection import described, inspect_checkpoint

    record = inspect_checkpoint(options.model, options.revision)
    sys.stdout.write((json.dumps(record, indent=2) if options.json else described(record)) + "\n")


def convert_verb(arguments: Sequence[str]) -> None:
    """`hf-nose convert FILE.pth`: a released checkpoint of the paper's authors as a folded NoseViT."""
    parser = argparse.ArgumentParser(prog="hf-nose convert", allow_abbrev=False)
    parser.add_argument("file", type=Path, help="released checkpoint, such as base_01346.pth")
    parser.add_argument("--output_dir", type=Path, help="new folder; deit-b-nose40 and the like by default")
    parser.add_argument("--layers", help="removed layers, such as 0,1,3,4,6; read from the file's name otherwise")
    parser.add_argument("--base_model", help="folder or Hub id that names the classes and processes the images")
    options = parser.parse_args(arguments)
    from transformers.utils import logging

    from .convert import convert_checkpoint

    # The bars for reading and writing weights.
    logging.disable_progress_bar()
    folder = convert_checkpoint(options.file, options.output_dir, options.layers, options.base_model)
    sys.stdout.write(f"Written: {folder}\n")
