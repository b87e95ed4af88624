"""A Vision Transformer whose attention layers are kept, diluted or removed, as the configuration says.

This file travels to the Hub beside the weights: it imports nothing but torch, transformers and its neighbours.
Equation numbers are those of "MLP Can Be A Good Transformer Learner" (arXiv 2404.05657).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.models.vit.modeling_vit import ViTEmbeddings, ViTPooler, ViTPreTrainedModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_nose_vit import NoseViTAttention
from .block_nose_vit import NoseViTLayer
from .configuration_nose_vit import NoseViTConfig
from .conversion_nose_vit import check_loading, convert_vit
from .states_nose_vit import BlockStates, sync_gains_after_loading
from .stream_nose_vit import class_token_mask, last_attention, rescale_hidden_states, tail_changes_nothing


if TYPE_CHECKING:
    # For transformers, which copies what a file says it imports: a model saved again keeps its backbone's code.
    from .backbone_nose_vit import NoseViTBackbone  # noqa: F401

MASK_GAINS = {"skip": 1, "double": 2}


class NoseViTPreTrainedModel(ViTPreTrainedModel):
    """Loading, `from_vit`, and the only ways to change the state of a block in place."""

    config: NoseViTConfig
    config_class = NoseViTConfig
    base_model_prefix = "vit"
    _no_split_modules = ["ViTEmbeddings", "NoseViTLayer"]
    _can_record_outputs = {"hidden_states": NoseViTLayer, "attentions": NoseViTAttention}
    # M must not be rounded by a half-precision load.
    _keep_in_fp32_modules_strict = ["dilution_mask"]

    def __init__(self, config: NoseViTConfig, *args, **kwargs):
        # Arguments of `from_pretrained` and assignments reach a config after its own validation.
        config.validate()
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, NoseViTModel) and module.dilution_mask is not None:
            init.ones_(module.dilution_mask)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers, but `ValueError` where keys, head and pooler apart, are not the configuration's."""
        wants_info = kwargs.pop("output_loading_info", False)
        # A dense checkpoint, asked to start its dilution, has no mask yet.
        without_mask = "diluted_attention_layers" in kwargs
        kwargs = {"use_safetensors": True, **kwargs, "output_loading_info": True}
        model, info = cast(tuple["NoseViTPreTrainedModel", dict], super().from_pretrained(*args, **kwargs))
        if without_mask:
            info["missing_keys"] = {key for key in info["missing_keys"] if not key.endswith("dilution_mask")}
        check_loading(model, info)
        # Weights are assigned here without `load_state_dict`, whose hook would have done it.
        nose_vit(model).sync_gains()
        return (model, info) if wants_info else model

    @classmethod
    def from_vit(
        cls,
        model_or_id: PreTrainedModel | str,
        removed_attention_layers: Iterable[int] = (),
        feature_compensation: bool = False,
        force: bool = False,
        num_labels: int | None = None,
        **config_fields,
    ):
        """
        Copies a dense ViT (or an already compressed one) into this class, without the attention of some blocks.

        Args:
            model_or_id ([`PreTrainedModel`] or `str`):
                A ViT object, a Hub id or a folder; old key names included.
            removed_attention_layers (`Iterable[int]`, *optional*):
                Blocks to leave without attention, on top of those the source has lost. They become `f = x`.
            feature_compensation (`bool`, *optional*, defaults to `False`):
                Whether the removed blocks double the stream instead. Dense weights were not trained for that and end
                at chance level, so it is refused unless forced.
            force (`bool`, *optional*, defaults to `False`):
                Allows `feature_compensation=True` here.
            num_labels (`int`, *optional*):
                Gives the model a new, random head of that many classes instead of the source's.
            config_fields:
                Further fields of the new [`NoseViTConfig`], such as `drop_path_rate`.

        Raises:
            `ValueError`: where the source is not a pre-norm ViT, or its keys and ours do not match one to one.
        """
        return convert_vit(
            cls,
            model_or_id,
            removed_attention_layers=list(removed_attention_layers),
            feature_compensation=feature_compensation,
            force=force,
            num_labels=num_labels,
            **config_fields,
        )

    def dilute(self, layers: Iterable[int], feature_compensation: bool = True) -> None:
        """
        Puts the attention of `layers` under the mask M, starting at M = 1, where nothing changes (Eq. 8; Eq. 9 with
        `feature_compensation`). Raises `ValueError` for a layer that is not kept.
        """
        vit, layers = nose_vit(self), list(layers)
        config = vit.config
        candidates = vit.kept_attention_layers
        if not set(layers) <= set(candidates) or len(set(layers)) != len(layers):
            raise ValueError(f"layers must be distinct and among the kept ones {candidates}, got {layers}.")
        old = dict(zip(config.diluted_attention_layers, vit.mask_values(), strict=True))
        before = {name: getattr(config, name) for name in ("diluted_attention_layers", "compensated_attention_layers")}
        config.diluted_attention_layers = sorted([*config.diluted_attention_layers, *layers])
        if feature_compensation:
            config.compensated_attention_layers = sorted([*config.compensated_attention_layers, *layers])
        try:
            config.validate()
        except Exception:
            for name, value in before.items():
                setattr(config, name, value)
            raise
        values = [old.get(layer, 1.0) for layer in config.diluted_attention_layers]
        vit.dilution_mask = torch.tensor(values, dtype=torch.float32, device=vit.device) if values else None
        for layer in layers:
            vit.blocks[layer].is_compensated = feature_compensation
        vit.sync_gains()

    def set_mask(self, value: float | Iterable[float]) -> None:
        """
        Sets M of the diluted layers: one number for all, or one per layer in ascending order, each in [0, 1]. Once
        all are 0 the attention of these layers is not computed. Raises `ValueError` for anything else.
        """
        vit = nose_vit(self)
        count = len(vit.config.diluted_attention_layers)
        values = [float(value)] * count if isinstance(value, int | float) else [float(item) for item in value]
        if len(values) != count or not all(0.0 <= item <= 1.0 for item in values):
            raise ValueError(f"value must be in [0, 1], one or {count} of them (one per diluted layer), got {value}.")
        if vit.dilution_mask is not None:
            # In place, so that a compiled graph stays valid.
            vit.dilution_mask.copy_(torch.tensor(values))
        vit.sync_gains(values)

    @contextmanager
    def masked_attention(self, layers: Iterable[int], mask: str = "skip") -> Iterator[None]:
        """
        Within the context the attention of `layers` is not computed: `f = x` (`mask="skip"`) or `f = 2x`
        (`mask="double"`). Raises `ValueError` for a layer that has no attention, or an unknown mask.
        """
        vit, layers = nose_vit(self), list(layers)
        if mask not in MASK_GAINS:
            raise ValueError(f"mask must be one of {sorted(MASK_GAINS)}, got {mask!r}.")
        removed = vit.config.removed_attention_layers
        bad = [layer for layer in layers if layer in removed or not 0 <= layer < len(vit.layers)]
        if bad:
            raise ValueError(
                f"layers must have attention to mask, but {bad} do not; {len(vit.layers)} blocks, {removed} removed."
            )
        before = {layer: vit.blocks[layer].gain for layer in layers}
        try:
            for layer in layers:
                vit.blocks[layer].gain = MASK_GAINS[mask]
            yield
        finally:
            for layer, gain in before.items():
                vit.blocks[layer].gain = gain

    @contextmanager
    def all_tokens(self) -> Iterator[None]:
        """Within the context a classifier computes all tokens to the end, for hooks that look at them."""
        config = nose_vit(self).config
        before, config.class_token_tail = config.class_token_tail, False
        try:
            yield
        finally:
            config.class_token_tail = before

    def fuse_qkv_projections(self) -> None:
        """
        Makes q, k and v of every attention one matrix product, for inference. The weights are the same numbers in one
        parameter a layer; what is saved does not change. Raises `ValueError` where they are not plain `Linear`s.
        """
        for module in nose_vit(self).modules():
            if isinstance(module, NoseViTAttention):
                module.fuse()

    def unfuse_qkv_projections(self) -> None:
        """Gives q, k and v their own parameters back, bit for bit; they are new objects to an optimizer."""
        for module in nose_vit(self).modules():
            if isinstance(module, NoseViTAttention):
                module.unfuse()


