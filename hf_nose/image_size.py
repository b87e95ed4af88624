"""Another image size for a trained model and its image processor, so that the saved checkpoint needs no flag."""

from __future__ import annotations

import torch
from transformers.image_processing_backends import PilBackend

from .configuration_nose_vit import NoseViTConfig
from .modeling_nose_vit import NoseViTForImageClassification


@torch.no_grad()
def with_image_size(model: NoseViTForImageClassification, image_size: int) -> NoseViTForImageClassification:
    """
    The model for square images of `image_size` pixels: its position embeddings are interpolated (bicubic, the class
    token's kept), as `interpolate_pos_encoding=True` does in every forward. Where it has that size it is returned as
    it is.

    Raises:
        `ValueError`: where the size is no multiple of the patch size, or the model's own images are not square.
    """
    embeddings, config = model.vit.embeddings, model.config
    patch, (height, width) = config.patch_size, embeddings.image_size
    if height != width or not isinstance(patch, int) or image_size < patch or image_size % patch:
        raise ValueError(
            f"image_size must be a multiple of the patch size {patch}, for a model of square images, got {image_size} "
            f"for one of {height}x{width}."
        )
    if image_size == height:
        return model
    resized: NoseViTForImageClassification = type(model)._from_config(
        NoseViTConfig.from_vit(config, image_size=image_size), dtype=model.dtype
    )
    own = resized.vit.embeddings.position_embeddings
    positions = embeddings.interpolate_pos_encoding(own, image_size, image_size)
    resized.load_state_dict({**model.state_dict(), "vit.embeddings.position_embeddings": positions})
    return resized.train(model.training)


def processor_with_size(processor: PilBackend, image_size: int) -> PilBackend:
    """
    The image processor for square images of `image_size` pixels. Where it crops, the size before the crop changes in
    proportion.
    """
    values = processor.to_dict()
    square = {"height": image_size, "width": image_size}
    if values.get("do_center_crop"):
        share = image_size / values["crop_size"]["height"]
        size = {edge: round(share * pixels) for edge, pixels in values["size"].items() if pixels is not None}
        values |= {"size": size, "crop_size": square}
    else:
        values |= {"size": square, "do_resize": True}
    return type(processor).from_dict(values)
