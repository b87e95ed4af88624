"""`hf-nose benchmark`: speed and memory of models side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .verbs import JSON_HELP, say_json, verb_parser


DESCRIPTION = """
Speed and memory of models side by side, in turn in one process: transformers' own ViT first, its dense NoseViT, and
what is left after every removal. Says "not faster" where that is so.
"""
MODEL_HELP = (
    "Hub id or folder, dense or compressed; or deit-tiny, deit-small, deit-base with random weights; repeatable"
)


def comma_separated(text: str) -> list[str]:
    """`"a, b"` as a list."""
    return [part.strip() for part in text.split(",") if part.strip()]


def benchmark_parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = verb_parser("benchmark", DESCRIPTION)
    add = parser.add_argument
    add("--model", dest="models", action="append", required=True, help=MODEL_HELP)
    add("--removed", action="append", default=[], help="layers such as 0,1,3,4,6, or a share such as 40%%; repeatable")
    add("--batch_sizes", type=comma_separated, default=["1", "8", "32"], help="images a forward; 'max' fills a budget")
    add("--dtypes", type=comma_separated, default=["float32"], help="among float32,bfloat16,float16")
    add("--attention", dest="attentions", type=comma_separated, default=["sdpa"], help="among eager,sdpa,flash")
    add("--compile", dest="torch_compile", action="store_true", help="compile every model, as one graph")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    add("--threads", type=int, help="threads of torch on a CPU")
    add("--rounds", type=int, default=20, help="timed forwards of each model, at least 6; 0 measures memory only")
    add("--warmup", type=int, default=3, help="rounds before, not timed")
    add("--memory", action="store_true", help="also the peak of memory at every batch size, in fresh processes")
    add("--memory_budget", help="a size such as 10GB: how many images every model fits into it")
    add("--chunk_size_feed_forward", type=int, default=0, help="tokens a slice of an MLP, beside whole ones")
    add("--chunk_size_attention", type=int, default=0, help="images a slice of an attention layer, beside whole ones")
    add("--fuse_qkv", action="store_true", help="q, k and v as one matrix product, beside three")
    add("--output_dir", type=Path, help="where JSON, CSV, tables and plot go; continues what stands there")
    add("--overwrite", action="store_true", help="begin anew there")
    add("--json", action="store_true", help=JSON_HELP)
    return parser


def benchmark(arguments: Sequence[str]) -> None:
    """Runs the verb: what is going on to stderr, tables (or JSON) to stdout, files to the folder."""
    values = vars(benchmark_parser().parse_args(arguments))
    folder, overwrite, as_json = (values.pop(name) for name in ("output_dir", "overwrite", "json"))
    from transformers.utils import logging

    from .benchmark import BenchmarkOptions, run_benchmark
    from .benchmark_tables import tables, write_tables
    from .files import stamped

    # The bars for reading weights.
    logging.disable_progress_bar()
    options = BenchmarkOptions(**values)
    path, record = run_benchmark(options, folder, overwrite, lambda text: sys.stderr.write(f"{text}\n"))
    if path is not None:
        from .benchmark_figures import draw_pareto

        write_tables(record, path)
        draw_pareto(record, path.with_suffix(".png"))
    if as_json:
        say_json(stamped(record))
    else:
        sys.stdout.write(tables(record))
