"""How the mask M falls from 1 to 0 over training: pure functions of the step."""

import math


SCHEDULES = ("linear", "cosine", "one_shot")
UNITS = ("step", "epoch")


def mask_value(schedule: str, index: int, length: int) -> float:
    """
    M at `index` (from 0) of a decay over `length` steps or epochs: 1 at the first, exactly 0 at the last and after it.

    Args:
        schedule (`str`): `"linear"`, `"cosine"`, or `"one_shot"` (0 from the start).
        index (`int`): step or epoch.
        length (`int`): length of the decay in the same unit.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {SCHEDULES}, got {schedule!r}.")
    if schedule == "one_shot" or index >= length - 1:
        return 0.0
    progress = index / (length - 1)
    return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def decay_length(decay: float, total: int) -> int:
    """
    Steps or epochs that the decay takes out of `total`: a fraction of them where `decay` is at most 1, their number
    where it is above. Raises `ValueError` where M would not reach 0 within training.
    """
    if not 0 < decay <= max(1, total) or (decay > 1 and decay != int(decay)):
        raise ValueError(
            f"decay must be a fraction in (0, 1] or a whole number up to the length of training, {total}; got {decay}."
        )
    return max(1, round(decay * total)) if decay <= 1 else int(decay)


def scheduled_mask(
    schedule: str, decay: float, unit: str, step: int, max_steps: int, num_epochs: float | None = None
) -> float:
    """
    M at optimizer step `step` (from 0) of `max_steps`. With `unit="epoch"` it is constant within each of the
    `num_epochs` epochs, the last of which may be cut short, as in the published runs.
    """
    if unit not in UNITS:
        raise ValueError(f"unit must be one of {UNITS}, got {unit!r}.")
    if unit == "step":
        return mask_value(schedule, step, decay_length(decay, max_steps))
    if not num_epochs:
        raise ValueError("unit='epoch' needs the number of epochs; count in steps where training is set in steps.")
    # Where the last epoch is cut short, the quotient at the first step of an epoch may be a rounding below it.
    epoch = int(step * num_epochs / max_steps + 1e-9)
    return mask_value(schedule, epoch, decay_length(decay, math.ceil(num_epochs)))
