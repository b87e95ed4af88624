"""`hf-nose export MODEL --format hf|onnx|stock-vit|space`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .verbs import JSON_HELP, say_json, sizes, verb_parser


FORMATS = {
    "hf": "a folder that loads anywhere by the Auto classes",
    "onnx": "a graph for onnxruntime, batch of any size",
    "stock-vit": "a plain ViT, for whoever may run no code but transformers'; saves nothing",
    "space": "a page in the browser, dense and compressed side by side; a Gradio Space",
}


def export_parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = verb_parser("export")
    parser.add_argument(
        "model", metavar="MODEL", help="folder of a run or of a checkpoint, or Hub id, dense or compressed"
    )
    formats = "; ".join(f"{name}: {text}" for name, text in FORMATS.items())
    parser.add_argument("--format", choices=tuple(FORMATS), default="hf", help=formats)
    parser.add_argument("--output_dir", type=Path, help="RUN/export/FORMAT, or ./NAME-FORMAT, by default")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    card = parser.add_argument_group("hf and stock-vit")
    card.add_argument("--base_model_id", help="Hub id of the model that was compressed, where the run does not know")
    card.add_argument("--dataset_id", help="hf: Hub id of the data set that accuracy was measured on")
    card.add_argument("--task_id", help="hf: task registered for it; with both, .eval_results/ is written")
    space = parser.add_argument_group("space")
    space.add_argument("--dense", help="the model that was compressed, folder or Hub id; the run's own by default")
    onnx = parser.add_argument_group("onnx")
    onnx.add_argument("--int8", action="store_true", help="quantise as well: matrix products in int8, dynamically")
    onnx.add_argument("--dataset", help="int8: measure accuracy and speed on it: parquet, a folder, or a Hub id")
    onnx.add_argument("--eval_split", help="split to measure on")
    onnx.add_argument("--image_column", help="column of images")
    onnx.add_argument("--label_column", help="column of labels")
    onnx.add_argument("--max_eval_samples", type=int, help="a sample of so many images")
    onnx.add_argument("--eval_batch_size", type=int, help="images a forward, 32 by default")
    return parser


def parse_export(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the verb. `ValueError` for those that do not go together."""
    options = export_parser().parse_args(list(arguments))
    for name, formats_of, needs in (
        ("base_model_id", ("hf", "stock-vit"), None),
        ("dataset_id", ("hf",), None),
        ("task_id", ("hf",), None),
        ("dense", ("space",), None),
        ("int8", ("onnx",), None),
        ("dataset", ("onnx",), "int8"),
        ("eval_split", ("onnx",), "dataset"),
        ("image_column", ("onnx",), "dataset"),
        ("label_column", ("onnx",), "dataset"),
        ("max_eval_samples", ("onnx",), "dataset"),
        ("eval_batch_size", ("onnx",), "dataset"),
    ):
        if getattr(options, name) in (None, False):
            continue
        if options.format not in formats_of:
            raise ValueError(f"{name} belongs to --format {' or '.join(formats_of)}, not to {options.format}.")
        if needs is not None and not getattr(options, needs):
            raise ValueError(f"{name} needs --{needs}: add it, or leave {name} out.")
    return options


def default_folder(model: str, form: str) -> Path:
    """Inside a run its own `export/FORMAT`; for anything else `NAME-FORMAT` in the working folder."""
    if (Path(model) / "model").is_dir():
        return Path(model) / "export" / form
    return Path(f"{Path(model).resolve().name if Path(model).is_dir() else model.split('/')[-1]}-{form}")


def export(arguments: Sequence[str]) -> None:
    """Runs the verb."""
    options = parse_export(arguments)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # The exporter says of every operator of torchvision that it is not there.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    output = options.output_dir or default_folder(options.model, options.format)
    shared: dict[str, Any] = {"overwrite": options.overwrite}
    if options.format == "hf":
        from .export import export_folder

        ids = {name: getattr(options, name) for name in ("base_model_id", "dataset_id", "task_id")}
        export_folder(options.model, output, **shared, **ids)
    elif options.format == "stock-vit":
        from .stock_vit import export_stock_vit

        export_stock_vit(options.model, output, base_model_id=options.base_model_id, **shared)
    elif options.format == "space":
        from .export_space import export_space

        export_space(options.model, output, dense=options.dense, **shared)
    else:
        from .export_onnx_folder import export_onnx_folder

        names = ("int8", "dataset", "eval_split", "image_column", "label_column", "max_eval_samples")
        measure = {name: getattr(options, name) for name in names}
        measure |= {"eval_batch_size": options.eval_batch_size} if options.eval_batch_size else {}
        export_onnx_folder(options.model, output, **shared, **measure)
    files = sizes(output)
    if options.json:
        say_json({"output_dir": str(output), "format": options.format, "files": files})
    else:
        sys.stdout.write("".join(f"{size:>13,}  {name}\n" for name, size in files.items()))
        sys.stdout.write(f"Written to {output}\n")