class NoseViTModel(BlockStates, NoseViTPreTrainedModel):
    """The bare model: embeddings, blocks, final LayerNorm, and a pooler only where `config.use_pooler` says so."""

    config: NoseViTConfig

    def __init__(self, config: NoseViTConfig):
        super().__init__(config)
        self.embeddings = ViTEmbeddings(config)
        self.layers = nn.ModuleList(NoseViTLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.scaled_eps(config.num_hidden_layers - 1))
        self.pooler = ViTPooler(config) if config.use_pooler else None
        count = len(config.diluted_attention_layers)
        self.register_buffer("dilution_mask", torch.ones(count, dtype=torch.float32) if count else None)
        self.is_mask_zero = False
        self._start = None
        self.register_load_state_dict_post_hook(sync_gains_after_loading)
        self.post_init()

    @rescale_hidden_states
    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        class_token_only: bool = False,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """
        `pixel_values` (batch, channels, height, width) -> tokens after the final norm (batch, tokens, hidden). With
        `class_token_only` the caller needs the class token alone, and (batch, 1, hidden) may come back.
        """
        cuts = class_token_only and self.config.class_token_tail
        cuts = cuts and tail_changes_nothing(self.config, self.training, kwargs)
        last = last_attention(self.blocks)
        if self._start is None:
            first = 0
            # Not kept under a name: in another dtype it is a copy that nothing needs after the embeddings.
            hidden_states = self.embeddings(
                pixel_values.to(self.embeddings.patch_embeddings.projection.weight.dtype),
                interpolate_pos_encoding=bool(interpolate_pos_encoding),
            )
        else:
            first, hidden_states = self._start
            if hidden_states.shape[1] == 1 and last >= first:
                raise ValueError(
                    f"starting_at({first}) got hidden_states of the class token alone, recorded behind a class-token "
                    f"tail, but the attention of block {last} is computed. Record them within all_tokens()."
                )
        token_mask = create_bidirectional_mask(self.config, hidden_states, attention_mask)
        diluted = self.config.diluted_attention_layers
        values = () if self.dilution_mask is None else self.dilution_mask.unbind()
        masks = dict(zip(diluted, values, strict=True))
        if cuts and last < first:
            hidden_states = hidden_states[:, :1]
        for layer in range(first, len(self.layers)):
            begins_tail = cuts and layer == last
            if begins_tail:
                token_mask = class_token_mask(self.config, hidden_states, attention_mask)
            options = {"mask": masks.get(layer), "class_token_only": begins_tail, **kwargs}
            hidden_states = self.layers[layer](hidden_states, token_mask, **options)
        hidden_states = self.layernorm(hidden_states)
        pooled = None if self.pooler is None else self.pooler(hidden_states)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)


