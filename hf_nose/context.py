"""What the stages of a run share: its folder, its data, its models, and the processes that work on it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Generic, Literal, overload

import datasets
from accelerate import PartialState
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainingArguments
from transformers.image_processing_backends import PilBackend

from .arguments import training_arguments, training_words
from .augmentation import BatchAugmentation, normalisation
from .calibration import CalibrationSet, calibration_batches
from .crops import RandomResizedCrop
from .data import ImageData, load_image_data
from .devices import choose_device
from .distillation import Distiller
from .files import put_back, read_json, whole_folder, write_json
from .images import ImageDataset, load_processor
from .launch import check_launch, own_the_machine
from .mixing import Mixing
from .modeling_nose_vit import NoseViTForImageClassification, nose_vit
from .optimization import check_data_size, check_precision
from .options import Options
from .processes import whole_weights
from .records import RECORDS
from .settings import Settings
from .streams import ImageStream, LabelledImages
from .training import fit
from .weights import load_classifier


class Job(Generic[Options]):
    """A job that trains: settings and folder, and lazily its data and models. Every process holds one."""

    def __init__(self, settings: Options):
        self.settings = settings
        self.folder = settings.folder
        self.device = choose_device(settings.device)
        check_precision(self.device, settings.bf16, fp16=False)
        self._images: dict[tuple[str, int, str], ImageDataset] = {}
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
            dataset_id=settings.dataset_id,
            streaming=settings.streaming,
            train_images=settings.train_images,
        )

    @cached_property
    def processor(self) -> PilBackend:
        """The dense model's image processor."""
        return load_processor(self.folder / "dense")

    @overload
    def images(
        self, split: Literal["evaluation"], num_labels: int, processor: PilBackend | None = None
    ) -> ImageDataset: ...

    @overload
    def images(
        self, split: Literal["train"], num_labels: int, processor: PilBackend | None = None
    ) -> ImageDataset | ImageStream: ...

    def images(self, split: str, num_labels: int, processor: PilBackend | None = None) -> ImageDataset | ImageStream:
        """
        Processed images of `"train"`, cropped, repeated or streamed as the settings say, or `"evaluation"`; but for a
        stream the same object at every call, so that they are processed once.
        """
        processor = self.processor if processor is None else processor
        if split == "train" and isinstance(self.data.train, datasets.IterableDataset):
            return self.image_stream(self.data.train, num_labels, processor)
        key = split, num_labels, processor.to_json_string()
        if key not in self._images:
            self._images[key] = self.image_dataset(split, num_labels, processor)
        return self._images[key]

    def image_dataset(self, split: str, num_labels: int, processor: PilBackend) -> ImageDataset:
        """Processed images of a split that is loaded."""
        settings, columns = self.settings, (self.data.image_column, self.data.label_column)
        options: dict[str, Any] = {"num_labels": num_labels, "max_bytes": int(settings.cache_gib * 2**30)}
        if split == "evaluation":
            return ImageDataset(self.data.evaluation, processor, *columns, **options)
        options |= {"crop": self.crop(processor), "repeats": settings.repeated_augmentation}
        return ImageDataset(self.data.train, processor, *columns, **options)

    def image_stream(self, rows: datasets.IterableDataset, num_labels: int, processor: PilBackend) -> ImageStream:
        """Processed training images as they are read."""
        columns = self.data.image_column, self.data.label_column
        read = LabelledImages(processor, *columns, num_labels, self.crop(processor))
        return ImageStream(rows, self.data.num_train, read, self.settings.seed, self.settings.shuffle_buffer_size)

    def crop(self, processor: PilBackend) -> RandomResizedCrop | None:
        """What cuts training images, where the settings ask for it."""
        settings = self.settings
        if settings.crop == "none":
            return None
        return RandomResizedCrop.for_processor(processor, settings.seed, settings.crop_scale, settings.crop_ratio)

    def augmentation(self, processor: PilBackend | None = None) -> BatchAugmentation:
        """What training images go through on their way into the model."""
        settings, names = self.settings, ("seed", "shift", "flip", "rand_augment", "random_erasing", "color_jitter")
        options = {name: getattr(settings, name) for name in names}
        if settings.rand_augment or settings.color_jitter:
            options |= normalisation(self.processor if processor is None else processor)
        return BatchAugmentation(**options)

    def mixing(self, num_labels: int) -> Mixing | None:
        """What mixes them and their labels, where it is asked for."""
        settings = self.settings
        if not settings.mixup and not settings.cutmix:
            return None
        return Mixing(num_labels, settings.mixup, settings.cutmix, settings.seed)

    def check_training(self, processor: PilBackend | None = None) -> None:
        """Refuses a training that cannot be, before anything is trained: too few images, a missing package."""
        self.augmentation(processor)
        settings = self.settings
        check_data_size(
            self.data.num_train,
            settings.batch_size * settings.gradient_accumulation_steps * self.state.num_processes,
        )

    def arguments(self, name: str, steps: int, epochs: float | None = None) -> TrainingArguments:
        """The Trainer's arguments for a training with its checkpoints in the folder `training/NAME`."""
        on_cpu = self.device.type == "cpu"
        return training_arguments(self.settings, self.folder / "training" / name, steps, epochs, on_cpu)

    def fit(
        self,
        model: nn.Module,
        name: str,
        steps: int,
        epochs: float | None = None,
        *,
        processor: PilBackend | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        distiller: Distiller | None = None,
    ) -> dict[str, Any]:
        """Trains `model` as the settings say, see [`~hf_nose.training.fit`]."""
        settings, num_labels = self.settings, nose_vit(model).config.num_labels or 0
        args = self.arguments(name, steps, epochs)
        self.say(training_words(settings, args))
        return fit(
            model,
            self.images("train", num_labels, processor),
            self.images("evaluation", num_labels, processor),
            args,
            augmentation=self.augmentation(processor),
            mixing=self.mixing(num_labels),
            distiller=distiller,
            ema_decay=settings.ema_decay,
            callbacks=callbacks,
            resume=settings.resume,
        )

    def load(self, name: str) -> NoseViTForImageClassification:
        """A model of the run's folder, in evaluation mode on the run's device."""
        folder = self.folder / name
        if self.is_main:
            put_back(folder)
        self.state.wait_for_everyone()
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} holds no model: the stage that writes it has not been run.")
        model = load_classifier(folder)
        nn.Module.to(model, self.device)
        return model

    def save(self, name: str, model: NoseViTForImageClassification, processor: PilBackend | None = None) -> None:
        """Writes a model and its image processor into the run's folder, whole or not at all; all ranks come here."""
        weights = whole_weights(model)
        if self.is_main:
            with whole_folder(self.folder / name) as staging:
                model.save_pretrained(staging, state_dict=weights)
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


class RunContext(Job[Settings]):
    """One run of the main job."""

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
