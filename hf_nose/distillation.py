"""Distillation: a teacher's soft logits, and what flows through chosen blocks of it, as a second target."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_nose_vit import NoseViTConfig
from .entropy import stream_growth
from .modeling_nose_vit import NoseViTModel, nose_vit


# Where each kind of feature stands among the tokens of an image.
TOKENS = {"class_token": slice(0, 1), "patches": slice(1, None)}
FEATURES = {"none": (), "class_token": ("class_token",), "patches": ("patches",), "both": ("class_token", "patches")}


class Distiller:
    """
    What a teacher adds to the loss of a student, image by image. [`NoseTrainer`] takes one and trains on

    `(1 - weight) * hard-label loss + weight * temperature^2 * KL(teacher || student) + feature_weight * feature loss`,

    the KL divergence being that of the predictions at `temperature` (Hinton et al., arXiv 1503.02531), whose gradient
    the square keeps from shrinking; the feature loss is that of [`feature_loss`], averaged over `blocks` and kinds.

    A stream with feature compensation grows by 2 - M at every compensated layer (Eq. 9), so features are divided by
    their own model's growth up to that block before they are compared.

    The teacher is put in evaluation mode and its parameters are frozen. It is no part of the student: no optimizer and
    no checkpoint sees it.

    Args:
        teacher (`nn.Module`):
            An image classifier that holds one [`NoseViTModel`], with the student's classes; any ViT is made one by
            `NoseViTForImageClassification.from_vit`.
        weight (`float`, *optional*, defaults to 0.5):
            Share in [0, 1] of the soft logits; what is left is that of the labels. 0 leaves the logits alone.
        temperature (`float`, *optional*, defaults to 2.0):
            What logits are divided by before the softmax, above 0.
        features (`str`, *optional*, defaults to `"none"`):
            `"none"`, `"class_token"`, `"patches"` or `"both"`.
        blocks (`Sequence[int]`, *optional*):
            The blocks, from 0, whose outputs are compared; at least one where there are features.
        feature_weight (`float`, *optional*, defaults to 1.0):
            Weight of the feature loss, above 0.

    Raises:
        `ValueError`: for an option out of range, or a block that the teacher lacks.
    """

    def __init__(
        self,
        teacher: nn.Module,
        weight: float = 0.5,
        temperature: float = 2.0,
        features: str = "none",
        blocks: Sequence[int] = (),
        feature_weight: float = 1.0,
    ):
        check_options(weight, temperature, features, feature_weight)
        if not weight and features == "none":
            raise ValueError("Nothing to distil: distillation_weight is 0 and distillation_features is 'none'.")
        self.teacher = teacher.eval().requires_grad_(False)
        self.weight, self.temperature, self.feature_weight = weight, temperature, feature_weight
        self.features, self.blocks = features, check_blocks(features, blocks, nose_vit(teacher).config)

    @property
    def forward_options(self) -> dict[str, Any]:
        """Keywords with which student and teacher hand out the features: the chosen hidden states and no other."""
        return {"output_hidden_states": [block + 1 for block in self.blocks]} if self.blocks else {}

    def check_student(self, student: nn.Module) -> None:
        """`ValueError` where `student` cannot learn from the teacher."""
        if {id(parameter) for parameter in student.parameters()} & {id(held) for held in self.teacher.parameters()}:
            raise ValueError(
                "teacher and student share parameters, which would be frozen. Give a copy as the teacher."
            )
        check_pair(nose_vit(self.teacher).config, nose_vit(student).config, self.features)

    def __call__(self, student: NoseViTModel, output: Any, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Args:
            student ([`NoseViTModel`]): The model whose growth divides its features.
            output: What the student made of `pixel_values`: `logits`, and `hidden_states` by `forward_options`.
            pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`): The student's very input.

        Returns:
            `torch.Tensor` of shape `(batch,)`: what distillation adds to the loss of each image.
        """
        with torch.no_grad():
            taught = self.teacher(pixel_values, **self.forward_options)
        loss = self.weight * soft_logit_loss(output.logits, taught.logits, self.temperature)
        kinds = FEATURES[self.features]
        if not kinds:
            return loss
        growths = stream_growth(student), stream_growth(nose_vit(self.teacher))
        for block in self.blocks:
            states = output.hidden_states[block + 1], taught.hidden_states[block + 1]
            learned, given = (state / growth[block] for state, growth in zip(states, growths, strict=True))
            for kind in kinds:
                share = self.feature_weight / (len(self.blocks) * len(kinds))
                loss = loss + share * feature_loss(learned[:, TOKENS[kind]], given[:, TOKENS[kind]])
        return loss

    def to_record(self) -> dict[str, Any]:
        """The options, for a file."""
        return {name: value for name, value in vars(self).items() if name != "teacher"}


