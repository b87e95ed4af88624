"""What the records of the CIFAR-10 experiment say together: gaps paired by image, and a page with the table."""

from pathlib import Path
from typing import Any

import numpy as np
from cifar10_plans import CONTROL, DENSE, Plan

from hf_nose.files import read_json


RIVALS = {
    "dense_trained_on": "against dense trained on",
    "one_shot": "against NOSE in one shot",
    "random": "against the random sets",
}
# What was asked before anything was run: of the dense model in percent, and of the best arm in points lost.
LEAST_DENSE, MOST_LOST = 86.0, 1.0
SHARED = ("model", "dataset", "num_train", "num_images", "image_size", "bf16", "hardware", "versions")


def summary(results: Path, plan: Plan) -> dict[str, Any]:
    """
    Per arm the top-1 of every seed it was run with, and its gap to the dense model trained as long, to NOSE's layers
    removed in one shot, and to the mean of the random sets of as many layers, over these seeds: paired by image, in
    points, with a 95 % interval. A rival that is not there makes the gap `None`.
    """
    records = {path.stem: read_json(path) for path in sorted(results.glob("*-seed*.json"))}
    hits = {name: unpacked(record) for name, record in records.items()}
    seeds = sorted({record["seed"] for record in records.values()})

    def mean_hits(arms: list[str], over: list[int]) -> np.ndarray | None:
        """Hits of every image, averaged over `arms` and seeds; `None` where a run is missing."""
        names = [f"{arm}-seed{seed}" for arm in arms for seed in over]
        return np.mean([hits[name] for name in names], axis=0) if names and set(names) <= set(hits) else None

    table: dict[str, Any] = {}
    for arm in (DENSE, *plan.arms):
        own = [seed for seed in seeds if f"{arm}-seed{seed}" in hits]
        if not own:
            continue
        found = [records[f"{arm}-seed{seed}"] for seed in own]
        ours = mean_hits([arm], own)
        assert ours is not None
        table[arm] = {
            "seeds": own,
            "top1": [100 * record["top1"] for record in found],
            "top1_mean": 100 * float(ours.mean()),
            "layers": [record.get("layers") for record in found],
            "masked_untrained_top1": [100 * record.get("masked_untrained_top1", record["top1"]) for record in found],
            "parameters": found[0]["parameters"],
            "macs": found[0]["macs"],
            "steps": found[0]["training"]["steps"],
            "seconds": [record["training"]["seconds"] for record in found],
            "gap": {name: paired_gap(ours, mean_hits(rival, own)) for name, rival in rivals(arm, plan).items()},
        }
    first = next(iter(records.values()))
    return {
        "seeds": seeds,
        "arms": table,
        "not_run": [arm for arm in plan.arms if arm not in table],
        "search": plan.search_arm(CONTROL),
        **{name: first[name] for name in SHARED},
    }


def rivals(arm: str, plan: Plan) -> dict[str, list[str]]:
    """The arms that an arm is compared with, by the gap's name; never itself."""
    values = plan.arms.get(arm, {"dense": True})
    if "transfer_from" in values:
        return {"dense_trained_on": [arm.replace(values["transfer_from"], CONTROL)]}
    known = {"dense_trained_on": [CONTROL]}
    if "dense" not in values:
        known |= {"one_shot": [plan.search_arm(arm)], "random": plan.random_arms(arm)}
    return {name: arms for name, arms in known.items() if arms != [arm]}


def unpacked(record: dict[str, Any]) -> np.ndarray:
    """Which test images a record says were right, as 0.0 and 1.0 (images,)."""
    packed = np.frombuffer(bytes.fromhex(record["correct"]), dtype=np.uint8)
    return np.unpackbits(packed, count=record["num_images"]).astype(float)


def paired_gap(ours: np.ndarray, theirs: np.ndarray | None) -> dict[str, float] | None:
    """The mean difference in points, with the 95 % interval of the differences image by image (normal)."""
    if theirs is None:
        return None
    differences = 100 * (ours - theirs)
    mean, error = float(differences.mean()), float(differences.std(ddof=1) / np.sqrt(len(differences)))
    return {"points": mean, "low": mean - 1.96 * error, "high": mean + 1.96 * error}


