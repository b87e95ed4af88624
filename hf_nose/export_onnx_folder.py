"""A folder with the ONNX file of a checkpoint, its configuration and image processor, and what was checked of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .evaluation import evaluation_images
from .export import exported
from .export_onnx import INPUT, OUTPUT, check_onnx_installed, export_onnx
from .export_source import open_source
from .files import write_json
from .images import ImageBatches
from .quantization import OPERATORS, compare_int8, quantize_onnx


def export_onnx_folder(
    source: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    int8: bool = False,
    dataset: str | None = None,
    eval_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    max_eval_samples: int | None = None,
    eval_batch_size: int = 32,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """
    Writes `model.onnx` with a dynamic batch, `config.json`, `preprocessor_config.json`, and `onnx.json`: how far its
    logits are from the model's; with `int8` also `model_int8.onnx` and, where there is a `dataset`, its accuracy and
    speed beside float32's.

    Args:
        source, output_dir, overwrite: see [`~hf_nose.export.export_folder`].
        int8 (`bool`, *optional*, defaults to `False`): quantise, see [`~hf_nose.quantization.quantize_onnx`].
        dataset (`str`, *optional*): real images to measure both files on.
        eval_split, image_column, label_column, max_eval_samples, eval_batch_size, seed: as in `hf-nose evaluate`.

    Raises:
        `ImportError`: where the extra `onnx` is not installed.
        `ValueError`: as `export_folder`, and where the data cannot be used.
        `ArithmeticError`: where the file's logits are not the model's.
    """
    check_onnx_installed()
    opened = open_source(source)
    model, processor = opened.load(), opened.processor()
    batches = None
    if dataset is not None:
        images, _ = evaluation_images(
            dataset,
            processor,
            model.num_labels,
            image_column=image_column,
            label_column=label_column,
            seed=seed,
            eval_split=eval_split,
            max_eval_samples=max_eval_samples,
        )
        batches = ImageBatches(images, eval_batch_size)
    with exported(opened, output_dir, overwrite) as folder:
        model.config.save_pretrained(folder)
        processor.save_pretrained(folder)
        record: dict[str, Any] = {"input": INPUT, "output": OUTPUT, **export_onnx(model, folder / "model.onnx")}
        if int8:
            quantize_onnx(folder / "model.onnx", folder / "model_int8.onnx")
            record["int8"] = {"operators": list(OPERATORS), "weights": "signed, one scale a tensor"}
            if batches is not None:
                record["measured"] = compare_int8(folder / "model.onnx", folder / "model_int8.onnx", batches)
        write_json(folder / "onnx.json", record)
    return Path(output_dir)
