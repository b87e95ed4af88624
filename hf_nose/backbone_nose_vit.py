"""A NoseViT as the backbone of detection and segmentation models.

This file travels to the Hub beside the weights: it imports nothing but torch, transformers and its neighbours.
"""

import torch
from torch.nn.functional import layer_norm
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import BackboneOutput
from transformers.utils.generic import can_return_tuple

from .configuration_nose_vit import NoseViTConfig
from .modeling_nose_vit import NoseViTModel, NoseViTPreTrainedModel


class NoseViTBackbone(BackboneMixin, NoseViTPreTrainedModel):
    """Feature maps of chosen stages. Its keys are those of the classifier, whose weights therefore load unmapped."""

    def __init__(self, config: NoseViTConfig):
        config.use_pooler = False
        super().__init__(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.vit = NoseViTModel(config)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self, pixel_values: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> BackboneOutput:
        """`pixel_values` (batch, channels, height, width) -> maps (batch, hidden, height / patch, width / patch)."""
        embeddings = self.vit.embeddings
        size, patch = tuple(pixel_values.shape[-2:]), embeddings.patch_embeddings.patch_size
        kwargs.setdefault("interpolate_pos_encoding", size != tuple(embeddings.image_size))
        outputs = self.vit(pixel_values, attention_mask=attention_mask, **kwargs)
        norm, feature_maps = self.vit.layernorm, []
        for stage, state in zip(self.stage_names, outputs.hidden_states, strict=True):
            if stage in self.out_features:
                if self.config.apply_layernorm:
                    # The states are unfolded here, so the unfolded eps belongs to them.
                    state = layer_norm(state, state.shape[-1:], norm.weight, norm.bias, self.config.layer_norm_eps)
                patches = state[:, 1:].unflatten(1, (size[0] // patch[0], size[1] // patch[1]))
                feature_maps.append(patches.permute(0, 3, 1, 2).contiguous())
        return BackboneOutput(
            feature_maps=tuple(feature_maps), hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = ["NoseViTBackbone"]
