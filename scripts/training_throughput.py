#!/usr/bin/env python
"""
What dilution costs and its tail saves in training, steps of all models in turn in one process; whether data keep up.

    python scripts/training_throughput.py --model facebook/deit-tiny-patch16-224 --dataset DATA --output speed.json
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_nose.command_line import parse_job
from hf_nose.context import Job
from hf_nose.devices import finish, stopwatch
from hf_nose.files import write_json
from hf_nose.modeling_nose_vit import NoseViTForImageClassification, nose_vit
from hf_nose.plan import parse_layers
from hf_nose.profiling import count_macs, hardware
from hf_nose.records import public_id
from hf_nose.timing import interleaved
from hf_nose.training import NoseTrainer
from hf_nose.transfer import start_model
from hf_nose.transfer_settings import TransferSettings


def main(argv: list[str] | None = None) -> int:
    """Measures, prints and writes; what it does not know goes to the settings of `hf-nose transfer`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15, help="rounds in which every model takes one step")
    parser.add_argument("--batches", type=int, default=20, help="batches of the loader to wait for")
    parser.add_argument("--diluted", default="0,1,3,4,6", help="layers, comma-separated; the paper's set by default")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    options, flags = parser.parse_known_args(argv)
    layers = parse_layers(options.diluted, "diluted")
    with tempfile.TemporaryDirectory() as folder:
        record = measure(
            parse_job(TransferSettings, [*flags, "--steps=1000000", f"--output_dir={folder}"]), layers, options
        )
    write_json(options.output, record)
    print({**record["steps"], **record["data"]})
    return 0


def measure(settings: TransferSettings, layers: list[int], options: argparse.Namespace) -> dict[str, Any]:
    """Both measurements of one model on one data set, and what they were taken with."""
    job = Job(settings)
    model, processor = start_model(settings, job.data.class_names)
    return {
        "model": public_id(settings.model, settings.base_model_id),
        "dataset": public_id(settings.dataset, settings.dataset_id),
        "layers": layers,
        "batch_size": settings.batch_size,
        "num_workers": settings.num_workers,
        "steps": compare_steps(model, layers, job.device, settings.batch_size, settings.bf16, options.pairs),
        "data": waiting(job, model, processor, options.batches),
        "hardware": hardware(job.device, torch.bfloat16 if settings.bf16 else torch.float32),
    }


def compare_steps(
    model: NoseViTForImageClassification,
    layers: list[int],
    device: torch.device,
    batch_size: int,
    bf16: bool,
    pairs: int,
) -> dict[str, Any]:
    """
    Seconds of a training step, dense, diluted at M = 0.5 with compensation, and in the tail at M = 0: medians over
    `pairs` rounds, and medians of the ratios to dense taken round by round.
    """
    models = {"dense": copy_of(model), "diluted": copy_of(model), "tail": copy_of(model)}
    for name, mask in (("diluted", 0.5), ("tail", 0.0)):
        models[name].dilute(layers, feature_compensation=True)
        models[name].set_mask(mask)
    optimizers = {}
    for name, found in models.items():
        found.to(device).train()
        optimizers[name] = torch.optim.AdamW(found.parameters(), lr=1e-5)
    size = nose_vit(model).embeddings.image_size
    pixel_values = torch.randn(batch_size, 3, *size, device=device)
    labels = torch.randint(0, model.num_labels, (batch_size,), device=device)
    steps = {
        name: partial(step, found, optimizers[name], pixel_values, labels, bf16) for name, found in models.items()
    }
    seconds = interleaved(steps, pairs, warmup=2, watch=stopwatch(device))
    ratios = {
        name: statistics.median(ours / dense for ours, dense in zip(values, seconds["dense"], strict=True))
        for name, values in seconds.items()
    }
    folded = NoseViTForImageClassification.from_vit(model, layers)
    # As the steps compute them: both drop all but the class token behind the last attention.
    dense, without = (count_macs(found, class_token_tail=True)["total"] for found in (model, folded))
    saved = 1 - without / dense
    return {
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "pairs": pairs,
        "dilution_cost": ratios["diluted"] - 1,
        "tail_saving": 1 - ratios["tail"],
        "macs_saved": saved,
        "tail_saving_of_macs_saved": (1 - ratios["tail"]) / saved,
        "skipped_parameters_are_left_alone": left_alone(models["tail"], layers, optimizers["tail"]),
    }


def copy_of(model: NoseViTForImageClassification) -> NoseViTForImageClassification:
    """A model of its own with the same weights."""
    return NoseViTForImageClassification.from_vit(model)


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, pixel_values: torch.Tensor, labels: torch.Tensor, bf16: bool
) -> None:
    """One optimizer step."""
    with torch.autocast(pixel_values.device.type, torch.bfloat16, enabled=bf16):
        loss = model(pixel_values, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def left_alone(model: NoseViTForImageClassification, layers: list[int], optimizer: torch.optim.Optimizer) -> bool:
    """Whether the attention that is not computed has neither gradients nor a state in the optimizer."""
    skipped = {
        id(parameter)
        for layer in layers
        for part in (model.vit.blocks[layer].attention, model.vit.blocks[layer].layernorm_before)
        for parameter in part.parameters()
    }
    return not any(id(parameter) in skipped for parameter in optimizer.state)


def waiting(job: Job[TransferSettings], model: nn.Module, processor: Any, batches: int) -> dict[str, float]:
    """The share of training time spent waiting for the loader, augmentation included in the step."""
    settings, num_labels = job.settings, nose_vit(model).config.num_labels or 0
    args = job.arguments("throughput", settings.steps)
    train, evaluation = job.images("train", num_labels, processor), job.images("evaluation", num_labels, processor)
    trainer = NoseTrainer(model=model, args=args, train_dataset=train, eval_dataset=evaluation)
    augmentation, optimizer = job.augmentation(processor), torch.optim.AdamW(model.parameters(), lr=1e-5)
    model.to(job.device).train()
    iterator, waited, worked = epochs(trainer.get_train_dataloader()), 0.0, 0.0
    for number in range(batches + 2):
        started = time.perf_counter()
        batch = next(iterator)
        arrived = time.perf_counter()
        step(model, optimizer, augmentation(batch["pixel_values"], number), batch["labels"], settings.bf16)
        finish(job.device)
        if number >= 2:
            # The first two batches wait for the workers to start.
            waited, worked = waited + arrived - started, worked + time.perf_counter() - arrived
    images = batches * settings.batch_size
    return {"waiting_share": waited / (waited + worked), "images_per_s": images / (waited + worked)}


def epochs(loader: torch.utils.data.DataLoader) -> Iterator[dict[str, torch.Tensor]]:
    """The batches of one epoch after the other, without end."""
    while True:
        yield from loader


if __name__ == "__main__":
    sys.exit(main())
