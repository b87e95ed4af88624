"""`hf-nose evaluate`, `inspect`, `convert`, `env`: their command lines; what is heavy is imported after those."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .verbs import JSON_HELP, say_json, sizes, verb_parser


def evaluate_parser() -> argparse.ArgumentParser:
    """The options of `hf-nose evaluate`."""
    parser = verb_parser("evaluate")
    parser.add_argument("--model", required=True, help="Hub id or folder, dense or compressed")
    parser.add_argument("--dataset", required=True, help="'digits', a parquet file, a folder or a Hub id")
    parser.add_argument("--eval_split", help="split to evaluate on")
    parser.add_argument("--image_column", help="column of images")
    parser.add_argument("--label_column", help="column of labels")
    parser.add_argument("--max_eval_samples", type=int, help="a sample of so many images")
    parser.add_argument("--eval_batch_size", type=int, default=64, help="images a forward")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample")
    parser.add_argument("--json", action="store_true", help=f"{JSON_HELP}; it is printed without, too")
    return parser


def evaluate(arguments: Sequence[str]) -> None:
    """`hf-nose evaluate`: accuracy of one model on one data set."""
    options = vars(evaluate_parser().parse_args(arguments))
    is_json = options.pop("json")
    from .evaluation import evaluate_checkpoint

    record = evaluate_checkpoint(**options)
    if os.environ.get("RANK", "0") != "0":
        return
    if not is_json:
        figures = f"top-1 {record['top1']:.2%}, top-5 {record['top5']:.2%}, loss {record['loss']:.4f}"
        sys.stdout.write(f"{figures}, {record['num_images']} images\n")
    say_json(record)


def inspect_parser() -> argparse.ArgumentParser:
    """The options of `hf-nose inspect`."""
    parser = verb_parser("inspect")
    parser.add_argument("model", metavar="MODEL", help="folder of a checkpoint, or Hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    return parser


def inspect(arguments: Sequence[str]) -> None:
    """`hf-nose inspect`: what a checkpoint is, for people or programs."""
    options = inspect_parser().parse_args(arguments)
    from .inspection import described, inspect_checkpoint

    record = inspect_checkpoint(options.model, options.revision)
    if options.json:
        say_json(record)
    else:
        sys.stdout.write(described(record) + "\n")


def convert_parser() -> argparse.ArgumentParser:
    """The options of `hf-nose convert`."""
    parser = verb_parser("convert")
    parser.add_argument("file", type=Path, metavar="FILE", help="released checkpoint, such as base_01346.pth")
    parser.add_argument("--output_dir", type=Path, help="new folder; deit-b-nose40 and the like by default")
    parser.add_argument("--layers", help="removed layers, such as 0,1,3,4,6; read from the file's name otherwise")
    parser.add_argument("--base_model", help="folder or Hub id that names the classes and processes the images")
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    return parser


def convert(arguments: Sequence[str]) -> None:
    """`hf-nose convert`: a released checkpoint of the paper's authors as a folded NoseViT."""
    options = convert_parser().parse_args(arguments)
    from transformers.utils import logging

    from .convert import convert_checkpoint

    # The bars for reading and writing weights.
    logging.disable_progress_bar()
    folder = convert_checkpoint(options.file, options.output_dir, options.layers, options.base_model)
    if options.json:
        say_json({"output_dir": str(folder), "files": sizes(folder)})
    else:
        sys.stdout.write(f"Written to {folder}\n")


def env_parser() -> argparse.ArgumentParser:
    """The options of `hf-nose env`."""
    parser = verb_parser("env")
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    return parser


def env(arguments: Sequence[str]) -> None:
    """`hf-nose env`: versions and hardware, without host name or paths."""
    options = env_parser().parse_args(arguments)
    from .files import versions
    from .profiling import hardware

    record = {"versions": versions(), "hardware": hardware()}
    if options.json:
        say_json(record)
    else:
        sys.stdout.write(json.dumps(record, indent=2) + "\n")
