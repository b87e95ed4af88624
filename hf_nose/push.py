"""`hf-nose push`: a run by its export, or any other checkpoint's folder with a card, to the Hub."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from .card_text import CARD, own_card
from .files import put_back, read_json, write_text
from .records import RECORDS
from .verbs import JSON_HELP, say_json, verb_parser


if TYPE_CHECKING:
    from .hub import Push

# What `hf-nose export` leaves in a run's export/FORMAT, and the branch it is pushed to unless another is named.
BRANCHES = {"hf": None, "stock-vit": "stock"}


def push_parser() -> argparse.ArgumentParser:
    """What `hf-nose push` can be told."""
    parser = verb_parser(
        "push",
        "Sends a checkpoint with its card to the Hub in one commit; repeat a push that failed. The token is that of "
        "`hf auth login` or HF_TOKEN.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, or of a checkpoint with a card")
    parser.add_argument("--repo_id", metavar="ID", help="OWNER/NAME, or NAME for your own; the run's name by default")
    parser.add_argument(
        "--format", choices=tuple(BRANCHES), default="hf", help="which export of the run; stock-vit is revision stock"
    )
    parser.add_argument("--private", action="store_true", help="make the repository private")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--create_pr", action="store_true", help="open a pull request instead of committing")
    where.add_argument("--revision", metavar="BRANCH", help="branch of a variant, made where there is none")
    parser.add_argument("--dry_run", action="store_true", help="list the files and their sizes, send nothing")
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    return parser


def run_push(arguments: list[str]) -> None:
    """`hf-nose push`."""
    options = vars(push_parser().parse_args(arguments))
    run, form, as_json, is_dry = (options.pop(name) for name in ("run", "format", "json", "dry_run"))
    options["repo_id"] = options["repo_id"] or default_name(run)
    options["revision"] = options["revision"] or BRANCHES[form]
    if is_dry:
        from .hub import check_push

        with exported(run, form, is_kept=False) as folder:
            files = check_push(folder, options["repo_id"], options["create_pr"], options["revision"])
        record: dict[str, Any] = {"dry_run": True, "repo_id": options["repo_id"], "files": files}
        text = file_table(files) + f"\nDry run: nothing was sent to {options['repo_id']}."
    else:
        done = push_run(run, form, **options)
        record, text = asdict(done), last_words(done)
    if as_json:
        say_json(record)
    else:
        sys.stdout.write(text + "\n")


def push_run(run: Path, form: str = "hf", **options: Any) -> Push:
    """Pushes a run by its export; see [`~hf_nose.hub.push_folder`]."""
    from .hub import push_folder

    with exported(run, form) as folder:
        return push_folder(folder, base_model=base_model(run), **options)


def push_finished(run: Path, repo_id: str | None, private: bool) -> str:
    """The last step of a run with `push_to_hub`; what was pushed, in words. The run stays finished if it fails."""
    from .hub import PushError

    repo_id = repo_id or default_name(run)
    try:
        return last_words(push_run(run, repo_id=repo_id, private=private))
    except PushError as error:
        again = f"hf-nose push {run} --repo_id {repo_id}{' --private' if private else ''}"
        raise PushError(f"The run is finished, but the push is not. {error} Repeat it by `{again}`.") from None


@contextmanager
def exported(run: Path, form: str = "hf", is_kept: bool = True) -> Iterator[Path]:
    """
    The folder that a push of `run` sends: `run` itself where that is a checkpoint, else its export. One that is there
    is sent as it is, with whatever was written into its card; where there is none it is made, and kept or not.

    Raises:
        `ValueError`: for another format than a checkpoint's own.
        [`~hf_nose.hub.PushError`]: where an export was made around a card that somebody had written for an earlier
            one, of another result of the run. The next push sends it.
    """
    from .export_source import check_inside
    from .hub import PushError

    own = run / "export" / form
    if form != "hf" and (run / "config.json").is_file():
        raise ValueError(
            f"format {form} belongs to a run: push {run} without it, or export it as {form} and push that."
        )
    put_back(own)
    found = [folder for folder in (run, own) if (folder / "config.json").is_file()]
    check_inside(iter(found), run)
    if found:
        yield found[0]
        return
    words = own_card(own)
    if is_kept:
        made = export(run, own, form)
        if words is not None:
            raise PushError(
                f"Nothing was sent: {own / CARD} was written before the run was run again. See that it still says "
                "the truth, or delete it, and push again."
            )
        yield made
        return
    with TemporaryDirectory() as place:
        made = export(run, Path(place) / form, form)
        if words is not None:
            write_text(made / CARD, words)
        yield made


def export(run: Path, folder: Path, form: str) -> Path:
    """What `hf-nose export` makes of a run."""
    if form == "hf":
        from .export import export_folder

        return export_folder(run, folder)
    from .stock_vit import export_stock_vit

    return export_stock_vit(run, folder)


def base_model(run: Path) -> str | None:
    """The Hub id of the dense model that a run started from, where it has one."""
    path = run / RECORDS["prepare"]
    return read_json(path)["model"]["base_model_id"] if path.is_file() else None


def default_name(run: Path) -> str:
    """
    The repository's name: the folder's, of a run by default its recipe's, of a converted file the recipe's, too;
    `ValueError` for any other folder.
    """
    if not any((run / name).is_file() for name in ("settings.yaml", "conversion.json")):
        raise ValueError(f"{run} is not the folder of a run, whose name could be the repository's: give --repo_id.")
    return run.resolve().name


def file_table(files: dict[str, int]) -> str:
    """Files with their sizes, and the sum, for people."""
    rows = [*files.items(), (f"{len(files)} files", sum(files.values()))]
    return "\n".join(f"{size:>15,} bytes  {name}" for name, size in rows)


def last_words(done: Push) -> str:
    """What was pushed and how it is loaded, for people."""
    where = "" if done.revision == "main" else f', revision="{done.revision}"'
    load = f'AutoModelForImageClassification.from_pretrained("{done.repo_id}"{where}, trust_remote_code=True)'
    what = f"{len(done.files)} files, {sum(done.files.values()):,} bytes" if done.is_new else "Nothing has changed"
    lines = [f"{what}: {done.pull_request or done.url}", "Load it:", load]
    if done.is_card_kept:
        lines.insert(1, "The card that somebody has written there stays; one with words of yours would replace it.")
    return "\n".join(lines)
