"""
Smaller and faster Vision Transformers by removing attention layers ("MLP Can Be A Good Transformer Learner").

Importing the package registers its model with the Auto classes, so `AutoModel.from_pretrained` and `pipeline` load a
compressed checkpoint. What needs the Trainer, datasets or evaluate is imported when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers.models.vit import ViTImageProcessorPil

from .backbone_nose_vit import NoseViTBackbone
from .configuration_nose_vit import NoseViTConfig, __version__
from .modeling_nose_vit import NoseViTForImageClassification, NoseViTModel, NoseViTPreTrainedModel


if TYPE_CHECKING:
    from .dilution import DilutionCallback
    from .entropy import Moments, layer_profile
    from .metrics import TopKAccuracy
    from .scoring import SetScorer
    from .selection import Selection, select_attention_layers
    from .surgery import fold
    from .training import NoseTrainer

AutoConfig.register("nose_vit", NoseViTConfig)
AutoModel.register(NoseViTConfig, NoseViTModel)
AutoModelForImageClassification.register(NoseViTConfig, NoseViTForImageClassification)
AutoBackbone.register(NoseViTConfig, NoseViTBackbone)
AutoImageProcessor.register(NoseViTConfig, image_processor_classes={"pil": ViTImageProcessorPil})

LAZY = {
    "DilutionCallback": "dilution",
    "Moments": "entropy",
    "NoseTrainer": "training",
    "Selection": "selection",
    "SetScorer": "scoring",
    "TopKAccuracy": "metrics",
    "fold": "surgery",
    "layer_profile": "entropy",
    "select_attention_layers": "selection",
}


def __getattr__(name: str) -> Any:
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{LAZY[name]}", __name__), name)


__all__ = [
    "DilutionCallback",
    "Moments",
    "NoseTrainer",
    "NoseViTBackbone",
    "NoseViTConfig",
    "NoseViTForImageClassification",
    "NoseViTModel",
    "NoseViTPreTrainedModel",
    "Selection",
    "SetScorer",
    "TopKAccuracy",
    "__version__",
    "fold",
    "layer_profile",
    "select_attention_layers",
]
