"""How the mask M falls from 1 to 0 over training: pure functions of the step."""

import math


SCHEDULES = ("linear", "cosine", "one_shot")
ORDERS = ("together", "ascending", "descending")
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


def decay_turns(order: str, length: int, count: int) -> list[tuple[int, int]]:
    """
    When each of `count` diluted layers, in ascending order, decays: its first step or epoch of `length`, and how many
    it takes. Together they share all of them; one after another, from the lowest or the highest layer on, they have
    equal turns. Raises `ValueError` for an unknown order, or where there are fewer than turns.
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {ORDERS}, got {order!r}.")
    if order == "together":
        return [(0, length)] * count
    if length < count:
        raise ValueError(
            f"order={order} gives each of {count} layers a turn, but the decay has a length of {length}: make it "
            "longer, or count it in steps."
        )
    ends = [turn * length // count for turn in range(count + 1)]
    turns = [(start, end - start) for start, end in zip(ends, ends[1:], strict=False)]
    return turns if order == "ascending" else turns[::-1]


def check_fall(turns: list[tuple[int, int]]) -> None:
    """`ValueError` where M of a layer with feature compensation would be 0 at once: that is `one_shot`, as f = x."""
    if min(length for _, length in turns) == 1:
        raise ValueError(
            "decay leaves a layer one step or epoch for M to fall, so it would be 0 at once, which goes without "
            "feature compensation only: make it longer, count it in steps, or set feature_compensation to false."
        )


def scheduled_masks(
    schedule: str,
    decay: float,
    unit: str,
    step: int,
    max_steps: int,
    num_epochs: float | None = None,
    order: str = "together",
    count: int = 1,
) -> list[float]:
    """
    M of each of `count` diluted layers, in ascending order, at optimizer step `step` (from 0) of `max_steps`. With
    `unit="epoch"` it is constant within each of the `num_epochs` epochs, the last of which may be cut short, as in the
    published runs.
    """
    if unit not in UNITS:
        raise ValueError(f"unit must be one of {UNITS}, got {unit!r}.")
    index, total = step, max_steps
    if unit == "epoch":
        if not num_epochs:
            raise ValueError("unit='epoch' needs the number of epochs; count in steps where training is set in steps.")
        # Where the last epoch is cut short, the quotient at the first step of an epoch may be a rounding below it.
        index, total = int(step * num_epochs / max_steps + 1e-9), math.ceil(num_epochs)
    turns = decay_turns(order, decay_length(decay, total), count)
    return [1.0 if index < start else mask_value(schedule, index - start, length) for start, length in turns]
