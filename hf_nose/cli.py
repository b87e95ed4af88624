"""`hf-nose VERB`: a thin shell around the library; what is heavy is imported inside the verbs."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


VERBS = {
    "run": "dense ViT in, compressed checkpoint out: all stages",
    "profile": "entropy of every layer, in the folder of a run",
    "select": "search the layers to remove, in the folder of a run",
    "dilute": "train while the mask falls to 0, in the folder of a run",
    "fold": "remove the diluted attention, in the folder of a run",
    "report": "figures and report, in the folder of a run",
    "transfer": "train any model, dense or compressed, on another data set",
    "evaluate": "accuracy of any model, dense or compressed",
    "benchmark": "speed and memory of models side by side",
    "export": "a checkpoint as a folder that loads anywhere, as ONNX, or as a plain ViT",
    "push": "a checkpoint with its card to the Hub",
    "inspect": "what a checkpoint is: layers, M, costs",
    "convert": "a released .pth of the paper's authors into a folded checkpoint",
    "env": "versions and hardware, for a bug report",
}
OK, FAILED, BAD_INPUT, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `hf-nose`. Returns the exit code: 0, 1 unexpected, 2 bad input, 130 Ctrl-C, 143 SIGTERM."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    epilog = "\n".join(f"  {verb:<10}{text}" for verb, text in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="hf-nose",
        description="Smaller and faster Vision Transformers by removing attention layers.",
        epilog=f"verbs:\n{epilog}\n\n`hf-nose VERB --help` lists the options of a verb.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=VERBS, metavar="VERB")
    verb = parser.parse_args(arguments[:1]).verb
    return guarded(lambda: dispatch(verb, arguments[1:]))


def own_verb(verb: str) -> Callable[[list[str]], None] | None:
    """The function of a verb that reads its own words, imported when it is called."""
    if verb == "benchmark":
        from .benchmark_command import benchmark

        return benchmark
    if verb == "export":
        from .export_command import export

        return export
    if verb == "push":
        from .push import run_push

        return run_push
    if verb == "inspect":
        from .checkpoint_verbs import inspect_verb

        return inspect_verb
    if verb == "convert":
        from .checkpoint_verbs import convert_verb

        return convert_verb
    return {"env": environment, "evaluate": evaluate}.get(verb)


def dispatch(verb: str, arguments: list[str]) -> None:
    """Runs one verb."""
    own = own_verb(verb)
    if own is not None:
        return own(arguments)
    from transformers.utils import logging

    from .command_line import parse_settings

    # The bars for reading and writing weights; those of the stages stay.
    logging.disable_progress_bar()
    if verb == "run":
        settings = parse_settings(arguments, prog="hf-nose run")
        from .run import run_job

        run_job(settings)
        return None
    if verb == "transfer":
        from .command_line import parse_job
        from .transfer_settings import TransferSettings

        options = parse_job(TransferSettings, arguments, prog="hf-nose transfer")
        from .transfer import transfer_job

        transfer_job(options)
        return None
    parser = argparse.ArgumentParser(prog=f"hf-nose {verb}", add_help=False, allow_abbrev=False)
    parser.add_argument("folder", type=Path, nargs="?")
    folder, flags = parser.parse_known_args(arguments)
    if {"-h", "--help"} & set(flags):
        parse_settings(["--help"], prog=f"hf-nose {verb} DIR")
    if folder.folder is None:
        raise ValueError(f"Give the folder of a run: hf-nose {verb} DIR [settings].")
    from .run import folder_settings, rerun_stage

    base = folder_settings(folder.folder)
    flags += ["--output_dir", str(folder.folder)]
    rerun_stage(parse_settings(flags, prog=f"hf-nose {verb} DIR", base=base), verb)
    return None


def evaluate(arguments: list[str]) -> None:
    """`hf-nose evaluate`: accuracy of one model on one data set, as JSON on the last line."""
    parser = argparse.ArgumentParser(prog="hf-nose evaluate", allow_abbrev=False)
    parser.add_argument("--model", required=True, help="Hub id or folder, dense or compressed")
    parser.add_argument("--dataset", required=True, help="'digits', a parquet file, a folder or a Hub id")
    parser.add_argument("--eval_split", help="split to evaluate on")
    parser.add_argument("--image_column", help="column of images")
    parser.add_argument("--label_column", help="column of labels")
    parser.add_argument("--max_eval_samples", type=int, help="a sample of so many images")
    parser.add_argument("--eval_batch_size", type=int, default=64, help="images a forward")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample")
    options = parser.parse_args(arguments)
    from .evaluation import evaluate_checkpoint

    record = evaluate_checkpoint(**vars(options))
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write(json.dumps(record) + "\n")


def environment(arguments: list[str]) -> None:
    """`hf-nose env`: versions and hardware, without host name or paths."""
    argparse.ArgumentParser(prog="hf-nose env").parse_args(arguments)
    from .files import versions
    from .profiling import hardware

    sys.stdout.write(json.dumps({"versions": versions(), "hardware": hardware()}, indent=2) + "\n")


def guarded(verb: Callable[[], None]) -> int:
    """Turns errors that a person can act on into one line and an exit code; the rest keep their traceback."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    # A full disk shows as OSError, SafetensorError or RuntimeError, by writer; an extra not installed as ImportError.
    expected = (ValueError, OSError, ArithmeticError, RuntimeError, ImportError, StrictDataclassError, SafetensorError)
    handler = signal.signal(signal.SIGTERM, stop)
    try:
        verb()
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted. Finished stages and checkpoints are kept: continue with --resume.\n")
        return INTERRUPTED
    except Terminated:
        sys.stderr.write("\nTerminated. Finished stages and checkpoints are kept: continue with --resume.\n")
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