def describe(options: Mapping[str, Any]) -> str:
    """A distiller's options in words."""
    parts = []
    if options["weight"]:
        parts.append(f"logits at temperature {options['temperature']:g}, weight {options['weight']:g}")
    if options["blocks"]:
        tokens = " and ".join(kind.replace("_", " ") for kind in FEATURES[options["features"]])
        blocks = ", ".join(map(str, options["blocks"]))
        parts.append(f"{tokens} behind blocks {blocks}, weight {options['feature_weight']:g}")
    return "; ".join(parts)


def soft_logit_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """`temperature^2 * KL(teacher || student)` in nats of logits (batch, classes), of shape (batch,)."""
    learned, given = (F.log_softmax(at_least_float32(logits) / temperature, dim=-1) for logits in (student, teacher))
    divergence = F.kl_div(learned, given.to(learned.dtype), reduction="none", log_target=True)
    return temperature**2 * divergence.sum(-1)


def feature_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """
    Squared distance of features (batch, tokens, hidden) as a share of the teacher's squared length, averaged over
    tokens, of shape (batch,). Without a unit, one weight serves every block and every model.
    """
    learned, given = at_least_float32(student), at_least_float32(teacher)
    return ((learned - given).square().sum(-1) / given.square().sum(-1)).mean(-1)


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in float32, or float64 if it is: sums in half precision lose what a good student still has to learn."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check_options(weight: float, temperature: float, features: str, feature_weight: float) -> None:
    """`ValueError` naming the option that is out of range."""
    if not 0 <= weight <= 1:
        raise ValueError(f"distillation_weight must be in [0, 1], got {weight}.")
    for name, value in (("temperature", temperature), ("feature_weight", feature_weight)):
        if not 0 < value < math.inf:
            raise ValueError(f"distillation_{name} must be positive, got {value}.")
    if features not in FEATURES:
        raise ValueError(f"distillation_features must be one of {tuple(FEATURES)}, got {features!r}.")


def check_distillation(settings: Mapping[str, Any], is_distilled: bool, is_trained: bool) -> None:
    """`ValueError` naming the settings by which a run's distillation cannot be, or would not happen."""
    features, blocks = settings["distillation_features"], settings["distillation_blocks"]
    weight, temperature = settings["distillation_weight"], settings["distillation_temperature"]
    check_options(weight, temperature, features, settings["distillation_feature_weight"])
    if (features == "none") != (blocks is None):
        raise ValueError(
            f"distillation_features and distillation_blocks need each other, got {features!r} and {blocks!r}: say "
            "which tokens to compare, behind which blocks."
        )
    if is_distilled and not is_trained:
        raise ValueError("distillation needs training: set steps or epochs, or distillation_weight=0.")
    if settings["distillation_control"] and not (settings["control"] and is_distilled):
        raise ValueError("distillation_control needs control, and a distillation_weight or distillation_features.")
    if settings["teacher"] is not None and not is_distilled:
        raise ValueError(
            f"teacher {settings['teacher']!r} has no part: set distillation_weight or distillation_features."
        )


def check_blocks(features: str, blocks: Sequence[int], config: NoseViTConfig) -> list[int]:
    """The blocks to compare, none without features; `ValueError` where they are missing, doubled or out of range."""
    if features == "none":
        return []
    last = config.num_hidden_layers - 1
    if not blocks or len(set(blocks)) != len(blocks) or not all(0 <= block <= last for block in blocks):
        raise ValueError(
            f"distillation_blocks must be distinct blocks in [0, {last}], at least one with distillation_features="
            f"{features}, got {list(blocks)}."
        )
    return sorted(blocks)


def check_pair(teacher: NoseViTConfig, student: NoseViTConfig, features: str) -> None:
    """`ValueError` where teacher and student differ in what makes their outputs comparable."""
    names = [list((config.id2label or {}).values()) for config in (teacher, student)]
    if len(names[0]) != len(names[1]):
        raise ValueError(
            f"teacher and student must have the same classes: the teacher has {len(names[0])}, the student "
            f"{len(names[1])}. Train the teacher on the student's data first."
        )
    # LABEL_0, LABEL_1, ... name nothing.
    generic = [f"LABEL_{number}" for number in range(len(names[0]))]
    differing = [number for number, pair in enumerate(zip(*names, strict=True)) if len(set(pair)) > 1]
    if differing and generic not in names:
        first = differing[0]
        raise ValueError(
            f"teacher and student must have the same classes in the same order: class {first} is {names[0][first]!r} "
            f"to the teacher and {names[1][first]!r} to the student. If only the words differ, change id2label in "
            "the teacher's config.json."
        )
    alike = ["image_size"]
    if features != "none":
        alike += ["num_hidden_layers", "hidden_size", "patch_size"]
    for name in alike:
        values = [getattr(config, name) for config in (teacher, student)]
        sizes = [tuple(value) if isinstance(value, list | tuple) else value for value in values]
        if sizes[0] != sizes[1]:
            what = "distilled from" if name == "image_size" else f"compared by features {features!r}"
            raise ValueError(
                f"teacher and student must have the same {name} to be {what}, got {values[0]} and {values[1]}."
            )
