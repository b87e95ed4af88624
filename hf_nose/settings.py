"""Settings of the main job, and which of them each stage depends on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from .criteria import CRITERIA
from .distillation import check_distillation
from .options import RemovalOptions, TrainingOptions, option
from .racing import check_race
from .schedules import check_fall, decay_length, decay_turns


STAGES = ("prepare", "profile", "select", "dilute", "fold", "evaluate", "report")


@dataclass
class Settings(TrainingOptions, RemovalOptions):
    """Everything a run can be told. Learning rates and steps are those of the whole run, batch sizes per process."""

    default_recipe: ClassVar[str | None] = "digits"
    general_recipe: ClassVar[str | None] = "short"

    stages: str = option(",".join(STAGES), "Stages to run, comma-separated, in their order.")
    random_controls: int = option(3, "Random sets evaluated beside the chosen one.")
    throughput_batch_size: int = option(32, "Images a forward where speed is measured.")
    throughput_rounds: int = option(10, "Interleaved rounds there.")
    push_to_hub: bool = option(False, "Push the finished result to the Hub, with the token of `hf auth login`.")
    repo_id: str | None = option(None, "Repository for it, OWNER/NAME or NAME; the run's name by default.")
    private: bool = option(False, "Make that repository private.")

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("num_removed", "ratio", "layers") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"Give one of num_removed, ratio and layers, got {' and '.join(given)}.")
        unknown = sorted(set(self.stage_list) - set(STAGES))
        if unknown or not self.stage_list:
            raise ValueError(f"stages must be among {','.join(STAGES)}, got {self.stages!r}.")
        if (self.repo_id is not None or self.private) and not self.push_to_hub:
            raise ValueError("repo_id and private say where push_to_hub goes: give it, too.")
        if self.push_to_hub and "fold" not in self.stage_list:
            raise ValueError(f"push_to_hub pushes what the stage fold leaves, but stages are {self.stages}.")
        check_distillation(vars(self), self.is_distilled, self.is_trained)
        if self.schedule == "one_shot" and self.feature_compensation:
            raise ValueError("schedule=one_shot removes at once, as f = x: it excludes feature_compensation.")
        if self.schedule == "one_shot" and self.order != "together":
            raise ValueError(f"schedule=one_shot removes all layers at once: it excludes order={self.order}.")
        if not self.is_trained and self.feature_compensation:
            raise ValueError("feature_compensation needs training: set steps or epochs. Untrained, it ends at chance.")

    def check_numbers(self) -> None:
        """Refuses, by name, numbers out of range."""
        super().check_numbers()
        if self.throughput_rounds < 2:
            raise ValueError(f"throughput_rounds must be at least 2, for quartiles, got {self.throughput_rounds}.")
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise ValueError(f"ratio must be in (0, 1), got {self.ratio}.")
        if not 0 <= self.state_cache_gib < math.inf:
            raise ValueError(f"state_cache_gib must be 0 or more, got {self.state_cache_gib}.")
        if self.search == "racing":
            check_race(CRITERIA[self.criterion], self.confidence)
        if self.unit == "epoch" and self.steps:
            raise ValueError("unit=epoch needs the length of training in epochs: give epochs instead of steps.")
        # Refused here, not after the dense training.
        self.check_decay(self.num_removed or 1)

    def check_decay(self, count: int) -> None:
        """`ValueError` where M of `count` layers would not fall as asked for, as far as the length is known by now."""
        if self.steps or self.unit == "epoch" and self.epochs:
            length = decay_length(self.decay, self.steps or math.ceil(self.epochs or 0))
            turns = decay_turns(self.order, length, count)
            if self.uses_compensation:
                check_fall(turns)

    @property
    def stage_list(self) -> list[str]:
        """The stages to run."""
        return [name.strip() for name in self.stages.split(",") if name.strip()]

    @property
    def is_distilled(self) -> bool:
        """Whether the dilution has a teacher."""
        return self.distillation_weight > 0 or self.distillation_features != "none"

    @property
    def has_own_teacher(self) -> bool:
        """Whether the teacher is the run's own dense model."""
        return self.teacher in (None, "dense")

    @property
    def uses_compensation(self) -> bool:
        """Feature compensation as asked for, or by default: on, but not with one_shot or without training."""
        if self.feature_compensation is not None:
            return self.feature_compensation
        return self.is_trained and self.schedule != "one_shot"

    def of_stage(self, stage: str) -> dict[str, Any]:
        """The settings that the result of `stage` depends on; those of training only where the stage trains."""
        is_trained = {"prepare": self.dense_steps > 0, "dilute": self.is_trained}.get(stage, True)
        names = [name for name in DEPENDS.get(stage, "").split() if is_trained or name not in OF_TRAINING.split()]
        return {name: getattr(self, name) for name in names}


OF_TRAINING = (
    "batch_size gradient_accumulation_steps learning_rate min_learning_rate warmup weight_decay label_smoothing "
    "shift flip bf16 gradient_checkpointing eval_steps ema_decay "
    "optimizer base_learning_rate warmup_unit max_grad_norm "
    "color_jitter rand_augment random_erasing mixup cutmix torch_compile "
    "crop crop_scale crop_ratio repeated_augmentation shuffle_buffer_size"
)
# The settings that the result of each stage depends on; the others follow from the stages before.
DEPENDS = {
    "prepare": (
        "seed model base_model_id dataset dataset_id image_column label_column train_split eval_split "
        "max_train_samples max_eval_samples streaming train_images dense_steps drop_path_rate drop_path_schedule "
        f"{OF_TRAINING}"
    ),
    "profile": ("num_calibration calibration_batch_size tokens"),
    "select": (
        "seed num_calibration calibration_batch_size num_removed ratio layers criterion search "
        "beam_width num_draws confidence search_bf16 search_tail stack_candidates mask sign target"
    ),
    "dilute": (
        "seed steps epochs schedule decay unit order feature_compensation control teacher distillation_weight "
        "distillation_temperature distillation_features distillation_blocks distillation_feature_weight "
        f"distillation_control lora_rank lora_alpha lora_dropout lora_targets {OF_TRAINING}"
    ),
    "evaluate": ("eval_batch_size random_controls throughput_batch_size throughput_rounds"),
}