class NoseViTForImageClassification(NoseViTPreTrainedModel):
    """
    A linear head on the class token after the final norm.

    The last attention that is computed has one query, and nothing but the class token goes on from there, in training
    as in inference: no logit and no gradient changes beyond rounding. All tokens are computed where hidden states or
    attentions are asked for, in training with dropout (whose draws would be others), within `all_tokens()`, and with
    `config.class_token_tail` off.
    """

    def __init__(self, config: NoseViTConfig):
        config.use_pooler = False
        super().__init__(config)
        self.num_labels: int = config.num_labels or 0
        self.vit = NoseViTModel(config)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels) if self.num_labels else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> ImageClassifierOutput:
        """`pixel_values` (batch, channels, height, width), `labels` (batch,) -> logits (batch, classes) and loss."""
        outputs = self.vit(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            attention_mask=attention_mask,
            class_token_only=True,
            **kwargs,
        )
        logits = self.classifier(outputs.last_hidden_state[:, 0])
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def nose_vit(model: nn.Module) -> NoseViTModel:
    """The one [`NoseViTModel`] in `model.modules()`, whatever head or wrapper is around it; `ValueError` otherwise."""
    found = [module for module in model.modules() if isinstance(module, NoseViTModel)]
    if len(found) != 1:
        raise ValueError(f"model must hold exactly one NoseViTModel, {type(model).__name__} holds {len(found)}.")
    return found[0]


__all__ = ["NoseViTForImageClassification", "NoseViTModel", "NoseViTPreTrainedModel"]
