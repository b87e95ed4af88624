"""A Trainer whose loader hands out the same images in the same epoch, however training got there."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer

from .sampling import DrawnDataset, EpochSampler
from .streams import ImageStream


class LoadingTrainer(Trainer):
    """
    A [`~transformers.Trainer`] that draws from a [`DrawnDataset`] or an [`ImageStream`] by seed and epoch alone.

    Without it, a training of several processes that is resumed after its first epoch would see that epoch's order
    again: accelerate does not tell the sampler behind a resumed loader which epoch it is.

    Raises:
        `ValueError`: where the training data are smaller than one batch of all processes, or a stream is to be read
            by persistent workers, which never hear of the next epoch.
    """

    _sampler: EpochSampler | None = None

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        """As the Trainer's, for data that fill at least one batch."""
        data = self.train_dataset
        if isinstance(data, DrawnDataset | ImageStream):
            batch = self._train_batch_size * self.args.world_size
            if len(data) < batch:
                raise ValueError(
                    f"The training data have {len(data)} images, fewer than the {batch} of one batch, all processes "
                    "together: lower batch_size, or take more images."
                )
        if isinstance(data, ImageStream):
            if self.args.dataloader_persistent_workers:
                raise ValueError("dataloader_persistent_workers never hear of a stream's next epoch: switch it off.")
            data.batch_size = self._train_batch_size
        return super().get_train_dataloader()

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        data = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(data, DrawnDataset):
            return super()._get_train_sampler(train_dataset)
        self._sampler = EpochSampler(len(data), self.args.seed, data.repeats)
        return self._sampler

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self._sampler is not None:
            self._sampler.set_epoch(kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)
