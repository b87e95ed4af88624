"""The verbs of `hf-nose`: what each is for, what it writes, and what is left when it is stopped; quick to import."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


RESUME = "Finished stages and checkpoints are kept: continue with --resume."
AGAIN = "Nothing was written: start it again."
KEPT = "What was there is kept: start it again."
JSON_HELP = "print the result as JSON, on the last line; everything else goes to stderr"


@dataclass(frozen=True)
class Verb:
    """What a verb is for, what it writes (the end of its help), and what a person reads who has stopped it."""

    text: str
    writes: str
    stopped: str


VERBS = {
    "run": Verb(
        "dense ViT in, compressed checkpoint out: all stages",
        "Writes the run's folder: a JSON record a stage, model/, figures/, report.md, settings.yaml.",
        RESUME,
    ),
    "profile": Verb(
        "entropy of every layer, in the folder of a run",
        "Writes DIR/profile.json, and drops the report that was made of the old one.",
        KEPT,
    ),
    "select": Verb(
        "search the layers to remove, in the folder of a run",
        "Writes DIR/selection.json, and drops what later stages had made of the old one.",
        KEPT,
    ),
    "dilute": Verb(
        "train while the mask falls to 0, in the folder of a run",
        "Writes DIR/diluted/ and DIR/dilution.json, and drops what later stages had made of the old ones.",
        "Its checkpoints are kept: continue with `hf-nose run --output_dir DIR --resume`.",
    ),
    "fold": Verb(
        "remove the diluted attention, in the folder of a run",
        "Writes DIR/model/ and DIR/fold.json, and drops what later stages had made of the old ones.",
        KEPT,
    ),
    "report": Verb(
        "figures and report, in the folder of a run",
        "Writes DIR/report.md and DIR/figures/, from the records that are there.",
        KEPT,
    ),
    "transfer": Verb(
        "train any model, dense or compressed, on another data set",
        "Writes the job's folder: model/, metrics.json, settings.yaml.",
        RESUME,
    ),
    "evaluate": Verb(
        "accuracy of any model, dense or compressed",
        "Writes no file; the result is on the screen.",
        AGAIN,
    ),
    "benchmark": Verb(
        "speed and memory of models side by side",
        "Writes tables to the screen; to --output_dir a record of this machine as JSON and CSV, tables, and a plot.",
        "With --output_dir what was measured is kept, and the same line goes on from there.",
    ),
    "export": Verb(
        "a checkpoint as a folder that loads anywhere, ONNX, a plain ViT, or a page in the browser",
        "Writes one folder, whole or not at all: --output_dir, else RUN/export/FORMAT or ./NAME-FORMAT.",
        "Nothing was written, and an earlier export is as it was: start it again.",
    ),
    "push": Verb(
        "a checkpoint with its card to the Hub",
        "Writes one commit to the Hub, and RUN/export/FORMAT where a run has none yet.",
        "The folder is as it was, and what has arrived is not sent twice: push again.",
    ),
    "inspect": Verb(
        "what a checkpoint is: layers, M, costs",
        "Writes no file; of a Hub id, what was fetched stays in the Hub's cache.",
        AGAIN,
    ),
    "convert": Verb(
        "a released .pth of the paper's authors into a folded checkpoint",
        "Writes one folder, whole or not at all: --output_dir, else ./deit-b-nose40 and the like.",
        AGAIN,
    ),
    "env": Verb(
        "versions and hardware, for a bug report",
        "Writes no file.",
        AGAIN,
    ),
}


def verb_parser(verb: str, description: str | None = None) -> argparse.ArgumentParser:
    """The parser of a verb that reads its own words."""
    return argparse.ArgumentParser(
        prog=f"hf-nose {verb}",
        description=description or f"{VERBS[verb].text[0].upper()}{VERBS[verb].text[1:]}.",
        epilog=VERBS[verb].writes,
        allow_abbrev=False,
    )


def underscored(word: str) -> str:
    """An option as it is written here: `--output-dir=x` is `--output_dir=x`."""
    name, sign, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{sign}{value}" if word.startswith("--") else word


def say_json(record: Any) -> None:
    """A result for programs: one line, the last of stdout."""
    sys.stdout.write(json.dumps(record) + "\n")


def sizes(folder: Path) -> dict[str, int]:
    """Bytes by file, every file below `folder`."""
    found = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return dict(sorted(found.items()))
