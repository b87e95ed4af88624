"""Configuration of a Vision Transformer some of whose attention layers are diluted or removed.

This file travels to the Hub beside the weights: it imports nothing but transformers and huggingface_hub.
"""

import math
from dataclasses import field

from huggingface_hub.dataclasses import strict
from transformers import ViTConfig
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin

from .guards_nose_vit import check_lists, check_values


__version__ = "0.1.0"

FORMAT_VERSION = 1
MAX_HIDDEN_LAYERS = 1_000
MAX_HIDDEN_SIZE = 65_536
MAX_IMAGE_SIZE = 16_384
MAX_PATCHES = 1_048_576
MAX_CHANNELS = 4_096


@strict
class NoseViTConfig(BackboneConfigMixin, ViTConfig):
    r"""
    Configuration of a [`NoseViTModel`]: a pre-norm ViT whose blocks keep, dilute or have lost their attention
    ("MLP Can Be A Good Transformer Learner", arXiv 2404.05657).

    All lists hold block indices from 0; they are sorted on construction and validated there and again by the model.

    Args:
        removed_attention_layers (`list[int]`, *optional*):
            Blocks without attention and without the LayerNorm in front of it: they own no parameters for either.
        diluted_attention_layers (`list[int]`, *optional*):
            Blocks whose attention is scaled by the mask M (Eq. 8); disjoint from the removed ones.
        compensated_attention_layers (`list[int]`, *optional*):
            Those of the two that use feature compensation (Eq. 9) and so double the stream at M = 0.
        folded_attention_layers (`list[int]`, *optional*):
            Removed blocks whose doubling has been divided out of the weights; disjoint from the compensated ones. The
            scale of the stream is derived from this list, see [`~NoseViTConfig.stream_scale`].
        drop_path_rate (`float`, *optional*, defaults to 0.0):
            Stochastic depth, in [0, 1). It touches the attention term and the MLP, never the compensation.
        drop_path_schedule (`str`, *optional*, defaults to `"linear"`):
            `"linear"` from 0 in the first block to the rate in the last, or `"constant"`.
        chunk_size_feed_forward (`int`, *optional*, defaults to 0):
            Tokens per slice of an MLP, counted over batch x tokens; 0 is off.
        chunk_size_attention (`int`, *optional*, defaults to 0):
            Images per slice of an attention layer outside training; 0 is off.
        class_token_tail (`bool`, *optional*, defaults to `True`):
            Whether a classifier computes, from its last attention on, nothing but the class token. It changes the cost
            and no logit, and rests by itself where all tokens are asked for, see [`NoseViTForImageClassification`].
        use_pooler (`bool`, *optional*, defaults to `False`):
            Whether [`NoseViTModel`] has a pooler; true only where the checkpoint has one.
        apply_layernorm (`bool`, *optional*, defaults to `True`):
            Whether [`NoseViTBackbone`] sends its feature maps through the final LayerNorm.
        token_reduction (*optional*):
            Reserved; anything but `None` is refused.
        format_version (`int`, *optional*, defaults to 1):
            Version of these fields; a newer one than this code knows is refused.
        hf_nose_version (`str`, *optional*):
            The hf_nose that wrote the configuration.

    Raises:
        [`~huggingface_hub.errors.StrictDataclassError`]: where a field has a wrong type or value.
    """

    model_type = "nose_vit"

    removed_attention_layers: list[int] | tuple[int, ...] = field(default_factory=list)
    diluted_attention_layers: list[int] | tuple[int, ...] = field(default_factory=list)
    compensated_attention_layers: list[int] | tuple[int, ...] = field(default_factory=list)
    folded_attention_layers: list[int] | tuple[int, ...] = field(default_factory=list)
    drop_path_rate: float | int = 0.0
    drop_path_schedule: str = "linear"
    chunk_size_feed_forward: int = 0
    chunk_size_attention: int = 0
    class_token_tail: bool = True
    use_pooler: bool = False
    apply_layernorm: bool = True
    token_reduction: dict | None = None
    format_version: int = FORMAT_VERSION
    hf_nose_version: str | None = None
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        check_values(type(self), {**vars(self), **kwargs})
        for name in LAYER_LISTS:
            value = getattr(self, name)
            # Wrong types are left as they are: the strict type check that follows names the field.
            is_indices = isinstance(value, list | tuple) and all(isinstance(index, int) for index in value)
            setattr(self, name, sorted(value) if is_indices else value)
        if self.hf_nose_version is None:
            self.hf_nose_version = __version__
        kwargs.pop("stage_names", None)
        # Names are made only for a number of layers that validation will accept.
        num_stages = min(self.num_hidden_layers, MAX_HIDDEN_LAYERS) if isinstance(self.num_hidden_layers, int) else 0
        self.stage_names = ["stem"] + [f"stage{index}" for index in range(1, num_stages + 1)]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers; what is read from a file is bounded before it is looked at."""
        check_lists(config_dict)
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_vit(cls, config: ViTConfig, **fields) -> "NoseViTConfig":
        """
        A validated configuration with everything of `config` (a [`ViTConfig`] or [`NoseViTConfig`]) and `fields` on
        top. `from_pretrained(..., removed_attention_layers=...)` would apply them after validation.
        """
        values = config.to_dict()
        for name in ("model_type", "architectures", "auto_map", "transformers_version", "hf_nose_version"):
            values.pop(name, None)
        own = None if "out_indices" in fields else values.get("out_features")
        values["out_features"] = fields.pop("out_features", own)
        for name in ("out_indices", "stage_names"):
            values.pop(name, None)
        if "num_labels" in fields:
            values.pop("id2label", None)
            values.pop("label2id", None)
        return cls(**{**values, **fields})

    def validate_sizes(self):
        """Refuses sizes that no ViT has, before anything of that size is built."""
        if not 1 <= self.num_hidden_layers <= MAX_HIDDEN_LAYERS:
            raise ValueError(f"num_hidden_layers must be in [1, {MAX_HIDDEN_LAYERS}], got {self.num_hidden_layers}.")
        for name in ("hidden_size", "intermediate_size"):
            if not 1 <= getattr(self, name) <= MAX_HIDDEN_SIZE * (4 if name == "intermediate_size" else 1):
                raise ValueError(
                    f"{name} is out of range (hidden_size <= {MAX_HIDDEN_SIZE}), got {getattr(self, name)}."
                )
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads must divide hidden_size ({self.hidden_size}), got {self.num_attention_heads}."
            )
        for name in ("pooler_output_size", "encoder_stride"):
            if not 1 <= getattr(self, name) <= MAX_HIDDEN_SIZE:
                raise ValueError(f"{name} must be in [1, {MAX_HIDDEN_SIZE}], got {getattr(self, name)}.")
        for name in ("chunk_size_feed_forward", "chunk_size_attention"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 (off) or positive, got {getattr(self, name)}.")

    def validate_rates(self):
        """Refuses numbers and names that make a layer fail, or give NaN, only once it is built or run."""
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}.")
        for name in ("initializer_range", "layer_norm_eps"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and at least 0, got {getattr(self, name)}.")
        for name in ("hidden_act", "pooler_act"):
            if getattr(self, name) not in ACT2FN:
                raise ValueError(f"{name} must name an activation of transformers, got {getattr(self, name)[:80]!r}.")
        if not 0.0 <= self.drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate must be in [0, 1), got {self.drop_path_rate}.")
        if self.drop_path_schedule not in ("linear", "constant"):
            raise ValueError(f"drop_path_schedule must be 'linear' or 'constant', got {self.drop_path_schedule!r}.")

    def validate_image(self):
        """Refuses images, patches and channels that give no tokens, or more than any memory holds."""
        sizes = (self.image_size, self.patch_size)
        image, patch = (tuple(size) if isinstance(size, list | tuple) else (size, size) for size in sizes)
        fits = len(image) == len(patch) == 2 and 1 <= min(patch) and max(image) <= MAX_IMAGE_SIZE
        if not fits or image[0] < patch[0] or image[1] < patch[1]:
            raise ValueError(
                f"image_size must be in [patch_size, {MAX_IMAGE_SIZE}] and patch_size positive, one number or two; "
                f"got {self.image_size} and {self.patch_size}."
            )
        if (image[0] // patch[0]) * (image[1] // patch[1]) > MAX_PATCHES:
            raise ValueError(
                f"image_size {self.image_size} holds more than {MAX_PATCHES} patches of patch_size {self.patch_size}."
            )
        if not 1 <= self.num_channels <= MAX_CHANNELS:
            raise ValueError(f"num_channels must be in [1, {MAX_CHANNELS}], got {self.num_channels}.")

    def validate_format(self):
        """Refuses what this code does not know; unknown keys alone would be kept in silence."""
        if not 1 <= self.format_version <= FORMAT_VERSION:
            raise ValueError(
                f"format_version is {self.format_version}, this hf_nose ({__version__}) knows up to {FORMAT_VERSION}. "
                f"The checkpoint was written by hf_nose {self.hf_nose_version}: install that version or a newer one."
            )
        if self.token_reduction is not None:
            raise ValueError(f"token_reduction is reserved and must be None, got {self.token_reduction!r}.")

    def validate_indices(self):
        """Refuses indices out of range or doubled, and lists longer than the blocks."""
        last = self.num_hidden_layers - 1
        for name in LAYER_LISTS:
            layers = getattr(self, name)
            if len(layers) > self.num_hidden_layers:
                raise ValueError(
                    f"{name} holds more indices ({len(layers)}) than there are blocks ({self.num_hidden_layers})."
                )
            if list(layers) != sorted(layers):
                raise ValueError(f"{name} must be a sorted list, got {layers}. Build the config by its constructor.")
            if any(isinstance(index, bool) or not 0 <= index <= last for index in layers):
                raise ValueError(f"{name} must hold block indices in [0, {last}], got {list(layers)}.")
            if len(set(layers)) != len(layers):
                raise ValueError(f"{name} holds an index twice: {list(layers)}.")

    def validate_states(self):
        """Refuses states of a block that contradict each other."""
        last = self.num_hidden_layers - 1
        removed, diluted = set(self.removed_attention_layers), set(self.diluted_attention_layers)
        compensated, folded = set(self.compensated_attention_layers), set(self.folded_attention_layers)
        if removed & diluted:
            raise ValueError(
                f"Layers {sorted(removed & diluted)} are both removed and diluted; a layer is in one state."
            )
        if len(removed | diluted) >= self.num_hidden_layers:
            raise ValueError(
                f"All {self.num_hidden_layers} attention layers are removed or diluted, at most {last} may be: "
                "without any attention the class token sees no patch."
            )
        if compensated - removed - diluted:
            raise ValueError(
                "compensated_attention_layers must be removed or diluted, but "
                f"{sorted(compensated - removed - diluted)} are neither."
            )
        if folded - removed:
            raise ValueError(f"folded_attention_layers must be removed, but {sorted(folded - removed)} are not.")
        if folded & compensated:
            raise ValueError(
                f"Layers {sorted(folded & compensated)} are both folded and compensated; folding ends the doubling."
            )

    def stream_scale(self, layer: int) -> float:
        """
        The power of two that has been divided out of the residual stream after block `layer`'s attention (METHOD of
        folding: s starts at 1 and doubles at each removed compensated layer); `layer=-1` gives the scale of the input.
        """
        return math.ldexp(1.0, sum(index <= layer for index in self.folded_attention_layers))

    def scaled_eps(self, layer: int) -> float:
        """`eps / s^2`: for the LayerNorm of a stream divided by s at block `layer`; exact, s being a power of two."""
        return self.layer_norm_eps / self.stream_scale(layer) ** 2

    def drop_path(self, layer: int) -> float:
        """Probability in [0, 1) that stochastic depth drops a branch of block `layer`."""
        if self.drop_path_schedule == "constant" or self.num_hidden_layers == 1:
            return float(self.drop_path_rate)
        return self.drop_path_rate * layer / (self.num_hidden_layers - 1)


LAYER_LISTS = (
    "removed_attention_layers",
    "diluted_attention_layers",
    "compensated_attention_layers",
    "folded_attention_layers",
)

__all__ = ["NoseViTConfig"]
