"""The Trainer's arguments for a run's settings, and the same in words."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainingArguments

from .optimization import learning_rate_in_words, optimizer_arguments, peak_learning_rate, warmup_steps
from .options import TrainingOptions


def training_arguments(
    settings: TrainingOptions, folder: Path, steps: int, epochs: float | None, on_cpu: bool
) -> TrainingArguments:
    """The Trainer's arguments for `steps` steps (or `epochs` epochs) with checkpoints in `folder`."""
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps if epochs is None else -1,
        num_train_epochs=epochs or 1.0,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.eval_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        activation_checkpointing=settings.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        **optimizer_arguments(settings.optimizer),
        max_grad_norm=settings.max_grad_norm,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": settings.min_learning_rate},
        warmup_steps=warmup_steps(settings.warmup, settings.warmup_unit, epochs),
        weight_decay=settings.weight_decay,
        label_smoothing_factor=settings.label_smoothing,
        bf16=settings.bf16,
        torch_compile=settings.torch_compile,
        seed=settings.seed,
        eval_strategy="steps",
        eval_steps=settings.eval_steps,
        logging_steps=settings.logging_steps,
        save_steps=settings.save_steps,
        save_total_limit=2,
        dataloader_num_workers=settings.num_workers,
        dataloader_prefetch_factor=settings.prefetch_factor,
        remove_unused_columns=False,
        average_tokens_across_devices=False,
        use_cpu=on_cpu,
        report_to=settings.trackers or "none",
        disable_tqdm=False,
    )
    rates = settings.learning_rate, settings.base_learning_rate
    args.learning_rate = peak_learning_rate(*rates, settings.min_learning_rate, images_per_step(args))
    return args


def images_per_step(args: TrainingArguments) -> int:
    """The global batch: images of one optimizer step, over processes and accumulated batches."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def training_words(settings: TrainingOptions, args: TrainingArguments) -> str:
    """The optimizer's settings in words: what scales with the global batch, and what does not."""
    rates = settings.learning_rate, settings.base_learning_rate
    warmup = {"fraction": "share of the steps", "step": "steps", "epoch": "epochs"}[settings.warmup_unit]
    clipping = f"gradients cut at norm {settings.max_grad_norm:g}" if settings.max_grad_norm else "no clipping"
    return (
        f"{settings.optimizer}, {learning_rate_in_words(*rates, images_per_step(args))}; warm-up {settings.warmup:g} "
        f"({warmup}), then a cosine to {settings.min_learning_rate:g}; {clipping}"
    )
