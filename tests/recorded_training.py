"""Trainings that write down which pixels they were fed, stopped and resumed at will, in one process or several."""

from contextlib import suppress
from pathlib import Path

import torch
from tiny_training import Images, arguments, model, weights
from transformers import TrainerCallback

from hf_nose.crops import RandomResizedCrop
from hf_nose.data import load_image_data
from hf_nose.images import ImageDataset, digits_processor
from hf_nose.streams import ImageStream, LabelledImages
from hf_nose.training import NoseTrainer


class Recorder:
    """An augmentation that changes nothing."""

    def __init__(self):
        self.batches: dict[tuple[int, int], torch.Tensor] = {}

    def __call__(self, pixel_values, step, micro_step, rank):
        self.batches[step, micro_step] = pixel_values.clone()
        return pixel_values


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def images(folder: Path, streaming: bool = False, crop: bool = False, repeats: int = 1) -> ImageDataset | ImageStream:
    """The training images of a folder of numbered ones, as the main job would have them."""
    data = load_image_data(str(folder), streaming=streaming)
    columns = data.image_column, data.label_column
    cut = RandomResizedCrop.for_processor(digits_processor(), 0, 0.2, 4 / 3) if crop else None
    if streaming:
        read = LabelledImages(digits_processor(), *columns, 3, cut)
        return ImageStream(data.train, data.num_train, read, seed=0, buffer_size=8)
    return ImageDataset(data.train, digits_processor(), *columns, 3, crop=cut, repeats=repeats)


def train(folder: Path, data, steps: int, stop: int | None = None, resume: bool = False, **settings) -> dict:
    """What was drawn from step to step, the weights in the end, and the epoch that the Trainer believes in."""
    recorder, found = Recorder(), model()
    trainer = NoseTrainer(
        model=found,
        args=arguments(folder, steps, save_steps=2, eval_steps=3, **settings),
        augmentation=recorder,
        train_dataset=data,
        eval_dataset=Images(6),
        callbacks=[] if stop is None else [Stop(stop)],
    )
    with suppress(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=resume)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert trainer.state.global_step == (steps if stop is None else stop)
    return {"batches": recorder.batches, "weights": weights(found), "epoch": trainer.state.epoch, "losses": losses}
