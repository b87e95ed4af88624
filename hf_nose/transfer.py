"""Transfer: a trained model, dense or compressed, learns another data set: whole, by its head, or through LoRA."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from transformers import set_seed
from transformers.image_processing_backends import PilBackend

from .context import Job
from .files import locked
from .image_size import processor_with_size, with_image_size
from .images import ImageBatches, load_processor
from .lora import NosePeftModel, lora_of, merge_lora
from .metrics import evaluate_model
from .modeling_nose_vit import NoseViTForImageClassification, nose_vit
from .plan import name_classes, stochastic_depth
from .profiling import count_parameters, hardware, trainable_line
from .progress import Progress
from .report import load_lines
from .run import open_folder, run_stages
from .stages import start_record
from .transfer_settings import TransferSettings
from .weights import load_classifier


def transfer_job(settings: TransferSettings) -> Job[TransferSettings]:
    """Trains and evaluates in the job's folder, or shows what it would do with `dry_run`."""
    job = Job(settings)
    if settings.dry_run:
        dry_run(job)
        return job
    if settings.overwrite:
        # Refused while the old results are still there.
        start_model(settings, job.data.class_names)
    with locked(job.folder) if job.is_main else nullcontext():
        open_folder(job, ["transfer"])
        job.state.wait_for_everyone()
        run_stages(job, ["transfer"], {"transfer": transfer})
    metrics = job.read("transfer")["metrics"]
    job.say(f"top-1 {metrics['top1']:.2%}, top-5 {metrics['top5']:.2%}, loss {metrics['loss']:.4f}")
    job.say("\nLoad it:\n" + "\n".join(load_lines(job.folder / "model")))
    return job


def transfer(job: Job[TransferSettings]) -> dict[str, Any]:
    """Trains, saves an ordinary NoseViT with its image processor, and evaluates what was saved."""
    settings = job.settings
    set_seed(settings.seed)
    model, processor = start_model(settings, job.data.class_names)
    job.check_training(processor)
    trained = trained_part(model, settings)
    job.say(trainable_line(trained))
    trainable = count_parameters(trained, only_trainable=True)
    training = job.fit(trained, "transfer", settings.steps, settings.epochs, processor=processor)
    if isinstance(trained, NosePeftModel):
        model = merge_lora(trained)
    job.save("model", model, processor)
    saved = job.load("model")
    images = ImageBatches(job.images("evaluation", model.num_labels, processor), settings.eval_batch_size)
    with Progress(images, "Evaluating", disable=not job.is_main) as batches:
        metrics = evaluate_model(saved, batches, job.device)
    start = start_record(job, saved)
    start["model"] |= {
        "image_size": saved.config.image_size,
        "removed_attention_layers": saved.config.removed_attention_layers,
    }
    return {
        "method": settings.method,
        "trainable_parameters": trainable,
        "metrics": metrics,
        **start,
        "training": training,
        "hardware": hardware(job.device, saved.dtype),
    }


def start_model(
    settings: TransferSettings, class_names: list[str] | None
) -> tuple[NoseViTForImageClassification, PilBackend]:
    """
    The model that is trained, with its image processor: a new head where the number of classes changes, the data set's
    names of them, positions interpolated where the image size changes. Raises `ValueError` where model, classes and
    size do not fit.
    """
    names, count = class_names, settings.num_labels
    if names is not None and count not in (None, len(names)):
        raise ValueError(f"num_labels must be {len(names)}, the classes that the data set names, got {count}.")
    count = count if names is None else len(names)
    # Weights of half precision would be trained without loss scaling.
    model = load_classifier(settings.model, num_labels=count, **stochastic_depth(settings)).float()
    if names is not None:
        name_classes(model.config, names)
    processor = load_processor(settings.model)
    if settings.image_size is not None:
        model = with_image_size(model, settings.image_size)
        processor = processor_with_size(processor, settings.image_size)
    return model, processor


def trained_part(model: NoseViTForImageClassification, settings: TransferSettings) -> nn.Module:
    """`model` with what is not trained frozen: all but the head in a linear probe, or wrapped in LoRA."""
    if settings.lora_rank:
        return lora_of(model, settings)
    if settings.linear_probe:
        vit = nose_vit(model).requires_grad_(False)
        # The Trainer puts the whole model into training mode before every step.
        vit.register_forward_pre_hook(stay_in_evaluation)
    return model


def stay_in_evaluation(module: nn.Module, _arguments: Any) -> None:
    """Forward pre-hook of a frozen backbone: no stochastic depth, no dropout."""
    module.eval()


def dry_run(job: Job[TransferSettings]) -> None:
    """Shows what would be trained, and runs one forward; writes nothing."""
    settings = job.settings
    job.say(settings.to_yaml())
    model, processor = start_model(settings, job.data.class_names)
    evaluation = job.images("evaluation", model.num_labels, processor)
    trained = trained_part(model, settings)
    job.say(trainable_line(trained))
    with torch.no_grad():
        pixel_values = evaluation[0]["pixel_values"][None].to(job.device)
        logits = trained.eval().to(job.device)(pixel_values=pixel_values).logits
    finite = bool(logits.isfinite().all())
    job.say(f"One forward on {job.device}: {tuple(pixel_values.shape)} -> {tuple(logits.shape)}, finite: {finite}")
    job.say("Dry run: nothing was written.")
