"""What training is told beside its data: learning rate by batch size, warm-up, optimizer; what is refused at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch


OPTIMIZERS = ("adamw", "sgd")
WARMUP_UNITS = ("fraction", "step", "epoch")
# Images a step that a base learning rate is given for, as in DeiT.
BASE_BATCH = 512
MOMENTUM = 0.9
# Lowest and highest value of settings.
RANGES = {
    "base_learning_rate": (0.0, math.inf),
    "max_grad_norm": (0.0, math.inf),
    "drop_path_rate": (0.0, 0.99),
    "rand_augment": (0.0, 10.0),
    "random_erasing": (0.0, 1.0),
    "mixup": (0.0, math.inf),
    "cutmix": (0.0, math.inf),
    "color_jitter": (0.0, 1.0),
}


def check_training(settings: Mapping[str, Any]) -> None:
    """`ValueError` naming the setting of training that is out of range, or has no meaning beside another."""
    for name, (lowest, highest) in RANGES.items():
        value = settings[name]
        if value is not None and not (lowest <= value <= highest and value < math.inf):
            limits = "0 or more" if highest == math.inf else f"in [{lowest:g}, {highest:g}]"
            raise ValueError(f"{name} must be {limits}, got {value}.")
    warmup, unit, epochs = (settings[name] for name in ("warmup", "warmup_unit", "epochs"))
    if unit == "fraction" and not 0 <= warmup < 1:
        raise ValueError(
            f"warmup must be in [0, 1), a share of the steps, got {warmup:g}. Count it by warmup_unit=step or epoch."
        )
    if unit == "step" and (warmup < 0 or warmup != int(warmup)):
        raise ValueError(f"warmup must be a whole number of steps, 0 or more, got {warmup:g}.")
    if unit == "epoch" and (epochs is None or settings.get("dense_steps")):
        raise ValueError(
            "warmup_unit=epoch needs the length of training in epochs: give epochs instead of steps and dense_steps."
        )
    if unit == "epoch" and not 0 <= warmup < epochs:
        raise ValueError(f"warmup must be in [0, {epochs:g}), the epochs of training, got {warmup:g}.")


def warmup_steps(warmup: float, unit: str, epochs: float | None) -> float:
    """`warmup_steps` of the Trainer: their number, or below 1 their share, which is that of the epochs, too."""
    return warmup / epochs if unit == "epoch" and epochs else warmup


def peak_learning_rate(learning_rate: float, base: float | None, floor: float, images: int) -> float:
    """
    The learning rate that warm-up ends at.

    Args:
        learning_rate (`float`): That of any batch size, where there is no `base`.
        base (`float`, *optional*): That of 512 images a step; it grows in proportion to them (Goyal et al., 2017).
        floor (`float`): Where it falls to.
        images (`int`): Images a step, over all processes and accumulated batches.

    Raises:
        `ValueError`: where it lies below the floor.
    """
    peak = learning_rate if base is None else base * images / BASE_BATCH
    if peak < floor:
        raise ValueError(
            f"min_learning_rate {floor:g} is above the peak: {learning_rate_in_words(learning_rate, base, images)}. "
            "Lower it, or raise the peak."
        )
    return peak


def learning_rate_in_words(learning_rate: float, base: float | None, images: int) -> str:
    """How the peak learning rate came about, for the person at the screen."""
    if base is None:
        return f"learning rate {learning_rate:g} as given, not scaled by the {images} images a step"
    return f"learning rate {base * images / BASE_BATCH:g} = {base:g} x {images} images a step / {BASE_BATCH}"


def optimizer_arguments(optimizer: str) -> dict[str, Any]:
    """Arguments of the Trainer, whose own default is AdamW with betas 0.9 and 0.999."""
    return {"optim": "sgd", "optim_args": f"momentum={MOMENTUM}"} if optimizer == "sgd" else {}


def check_precision(device: torch.device, bf16: bool, fp16: bool) -> None:
    """
    Refuses half precisions that `device` is not made for; TrainingArguments lets them pass. bfloat16 on a CPU is
    right, if slow on most, so it is allowed. float16 on a CPU would run too, but without the loss scaling that keeps
    small gradients from becoming 0.

    Raises:
        `ValueError`: saying what to choose instead.
    """
    if fp16 and device.type == "cpu":
        raise ValueError(
            "fp16 trains on a GPU only: on a CPU nothing scales the loss. Switch it off; bf16 works there."
        )
    if bf16 and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(
            f"bf16: this GPU ({torch.cuda.get_device_name(device)}) has no bfloat16 and would emulate it, slower than "
            "float32. Switch it off."
        )


def check_data_size(num_images: int, batch: int) -> None:
    """`ValueError` where a data set does not fill a single step, which then is not the one that was asked for."""
    if num_images < batch:
        raise ValueError(
            f"The training data have {num_images} images, fewer than the {batch} of one step: batch_size x "
            "gradient_accumulation_steps x processes. Lower batch_size, or take more images."
        )
