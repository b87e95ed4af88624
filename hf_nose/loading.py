"""A classifier from a folder or Hub id, its weights named where they are damaged."""

from __future__ import annotations

import os
from typing import Any

from safetensors import SafetensorError

from .modeling_nose_vit import NoseViTForImageClassification


def load_classifier(source: str | os.PathLike[str], **options: Any) -> NoseViTForImageClassification:
    """
    A ViT or NoseViT classifier as a NoseViT, in evaluation mode.

    Args:
        source (`str` or `os.PathLike`): a folder or a Hub id.
        options: see [`NoseViTPreTrainedModel.from_vit`].

    Raises:
        `ValueError`: where the weights are corrupt or truncated, or as `from_vit` does.
    """
    try:
        return NoseViTForImageClassification.from_vit(os.fspath(source), **options).eval()
    except SafetensorError as error:
        raise ValueError(f"The weights of {source} are corrupt or truncated: {error}.") from error
