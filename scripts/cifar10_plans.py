"""What the CIFAR-10 experiment runs: the search for the short recipe, and the paper's tables in small."""

from dataclasses import dataclass, field
from typing import Any


NUM_RANDOM = 3
DENSE, CONTROL = "dense", "dense-trained-on"
# How images are seen and weights moved, alike in every training.
TRAINING = {
    "batch_size": 64,
    "learning_rate": 2e-4,
    "min_learning_rate": 1e-6,
    "weight_decay": 0.05,
    "label_smoothing": 0.1,
    "flip": True,
    "shift": 4,
    "eval_batch_size": 250,
    "eval_steps": 10_000,
    "save_steps": 400,
    "logging_steps": 50,
    # All images of the experiment, at 64 px.
    "cache_gib": 4.0,
}
ONE_SHOT = {"schedule": "one_shot"}
LINEAR = {"schedule": "linear", "decay": 0.6, "feature_compensation": False}
TEACHER = {"distillation_weight": 0.7, "distillation_temperature": 2.0}


@dataclass
class Plan:
    """
    One experiment: its arms by name, and what its numbers are unless told otherwise.

    An arm says how it differs from the common training. It removes `num_removed` layers: NOSE's where it names no
    `layers`, else `"first"` or the number of a random draw. `dense` trains the dense model on; `transfer_from` names
    the arm whose model learns another data set.
    """

    arms: dict[str, dict[str, Any]]
    # Name of the arm that searches N layers and removes them in one shot.
    search: str
    num_train: int
    image_size: int
    dense_epochs: float
    epochs: float
    num_removed: int = 5
    training: dict[str, Any] = field(default_factory=lambda: dict(TRAINING))

    def removed(self, arm: str) -> int:
        """How many layers an arm removes."""
        return self.arms[arm].get("num_removed", self.num_removed)

    def search_arm(self, arm: str) -> str:
        """The arm whose layers a NOSE arm takes, and beside which every arm of as many layers is shown."""
        return self.search.format(self.removed(arm))

    def random_arms(self, arm: str) -> list[str]:
        """The arms of random sets of as many layers."""
        return [
            name
            for name, values in self.arms.items()
            if isinstance(values.get("layers"), int) and self.removed(name) == self.removed(arm)
        ]


def randoms(name: str, **values: Any) -> dict[str, dict[str, Any]]:
    """The arms of random sets."""
    return {name.format(draw): {**values, "layers": draw} for draw in range(NUM_RANDOM)}


SHORT = Plan(
    search="nose-one-shot",
    num_train=20_000,
    image_size=64,
    dense_epochs=6.0,
    epochs=4.0,
    arms={
        "nose-one-shot": ONE_SHOT,
        CONTROL: {"dense": True},
        "nose-dilution": LINEAR,
        "nose-dilution-compensated": {**LINEAR, "feature_compensation": True},
        "nose-one-shot-distilled": {**ONE_SHOT, **TEACHER},
        "first-one-shot": {**ONE_SHOT, "layers": "first"},
        **randoms("random-{}-one-shot", **ONE_SHOT),
        "nose-dilution-distilled": {**LINEAR, **TEACHER},
        "nose-dilution-short": {**LINEAR, "decay": 0.2},
        "nose-dilution-cosine": {**LINEAR, "schedule": "cosine"},
        "nose-dilution-ascending": {**LINEAR, "order": "ascending"},
        "nose-dilution-descending": {**LINEAR, "order": "descending"},
        "nose-one-shot-high-rate": {**ONE_SHOT, "learning_rate": 5e-4},
        "kl-one-shot": {**ONE_SHOT, "criterion": "prediction_kl"},
    },
)

PAPERS = {"schedule": "linear", "decay": 0.75, "feature_compensation": True}
COUNTS = (3, 5, 6)
# Tables 2, 4, 5, 9 and 10 in small, 25, 40 and 50 % of twelve layers, the one-shot control beside every number.
PAPER = Plan(
    search="nose-{}-one-shot",
    num_train=50_000,
    image_size=224,
    dense_epochs=30.0,
    epochs=100.0,
    # The shift is a sixteenth of the image in both plans.
    training={**TRAINING, "batch_size": 256, "shift": 14, "num_workers": 8, "cache_gib": 0.0},
    arms={
        **{f"nose-{count}-one-shot": {**ONE_SHOT, "num_removed": count} for count in COUNTS},
        CONTROL: {"dense": True},
        # Tables 9 and 10: what is removed, and how much.
        **{f"nose-{count}": {**PAPERS, "num_removed": count} for count in COUNTS},
        **{f"first-{count}": {**PAPERS, "num_removed": count, "layers": "first"} for count in COUNTS},
        **{
            name: values
            for count in COUNTS
            for name, values in randoms(f"random-{{}}-{count}", **PAPERS, num_removed=count).items()
        },
        # Table 4: schedule and length of the decay.
        **{
            f"nose-5-{schedule}-{decay}": {**PAPERS, "schedule": schedule, "decay": decay}
            for schedule in ("linear", "cosine")
            for decay in (0.5, 0.75, 1.0)
            if (schedule, decay) != ("linear", 0.75)
        },
        # Table 5: compensation.
        **{f"nose-{n}-uncompensated": {**PAPERS, "num_removed": n, "feature_compensation": False} for n in (5, 6)},
        # Table 2: other data.
        **{
            f"{source}-{method}": {"transfer_from": source, "linear_probe": method == "probed"}
            for source in (CONTROL, "nose-5", "nose-6")
            for method in ("fine-tuned", "probed")
        },
    },
)
PLANS = {"short": SHORT, "paper": PAPER}
