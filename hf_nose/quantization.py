"""Dynamic int8 quantisation of an ONNX file, and what it costs and gains on real images."""

from __future__ import annotations

import os
from typing import Any

import torch

from .export_onnx import OnnxClassifier, check_onnx_installed
from .images import ImageBatches
from .metrics import evaluate_model
from .profiling import hardware
from .timing import compare_throughput


# The matrix products. The patch embedding, a convolution, stays in float32.
OPERATORS = ("MatMul", "Gemm")


def quantize_onnx(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """
    Dynamic quantisation through onnxruntime: weights of matrix products to signed int8, activations at run time.

    Args:
        source (`str` or `os.PathLike`): a float32 ONNX file, see [`~hf_nose.export_onnx.export_onnx`].
        target (`str` or `os.PathLike`): the file to write.

    Raises:
        `ImportError`: where onnxruntime or onnx is not installed.
    """
    check_onnx_installed()
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(source)
    # Shapes that the exporter noted contradict those that the quantiser infers, which fails on them.
    del model.graph.value_info[:]
    quantize_dynamic(model, target, op_types_to_quantize=list(OPERATORS), weight_type=QuantType.QInt8)


def compare_int8(
    float32: str | os.PathLike[str], int8: str | os.PathLike[str], batches: ImageBatches, rounds: int = 20
) -> dict[str, Any]:
    """
    Accuracy of both files on the same images, and their speed side by side, interleaved, at the size of a batch.

    Returns:
        `dict`: `float32` and `int8`, each with `top1`, `top5`, `loss`, `num_images`, `images_per_s`, `quartiles`,
        `ratio_to_float32` and `bytes`; `batch_size`, `rounds` and `hardware`. A ratio of 1 or less is not faster.
    """
    files = {"float32": float32, "int8": int8}
    models = {name: OnnxClassifier(path) for name, path in files.items()}
    record: dict[str, Any] = {name: evaluate_model(model, batches, "cpu") for name, model in models.items()}
    batch = batches[0]["pixel_values"]
    speeds = compare_throughput(models, batch, rounds=rounds)
    for name, speed in speeds.items():
        speed["ratio_to_float32"] = speed.pop("ratio_to_first")
        record[name] |= {**speed, "bytes": os.path.getsize(files[name])}
    return {**record, "batch_size": len(batch), "rounds": rounds, "hardware": hardware("cpu", torch.float32)}