def page(found: dict[str, Any]) -> str:
    """The summary as a page: one table, best arm first, and how to read it."""
    arms = sorted(found["arms"].items(), key=lambda item: -item[1]["top1_mean"])
    hardware, versions = found["hardware"], found["versions"]
    dtype = "bfloat16" if found["bf16"] else "float32"
    lines = [
        "# DeiT-T on CIFAR-10",
        "",
        f"`scripts/cifar10_experiment.py` wrote this page from the JSON beside it. {found['model']} on "
        f"{found['dataset']} at {found['image_size']} px: {found['num_train']:,} training images, trained in {dtype}, "
        f"evaluated in float32 on {found['num_images']:,} test images. Dense first, "
        f"{found['arms'][DENSE]['steps']} steps; every other arm starts there and trains for as many steps as every "
        "other. A gap is the mean over images, averaged over the arm's seeds, with the 95 % interval of the paired "
        "differences, which says nothing on how much another seed would change.",
        "",
        f"| arm | top-1 % | each seed | layers | masked, untrained % | steps | {' | '.join(RIVALS.values())} |",
        f"|---|---|---|---|---|---|{'---|' * len(RIVALS)}",
        *(row(name, arm) for name, arm in arms),
        "",
        *verdicts(found),
        "",
        f"Measured on {hardware['cores']} cores ({hardware['processor']}), accelerator {hardware['accelerator']}, "
        f"torch {versions['torch']}, transformers {versions['transformers']}.",
        "",
    ]
    return "\n".join(lines)


def best_arm(found: dict[str, Any]) -> str | None:
    """The arm without attention layers of the highest mean, of those that were run with every seed; `None` without."""
    names = [
        name
        for name, arm in found["arms"].items()
        if name not in (DENSE, CONTROL) and arm["seeds"] == found["seeds"] and arm["layers"][0] is not None
    ]
    return max(names, key=lambda name: found["arms"][name]["top1_mean"], default=None)


def verdicts(found: dict[str, Any]) -> list[str]:
    """What the table says to what was asked beforehand, and what was not run."""
    arms, best = found["arms"], best_arm(found)
    lines = [
        asked(f"Dense, mean of the seeds: {arms[DENSE]['top1_mean']:.2f} %", arms[DENSE]["top1_mean"], LEAST_DENSE)
    ]
    gap = best and arms[best]["gap"].get("dense_trained_on")
    if gap:
        lines.append(asked(f"{best} against dense trained on: {shown(gap)} points", gap["points"], -MOST_LOST))
    gap = arms.get(found["search"], {}).get("gap", {}).get("random")
    if gap:
        told = "" if gap["low"] > 0 or gap["high"] < 0 else "; the interval holds 0: not told apart"
        lines.append(
            asked(f"NOSE's sets against random ones, both in one shot: {shown(gap)} points{told}", gap["points"], 0)
        )
    single = [name for name, arm in arms.items() if arm["seeds"] != found["seeds"]]
    if single:
        lines.append(f"- Run with fewer seeds than the others, so a hint and no more: {', '.join(single)}.")
    if found["not_run"]:
        lines.append(f"- In the plan and not run: {', '.join(found['not_run'])}.")
    return lines


def asked(text: str, value: float, least: float) -> str:
    """A measurement beside what was asked of it."""
    return f"- {text}, at least {least:+g} asked: {'kept' if value >= least else f'missed by {least - value:.2f}'}."


def row(name: str, arm: dict[str, Any]) -> str:
    """One arm of the table."""
    layers = "; ".join("-" if found is None else " ".join(map(str, found)) for found in arm["layers"])
    seeds, masked = (", ".join(f"{value:.1f}" for value in arm[key]) for key in ("top1", "masked_untrained_top1"))
    gaps = (shown(arm["gap"].get(rival)) for rival in RIVALS)
    return (
        f"| {name} | {arm['top1_mean']:.2f} | {seeds} | {layers} | {masked if set(layers) - set('-; ') else ''} "
        f"| {arm['steps']} | {' | '.join(gaps)} |"
    )


def shown(gap: dict[str, float] | None) -> str:
    """A gap with its interval."""
    return "" if gap is None else f"{gap['points']:+.2f} [{gap['low']:+.2f}, {gap['high']:+.2f}]"
