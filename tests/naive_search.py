"""The NOSE search as METHOD says it, without any cache: one whole forward per set, entropy by numpy."""

import math
from functools import cache

import numpy as np
import torch
from reference_vit import NUM_BLOCKS, batches, reference, stock_vit


GAINS = {"skip": 1, "double": 2}


@cache
def outputs(layers: tuple[int, ...], mask: str) -> dict[str, np.ndarray]:
    """Logits and class tokens of all calibration images with `layers` masked."""
    rules = dict.fromkeys(layers, (0, GAINS[mask]))
    made = [reference(stock_vit(), batch["pixel_values"], rules) for batch in batches()]
    return {
        "logits": torch.cat([each["logits"] for each in made]).double().numpy(),
        "features": torch.cat([each["tokens"][:, 0] for each in made]).double().numpy(),
    }


def value(layers, criterion: str, mask: str = "skip", target: str = "logits") -> float:
    dense, masked = outputs((), mask), outputs(tuple(sorted(layers)), mask)
    before, after = dense[target], masked[target]
    s, t, moved = before.std(0), after.std(0), before.mean(0) - after.mean(0)
    if criterion == "transfer_entropy":
        return float(np.log(s).sum() - np.log(t).sum())
    if criterion == "channelwise":
        return float(np.abs(np.log(s) - np.log(t)).sum())
    if criterion == "gaussian_kl":
        return float((np.log(t / s) + (s**2 + moved**2) / (2 * t**2) - 0.5).sum())
    p, q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (dense["logits"], masked["logits"]))
    labels = torch.cat([batch["labels"] for batch in batches()]).numpy()
    if criterion == "prediction_kl":
        return float((np.exp(p) * (p - q)).sum(1).mean())
    if criterion == "loss":
        return float(-q[np.arange(len(labels)), labels].mean())
    return float((q.argmax(1) == labels).mean())


def cost(number: float, criterion: str, sign: str) -> float:
    if criterion == "transfer_entropy":
        return math.fabs(number) if sign == "absolute" else number
    return -number if criterion == "accuracy" else number


def greedy(num_layers: int, criterion: str, mask: str, sign: str, target: str) -> list[dict]:
    """Algorithm 1; rounds of `{"picked", "scores"}`."""
    picked: list[int] = []
    trace = []
    for _ in range(num_layers):
        scores = {}
        for layer in range(NUM_BLOCKS):
            if layer not in picked:
                scores[layer] = value([*picked, layer], criterion, mask, target)
        best = None
        for layer, number in scores.items():
            if best is None or cost(number, criterion, sign) < cost(scores[best], criterion, sign):
                best = layer
        picked.append(best)
        trace.append({"picked": best, "scores": scores})
    return trace
