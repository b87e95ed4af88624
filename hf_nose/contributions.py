"""What each calibration image gives of a (masked) model, kept apart: what a race between candidates is decided on."""

from dataclasses import dataclass, field

import torch

from .criteria import Evidence, prediction_values
from .entropy import Moments, in_float64


@dataclass
class Contributions:
    """
    An [`Evidence`] that still knows its images: one tensor a batch, of shape (images, channels) where the target's
    entropy counts, (images,) where the criterion is a mean of `image_sum` over images.
    """

    image_sum: str | None
    rows: list[torch.Tensor] = field(default_factory=list)
    num_images: int = 0

    def see_target(self, target: torch.Tensor) -> None:
        """Adds the target's values, (images, channels)."""
        if not torch.isfinite(target).all():
            raise FloatingPointError(f"features hold NaN or infinity (shape {tuple(target.shape)}).")
        self.rows.append(target.cpu())

    def see_predictions(
        self, logits: torch.Tensor, labels: torch.Tensor | None, dense_logits: torch.Tensor | None
    ) -> None:
        """Adds predictions of shape (images, classes), see [`Evidence`]."""
        assert self.image_sum is not None
        self.rows.append(prediction_values(logits, labels, dense_logits)[self.image_sum].cpu())

    def merge(self, other: "Contributions") -> "Contributions":
        """Puts the images of `other` behind these. Returns self."""
        self.rows.extend(other.rows)
        self.num_images += other.num_images
        return self

    def evidence(self) -> Evidence:
        """The same, summed up."""
        found = Evidence(num_images=self.num_images)
        for rows in self.rows:
            if self.image_sum is None:
                found.see_target(rows)
            else:
                setattr(found, self.image_sum, getattr(found, self.image_sum) + rows.sum().item())
        return found

    def pseudovalues(self) -> torch.Tensor:
        """
        The jackknife's pseudo-values, (images,) in float64: their mean is the target's entropy without its bias of
        order 1 / images, or the criterion's own mean; their variance over the number of images is its variance.
        """
        rows = in_float64(torch.cat(self.rows))
        if len(rows) != self.num_images:
            raise ValueError(
                f"target must give one row an image to race candidates, got {len(rows)} for {self.num_images} images."
            )
        return entropy_pseudovalues(rows, self.rows[0].dtype) if self.image_sum is None else rows


def entropy_pseudovalues(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """
    `n H - (n - 1) H_i`, (n,), where H_i is the entropy (Eq. 6) of `rows` (n, channels) but for the i-th, exactly, and
    a constant channel has the smallest deviation of `dtype`.
    """
    count = len(rows)
    moments = Moments().update(rows)
    moments.dtype = dtype
    squares = (rows - moments.mean).square()
    left = (moments.m2 - squares * (count / (count - 1))).clamp_min(0.0) / (count - 1)
    return count * moments.entropy() - (count - 1) * left.sqrt().clamp_min(moments.floor).log().sum(-1)
