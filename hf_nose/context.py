"""What the stages of a run share: its folder, its data, its models, and the processes that work on it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers.image_processing_backends import PilBackend

from .augmentation import BatchAugmentation
from .data import CalibrationSet, ImageData, calibration_batches, load_image_data
from .files import put_back, read_json, whole_folder, write_json
from .images import ImageBatches, ImageDataset, load_processor
from .launch import check_launch, own_the_machine
from .loading import load_classifier
from .modeling_nose_vit import NoseViTForImageClassification
from .processes import place
from .records import RECORDS
from .settings import Settings


class RunContext:
    """One run: settings and folder, and lazily its data and models. Every process holds one."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.folder = settings.folder
        self.device = choose_device(settings.device)
        self.state = PartialState(cpu=self.device.type == "cpu")
        check_launch(self.state.num_processes)
        own_the_machine()
        if self.device.type == "cuda":
            self.device = self.state.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return self.state.is_main_process

    @cached_property
    def data(self) -> ImageData:
        """Training and evaluation images."""
        settings = self.settings
        return load_image_data(
            settings.dataset,
            image_column=settings.image_column,
            label_column=settings.label_column,
            seed=settings.seed,
            train_split=settings.train_split,
            eval_split=settings.eval_split,
            max_train_samples=settings.max_train_samples,
            max_eval_samples=settings.max_eval_samples,
        )

    @cached_property
    def processor(self) -> PilBackend:
        """The dense model's image processor."""
        return load_processor(self.folder / "dense")

    def images(self, split: str, num_labels: int, processor: PilBackend | None = None) -> ImageDataset:
        """Processed images of `"train"` or `"evaluation"`."""
        rows = self.data.train if split == "train" else self.data.evaluation
        columns = self.data.image_column, self.data.label_column
        return ImageDataset(rows, self.processor if processor is None else processor, *columns, num_labels=num_labels)

    def calibration(self, num_labels: int) -> CalibrationSet:
        """The calibration images: seeded, from the training split."""
        settings = self.settings
        return calibration_batches(
            self.data,
            self.processor,
            settings.num_calibration,
            settings.calibration_batch_size,
            settings.seed,
            num_labels,
        )

    def augmentation(self) -> BatchAugmentation:
        """What training images go through on their way into the model."""
        return BatchAugmentation(seed=self.settings.seed, shift=self.settings.shift, flip=self.settings.flip)

    def load(self, name: str) -> NoseViTForImageClassification:
        """A model of the run's folder, in evaluation mode on the run's device."""
        folder = self.folder / name
        if self.is_main:
            put_back(folder)
        self.state.wait_for_everyone()
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} holds no model: the stage that writes it has not been run.")
        model = load_classifier(folder)
        torch.nn.Module.to(model, self.device)
        return model

    def save(self, name: str, model: NoseViTForImageClassification, processor: PilBackend | None = None) -> None:
        """Writes a model and its image processor into the run's folder, whole or not at all."""
        if self.is_main:
            with whole_folder(self.folder / name) as staging:
                model.save_pretrained(staging)
                (self.processor if processor is None else processor).save_pretrained(staging)
        self.state.wait_for_everyone()

    def read(self, stage: str) -> dict[str, Any]:
        """The record that `stage` left; `ValueError` where it has not been run."""
        path = self.folder / RECORDS[stage]
        if not path.is_file():
            raise ValueError(f"Stage {stage!r} has left no {path.name} in {self.folder}: run it first.")
        return read_json(path)

    def write(self, stage: str, record: dict[str, Any]) -> None:
        """Writes the record of a finished `stage`, with the settings its result depends on."""
        if self.is_main:
            record = {**record, "settings": self.settings.of_stage(stage)}
            write_json(self.folder / RECORDS[stage], record)
        self.state.wait_for_everyone()

    def is_finished(self, stage: str) -> bool:
        """Whether `stage` has left its record."""
        return (self.folder / RECORDS[stage]).is_file()

    def forget(self, stage: str) -> None:
        """Drops the record of `stage`, which will be run again."""
        if self.is_main and self.is_finished(stage):
            os.remove(self.folder / RECORDS[stage])

    def say(self, text: str) -> None:
        """One line for the person at the screen, above any progress bar."""
        if self.is_main:
            tqdm.write(text)


class Progress(Sequence):
    """Batches under a progress bar that counts `rounds` times through this process's share of them."""

    def __init__(self, batches: ImageBatches, description: str, rounds: int = 1, disable: bool = False):
        self.batches = batches
        rank, world_size = place()
        share = len(range(rank, len(batches), world_size))
        self.bar = tqdm(total=rounds * share, desc=description, unit="batch", disable=disable)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Mapping[str, torch.Tensor]:  # type: ignore[override]
        batch = self.batches[index]
        self.bar.update()
        return batch

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()


def choose_device(name: str) -> torch.device:
    """The device of a run; `ValueError` for one that is not there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(device for device in ("cuda", "mps", "cpu") if there[device]))
    if not there[name]:
        raise ValueError(f"device {name!r} is not there; found {[device for device in there if there[device]]}.")
    return torch.device(name)
