"""Settings of `hf-nose transfer`: those of every job that trains, and its own."""

from __future__ import annotations

from dataclasses import dataclass

from .options import TrainingOptions, option


@dataclass
class TransferSettings(TrainingOptions):
    """Everything a transfer can be told. Without `linear_probe` and `lora_rank` the whole model is fine-tuned."""

    linear_probe: bool = option(False, "Train the head alone; the rest is frozen and computes as in evaluation.")
    num_labels: int | None = option(None, "Number of classes where the data set does not name them.")
    image_size: int | None = option(
        None, "Sides of the images in pixels, where they are to be others than the checkpoint's."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.is_trained:
            raise ValueError("Say how long to train: give steps or epochs.")
        if self.linear_probe and self.lora_rank:
            raise ValueError("linear_probe and lora_rank exclude each other: LoRA trains more than the head.")
        if self.model.endswith(("digits-vit", ".json")):
            raise ValueError(f"model must be trained weights, a Hub id or a folder, got {self.model!r}.")
        for name in ("num_labels", "image_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")

    @property
    def method(self) -> str:
        """What is trained: all weights, the head, or LoRA matrices."""
        return "linear_probe" if self.linear_probe else "lora" if self.lora_rank else "full"
