"""A model as a graph without Python: `torch.export`, and ONNX checked against the model in onnxruntime."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import nn

from .modeling_nose_vit import NoseViTForImageClassification


INPUT, OUTPUT = "pixel_values", "logits"
# Of the greatest logit, in float32.
TOLERANCE = 1e-5
CHECKED_BATCHES = (1, 3, 16)
# One file can hold 2 GiB; larger weights go into a second one.
MAX_FILE_BYTES = 1_500_000_000
EXTRA = "install the extra, `pip install -e '.[onnx]'`"


class Logits(nn.Module):
    """From images to logits, one tensor to one tensor, with what only Python needs switched off."""

    def __init__(self, model: NoseViTForImageClassification):
        super().__init__()
        model = copy.deepcopy(model).float().eval()
        # Slices of the batch, counted in Python, would fix its size.
        model.config.chunk_size_feed_forward = model.config.chunk_size_attention = 0
        model.set_attn_implementation("sdpa")
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`pixel_values` (batch, channels, height, width) -> logits (batch, classes)."""
        return self.model(pixel_values).logits


def noise_images(model: NoseViTForImageClassification, count: int) -> torch.Tensor:
    """Seeded noise in the shape of the model's images, (count, channels, height, width), float32."""
    patches = model.vit.embeddings.patch_embeddings
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, patches.num_channels, *patches.image_size, generator=generator)


def export_program(model: NoseViTForImageClassification) -> torch.export.ExportedProgram:
    """
    `torch.export` of a model in evaluation mode, from images to logits, for any batch size.

    Args:
        model ([`NoseViTForImageClassification`]):
            Dense, diluted (at its present M) or folded; it is left as it is. Half precision is widened to float32,
            exactly.

    Raises:
        `ValueError`: for float64, which would be rounded.
    """
    if model.dtype == torch.float64:
        raise ValueError("model is float64, an exported graph computes in float32: call model.float() to round it.")
    shapes = {INPUT: {0: torch.export.Dim("batch")}}
    return torch.export.export(Logits(model).cpu(), (noise_images(model, 2),), dynamic_shapes=shapes)


def export_onnx(model: NoseViTForImageClassification, path: str | os.PathLike[str]) -> dict[str, Any]:
    """
    Writes an ONNX file with a dynamic batch, input `pixel_values` and output `logits`, and checks it in onnxruntime.

    Args:
        model ([`NoseViTForImageClassification`]): see [`export_program`].
        path (`str` or `os.PathLike`): the file; weights too large for one file go beside it, into `NAME.data`.

    Returns:
        `dict`: `opset`, and `max_relative_difference` of the logits by batch size, on seeded noise.

    Raises:
        `ImportError`: where onnx, onnxscript or onnxruntime is not installed.
        `ArithmeticError`: where the file's logits differ by more than 1e-5 of the greatest.
    """
    check_onnx_installed()
    exported = export_program(model)
    names: dict[str, Any] = {"input_names": [INPUT], "output_names": [OUTPUT]}
    program = cast("torch.onnx.ONNXProgram", torch.onnx.export(exported, dynamo=True, verbose=False, **names))
    # The exporter notes for every node where its Python stood on this machine.
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    program.save(str(path), external_data=weights > MAX_FILE_BYTES)
    batches = [noise_images(model, count) for count in CHECKED_BATCHES]
    return {
        "opset": program.model.opset_imports[""],
        "max_relative_difference": check_onnx(model, path, batches),
    }


def check_onnx(
    model: NoseViTForImageClassification, path: str | os.PathLike[str], batches: Sequence[torch.Tensor]
) -> dict[str, float]:
    """
    The greatest difference between the logits of the model and of the file, relative to the greatest logit, by size
    of the batch. `ArithmeticError` where it is above 1e-5.
    """
    reference, session = Logits(model).cpu(), OnnxClassifier(path)
    differences: dict[str, float] = {}
    for batch in batches:
        with torch.no_grad():
            wanted = reference(batch)
        found = session(batch).logits
        difference = float((found - wanted).abs().max() / wanted.abs().max())
        size = str(len(batch))
        differences[size] = max(difference, differences.get(size, 0.0))
        if not difference <= TOLERANCE:
            raise ArithmeticError(
                f"The logits of {Path(path).name} differ by {difference:.3g} of the greatest at batch {size}, at most "
                f"{TOLERANCE} is allowed; nothing was kept."
            )
    return differences


class OnnxClassifier(nn.Module):
    """
    An ONNX file in onnxruntime on the CPU, called like a model: `pixel_values` (batch, channels, height, width) ->
    an output with `logits` (batch, classes). It uses as many threads as torch.
    """

    def __init__(self, path: str | os.PathLike[str]):
        super().__init__()
        onnxruntime = check_onnx_installed()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        # Tells the dtype of the input, as the parameters of a model do.
        self.dtype_of_input = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, pixel_values: torch.Tensor) -> Any:
        from transformers.modeling_outputs import ImageClassifierOutput

        (logits,) = self.session.run([OUTPUT], {INPUT: pixel_values.numpy()})
        return ImageClassifierOutput(logits=torch.from_numpy(logits))


def check_onnx_installed() -> ModuleType:
    """onnxruntime; `ImportError` naming the extra where it, onnx or onnxscript is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError(f"ONNX needs {error.name}, which is not installed: {EXTRA}.") from error
    return onnxruntime
