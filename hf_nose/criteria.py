"""What makes a set of attention layers cheap to lose: transfer entropy (Eq. 7) and its rivals, as pure functions."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from .entropy import Moments, in_float64


SIGNS = ("absolute", "signed")


@dataclass
class Evidence:
    """What one pass over the calibration images leaves of a (masked) model; merges over batches and processes."""

    moments: Moments = field(default_factory=Moments)
    num_images: int = 0
    prediction_kl: float = 0.0
    loss: float = 0.0
    correct: int = 0

    def see_target(self, target: torch.Tensor) -> None:
        """Adds the target's values, (samples, channels)."""
        self.moments.update(target)

    def merge(self, other: "Evidence") -> "Evidence":
        """Adds what `other` saw. Returns self."""
        self.moments.merge(other.moments)
        self.num_images += other.num_images
        self.prediction_kl += other.prediction_kl
        self.loss += other.loss
        self.correct += other.correct
        return self

    def see_predictions(
        self, logits: torch.Tensor, labels: torch.Tensor | None, dense_logits: torch.Tensor | None
    ) -> None:
        """
        Adds predictions of shape (images, classes): against `labels` (images,) the summed cross-entropy in nats and
        the hits, against `dense_logits` (images, classes) the summed KL(dense || masked) in nats.
        """
        for name, values in prediction_values(logits, labels, dense_logits).items():
            setattr(self, name, getattr(self, name) + values.sum().item())


def prediction_values(
    logits: torch.Tensor, labels: torch.Tensor | None, dense_logits: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """
    What each image adds to an [`Evidence`], (images,): `loss` and `correct` against `labels` (images,), and
    `prediction_kl` against `dense_logits` (images, classes), from `logits` (images, classes).
    """
    logits, values = in_float64(logits), {}
    if labels is not None:
        labels = labels.to(logits.device)
        values["loss"] = cross_entropy(logits, labels, reduction="none")
        values["correct"] = (logits.argmax(-1) == labels).long()
    if dense_logits is not None:
        dense, masked = log_softmax(in_float64(dense_logits), -1), log_softmax(logits, -1)
        values["prediction_kl"] = kl_div(masked, dense, reduction="none", log_target=True).sum(-1)
    return values


def transfer_entropy(dense: Evidence, masked: Evidence) -> float:
    """`TE = H(target) - H(target | layers masked)` in nats (Eq. 7), signed."""
    return dense.moments.entropy() - masked.moments.entropy()


def channelwise(dense: Evidence, masked: Evidence) -> float:
    """`sum_j |log std_j - log std'_j|` in nats: gains and losses cannot cancel."""
    return float((dense.moments.std().log() - masked.moments.std().log()).abs().sum())


def gaussian_kl(dense: Evidence, masked: Evidence) -> float:
    """KL(dense || masked) in nats between diagonal Gaussians: sees the mean move as well."""
    std, masked_std = dense.moments.std(), masked.moments.std()
    distance = std.square() + (dense.moments.mean - masked.moments.mean).square()
    return float((masked_std.log() - std.log() + distance / (2 * masked_std.square()) - 0.5).sum())


def prediction_kl(dense: Evidence, masked: Evidence) -> float:
    """Mean KL(dense || masked) in nats between the predicted distributions; needs no labels."""
    return masked.prediction_kl / masked.num_images


def loss(dense: Evidence, masked: Evidence) -> float:
    """Mean cross-entropy of the masked model in nats."""
    return masked.loss / masked.num_images


def accuracy(dense: Evidence, masked: Evidence) -> float:
    """Top-1 of the masked model in [0, 1]; the paper's "remained performance"."""
    return masked.correct / masked.num_images


@dataclass(frozen=True)
class Criterion:
    """
    A score of (dense, masked) evidence, what it needs to be measured, and which end of it is best. `image_sum` is the
    field of the masked evidence of which it is the mean over images, where it is one.
    """

    name: str
    score: Callable[[Evidence, Evidence], float]
    needs_labels: bool = False
    needs_logits: bool = False
    is_signed: bool = False
    higher_is_better: bool = False
    image_sum: str | None = None

    def cost(self, value: float, sign: str) -> float:
        """What the search minimises: |TE|, or the value itself with `sign="signed"`; accuracy is turned round."""
        if self.is_signed and sign == "absolute":
            return abs(value)
        return -value if self.higher_is_better else value


CRITERIA = {
    criterion.name: criterion
    for criterion in (
        Criterion("transfer_entropy", transfer_entropy, is_signed=True),
        Criterion("channelwise", channelwise),
        Criterion("gaussian_kl", gaussian_kl),
        Criterion("prediction_kl", prediction_kl, needs_logits=True, image_sum="prediction_kl"),
        Criterion("loss", loss, needs_logits=True, needs_labels=True, image_sum="loss"),
        Criterion(
            "accuracy", accuracy, needs_logits=True, needs_labels=True, higher_is_better=True, image_sum="correct"
        ),
    )
}
