"""`hf-nose VERB`: a thin shell around the library; what is heavy is imported inside the verbs."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

from .verbs import JSON_HELP, VERBS, say_json, underscored


OK, FAILED, BAD_INPUT, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
EXIT_CODES = {
    OK: "done",
    FAILED: "failed: the disk, the network, the Hub, a number that is not finite; or a mistake of hf_nose itself",
    BAD_INPUT: "bad input: an option, a setting, a file",
    INTERRUPTED: "interrupted by Ctrl-C",
    TERMINATED: "terminated by SIGTERM",
}
# The verbs that are told what the main job is told, in the folder of a run.
STAGE_VERBS = ("profile", "select", "dilute", "fold", "report")
SHELLS = ("bash", "zsh", "tcsh")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `hf-nose`. Returns the exit code, one of `EXIT_CODES`; argparse ends with its own 0 and 2."""
    arguments = [underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
    parser = main_parser()
    is_completion = arguments[:1] and arguments[0].startswith("--print_completion")
    options = parser.parse_args(arguments if is_completion else arguments[:1])
    if options.print_completion is not None:
        return guarded(lambda: print_completion(options.print_completion), "Nothing was written.")
    if options.verb is None:
        parser.error("VERB is missing")
    return guarded(lambda: dispatch(options.verb, arguments[1:]), VERBS[options.verb].stopped)


def main_parser() -> argparse.ArgumentParser:
    """What stands before the verb."""
    verbs = "\n".join(f"  {name:<10}{verb.text}" for name, verb in VERBS.items())
    codes = "\n".join(f"  {code:<10}{text}" for code, text in EXIT_CODES.items())
    parser = argparse.ArgumentParser(
        prog="hf-nose",
        description="Smaller and faster Vision Transformers by removing attention layers.",
        epilog=f"verbs:\n{verbs}\n\nexit codes:\n{codes}\n\n`hf-nose VERB --help` lists the options of a verb.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("verb", choices=VERBS, metavar="VERB", nargs="?")
    parser.add_argument(
        "--print_completion",
        "--print-completion",
        choices=SHELLS,
        help="write what completes verbs and options in that shell",
    )
    return parser


def own_verb(verb: str) -> tuple[Callable[[], argparse.ArgumentParser], Callable[[list[str]], None]] | None:
    """The parser and the function of a verb that reads its own words, imported when they are asked for."""
    if verb == "benchmark":
        from .benchmark_command import benchmark, benchmark_parser

        return benchmark_parser, benchmark
    if verb == "export":
        from .export_command import export, export_parser

        return export_parser, export
    if verb == "push":
        from .push import push_parser, run_push

        return push_parser, run_push
    from . import checkpoint_verbs

    own: dict[str, tuple[Callable[[], argparse.ArgumentParser], Callable[[list[str]], None]]] = {
        "evaluate": (checkpoint_verbs.evaluate_parser, checkpoint_verbs.evaluate),
        "inspect": (checkpoint_verbs.inspect_parser, checkpoint_verbs.inspect),
        "convert": (checkpoint_verbs.convert_parser, checkpoint_verbs.convert),
        "env": (checkpoint_verbs.env_parser, checkpoint_verbs.env),
    }
    return own.get(verb)


def verb_parser(verb: str) -> argparse.ArgumentParser:
    """All that a verb can be told: what its help lists, and what a shell completes."""
    own = own_verb(verb)
    if own is not None:
        return own[0]()
    from .command_line import settings_parser
    from .settings import Settings
    from .transfer_settings import TransferSettings

    parser = settings_parser(f"hf-nose {verb}", TransferSettings if verb == "transfer" else Settings)
    parser.epilog = VERBS[verb].writes
    if verb in STAGE_VERBS:
        parser.add_argument("folder", type=Path, metavar="DIR", help="folder of a run")
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    return parser


def dispatch(verb: str, arguments: list[str]) -> None:
    """Runs one verb."""
    own = own_verb(verb)
    if own is not None:
        return own[1](arguments)
    if {"-h", "--help"} & set(arguments):
        verb_parser(verb).parse_args(["--help"])
    from transformers.utils import logging

    # The bars for reading and writing weights; those of the stages stay.
    logging.disable_progress_bar()
    is_json = "--json" in arguments
    words = [word for word in arguments if word != "--json"]
    with redirect_stdout(sys.stderr) if is_json else nullcontext():
        is_main, folder, path = run_words(verb, words)
    if is_json and is_main:
        from .files import read_json

        say_json({"output_dir": str(folder), "record": read_json(path) if path.is_file() else None})
    return None


def run_words(verb: str, arguments: list[str]) -> tuple[bool, Path, Path]:
    """Runs a job, or one stage of it: whether this process speaks for all, the folder, and the result's record."""
    from .command_line import parse_job, parse_settings
    from .records import RECORDS

    if verb == "run":
        settings = parse_settings(arguments, prog="hf-nose run")
        from .run import run_job

        run = run_job(settings)
        return run.is_main, run.folder, run.folder / RECORDS["evaluate"]
    if verb == "transfer":
        from .transfer_settings import TransferSettings

        options = parse_job(TransferSettings, arguments, prog="hf-nose transfer")
        from .transfer import transfer_job

        job = transfer_job(options)
        return job.is_main, job.folder, job.folder / RECORDS["transfer"]
    if not arguments or arguments[0].startswith("-"):
        raise ValueError(f"Give the folder of a run first: hf-nose {verb} DIR [settings].")
    from .run import folder_settings, rerun_stage

    base = folder_settings(Path(arguments[0]))
    flags = [*arguments[1:], "--output_dir", arguments[0]]
    run = rerun_stage(parse_settings(flags, prog=f"hf-nose {verb} DIR", base=base), verb)
    return run.is_main, run.folder, run.folder / RECORDS[verb]


def print_completion(shell: str) -> None:
    """Writes what a shell reads to complete `hf-nose`."""
    from .completion import completion_script

    sys.stdout.write(completion_script(main_parser(), {verb: verb_parser(verb) for verb in VERBS}, shell))


def guarded(verb: Callable[[], None], stopped: str) -> int:
    """
    Turns errors that a person can act on into one line and an exit code; the rest keep their traceback. `stopped` says
    what is left where somebody stops the verb.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    # A full disk shows as OSError, SafetensorError or RuntimeError, by writer; an extra not installed as ImportError.
    expected = (ValueError, OSError, ArithmeticError, RuntimeError, ImportError, StrictDataclassError, SafetensorError)
    handler = signal.signal(signal.SIGTERM, stop)
    try:
        verb()
    except KeyboardInterrupt:
        sys.stderr.write(f"\nInterrupted. {stopped}\n")
        return INTERRUPTED
    except Terminated:
        sys.stderr.write(f"\nTerminated. {stopped}\n")
        return TERMINATED
    except expected as error:
        if os.environ.get("HF_NOSE_TRACEBACK"):
            raise
        # Some messages have several lines: those of the configuration, of YAML, of torch.
        sys.stderr.write(f"hf-nose: {' '.join(str(error).split())}\n(HF_NOSE_TRACEBACK=1 shows where.)\n")
        return BAD_INPUT if isinstance(error, ValueError | StrictDataclassError) else FAILED
    finally:
        signal.signal(signal.SIGTERM, handler)
    return OK


class Terminated(BaseException):
    """SIGTERM arrived; like KeyboardInterrupt, nothing but the top level may catch it."""


def stop(_signal: int, _frame: object) -> None:
    """Signal handler: ends the verb through its `finally` blocks."""
    raise Terminated


if __name__ == "__main__":
    sys.exit(main())
