"""Training that can be trusted: whole checkpoints, draws that repeat after a resume, a stop at the first NaN."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import rotate_checkpoints

from .arguments import images_per_step
from .augmentation import BatchAugmentation
from .checkpoints import PREFIX, STAGING, check_resume, latest_whole_checkpoint, publish, stage
from .distillation import Distiller
from .ema import ExponentialMovingAverage
from .images import ImageDataset
from .launch import check_launch, check_sharding
from .loading import LoadingTrainer
from .manifests import manifest_error
from .metrics import TopKAccuracy, top5_ids
from .mixing import Mixing
from .modeling_nose_vit import nose_vit
from .optimization import check_data_size, check_precision
from .progress import BarCallback, Pace
from .streams import ImageStream


class NoseTrainer(LoadingTrainer):
    """
    A [`~transformers.Trainer`] for NoseViT, dense or diluted.

    - `augmentation`, called with (pixel_values, step, micro_step, rank), is applied inside the training step, where
      its draws repeat after a resume.
    - `mixing`, called with (pixel_values, labels, step, micro_step, rank), makes soft targets there.
    - `distiller` adds its loss to that of the labels, in training alone: an evaluation's loss is that of the labels.
    - `ema` averages the weights: both are evaluated (`eval_...`, `eval_ema_...`) and saved, and when training has
      ended the model holds the average.
    - The loss does not depend on the number of processes or accumulated batches, and the model's `problem_type` stays
      as it is.
    - M stands in every log line and in `state.log_history`; images per second and seconds left in those of training.
    - A checkpoint appears whole or not at all, with the hashes of its files.
    - A loss or weight that is not finite stops training; the last good checkpoint stays.
    - Top-1 and top-5 are computed in evaluation from class ids.

    Raises:
        `ValueError`: for `load_best_model_at_end` with diluted layers: it would pick an early checkpoint with M > 0;
            with `ema`, for it as well, and for FSDP, whose ranks hold shards; for a distiller whose teacher does not
            fit the model, or with several GPUs in one process; for a half precision the device is not made for.
        `LaunchError`: where fewer processes run than were asked for.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: TrainingArguments,
        augmentation: BatchAugmentation | None = None,
        mixing: Mixing | None = None,
        distiller: Distiller | None = None,
        ema: ExponentialMovingAverage | None = None,
        **kwargs: Any,
    ):
        check_launch(args.world_size)
        check_precision(args.device, args.bf16, args.fp16)
        diluted = nose_vit(model).config.diluted_attention_layers
        if args.load_best_model_at_end and diluted:
            raise ValueError(
                f"load_best_model_at_end would pick a checkpoint in which layers {diluted} still have M > 0, which "
                "cannot be folded. Switch it off; the last step has M = 0."
            )
        if args.ddp_find_unused_parameters is None and diluted:
            # At M = 0 the diluted attention takes part in no step.
            args.ddp_find_unused_parameters = True
        # Images are counted by process, and the processes' gradients averaged.
        args.average_tokens_across_devices = False
        if distiller is not None:
            distiller.check_student(model)
            if args.n_gpu > 1:
                raise ValueError(
                    f"distiller needs a process for each of the {args.n_gpu} GPUs: start by `accelerate launch "
                    f"--num_processes {args.n_gpu}`, or show one GPU by CUDA_VISIBLE_DEVICES=0."
                )
        # Not finite losses stop the run instead of being filtered from the log.
        args.logging_nan_inf_filter = False
        kwargs.setdefault("compute_metrics", accuracy)
        kwargs.setdefault("preprocess_logits_for_metrics", top5_ids)
        super().__init__(model=model, args=args, **kwargs)
        check_sharding(self.is_fsdp_enabled)
        self.augmentation, self.mixing, self.distiller, self.ema = augmentation, mixing, distiller, ema
        if distiller is not None:
            distiller.teacher.to(args.device)
        if ema is not None:
            if args.load_best_model_at_end or self.is_fsdp_enabled:
                raise ValueError("ema needs load_best_model_at_end and FSDP off: it is the result, and kept whole.")
            self.add_callback(ema)
        self._staging: Path | None = None
        self._micro_step = (-1, 0)
        self._pace = Pace()

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        step = self.state.global_step
        self._pace.start(step)
        self._micro_step = (step, self._micro_step[1] + 1 if self._micro_step[0] == step else 0)
        place = {"step": step, "micro_step": self._micro_step[1], "rank": self.args.process_index}
        if self.augmentation is not None:
            if inputs["labels"].ndim > 1:
                raise ValueError(
                    "augmentation moves pixels and not the labels of each: leave it out for segmentation."
                )
            inputs = {**inputs, "pixel_values": self.augmentation(inputs["pixel_values"], **place)}
        if self.mixing is not None:
            pixel_values, targets = self.mixing(inputs["pixel_values"], inputs["labels"], **place)
            inputs = {**inputs, "pixel_values": pixel_values, "labels": targets}
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {float(loss)} at step {step}. Training stops; the last checkpoint in "
                f"{self.args.output_dir} is from before. Lower the learning rate or look at the data."
            )
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of the labels; in training with the distiller's beside it."""
        distiller = self.distiller if model.training else None
        asked = inputs if distiller is None else {**inputs, **distiller.forward_options}
        loss, outputs = self.label_loss(model, asked, num_items_in_batch)
        if distiller is not None:
            soft = self.distillation_loss(model, outputs, inputs["pixel_values"], num_items_in_batch)
            loss = (1 - distiller.weight) * loss + soft
        return (loss, outputs) if return_outputs else loss

    def label_loss(self, model: nn.Module, inputs: dict[str, Any], num_items: Any) -> tuple[torch.Tensor, Any]:
        """
        The loss against the labels, and what the model put out: cross entropy with label smoothing, averaged over the
        batch's images, or over the `num_items` of the whole step on this process where the Trainer counts them. Class
        ids (batch,) and soft targets (batch, classes) are kept from the model, which would take floats for several
        labels an image and say so in its configuration. Labels of another shape are the model's own affair.
        """
        labels = inputs["labels"]
        if labels.ndim > 2:
            return cast(tuple, super().compute_loss(model, inputs, True, num_items))
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        logits = outputs["logits"]
        targets = labels.to(logits.dtype) if labels.is_floating_point() else labels
        smoothing = self.args.label_smoothing_factor
        total = F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="sum")
        # A sum, because for several GPUs in one process the Trainer gives their shares of the images.
        return total / (len(labels) if num_items is None else torch.as_tensor(num_items).sum()), outputs

    def distillation_loss(self, model: nn.Module, outputs: Any, pixel_values: torch.Tensor, num_items: Any) -> Any:
        """The distiller's loss, averaged as the loss of the labels is."""
        assert self.distiller is not None
        # The teacher in the student's precision: bfloat16 where it trains in that.
        with self.accelerator.autocast():
            losses = self.distiller(nose_vit(model), outputs, pixel_values)
        # By the images of the whole step on this process, or by the batch's where the Trainer divides on.
        return losses.sum() / (len(losses) if num_items is None else num_items)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super()._evaluate(*args, **kwargs)
        if self.ema is not None:
            # A loader draws a seed: the second evaluation must not change what training draws next.
            with torch.random.fork_rng(devices=[]), self.ema.applied(cast(nn.Module, self.model)):
                metrics |= self.evaluate(metric_key_prefix="eval_ema")
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        vit = nose_vit(cast(nn.Module, self.model))
        values = vit.mask_values()
        if values:
            # One number while the layers are diluted together, as by default.
            logs["mask"] = math.fsum(values) / len(values)
            if len(set(values)) > 1:
                layers = vit.config.diluted_attention_layers
                logs.update({f"mask_{layer}": value for layer, value in zip(layers, values, strict=True)})
        if "loss" in logs:
            logs |= self._pace.measure(self.state.global_step, self.state.max_steps, images_per_step(self.args))
        super().log(logs, start_time)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Without weight decay, besides biases and norms: class token and position embeddings, as in DeiT."""
        exempt = ("cls_token", "position_embeddings")
        # The Trainer lists the names of parameters that are not there, too.
        there = {name for name, _ in model.named_parameters()}
        names = super().get_decay_parameter_names(model)
        return [name for name in names if name in there and not name.endswith(exempt)]

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder, step = Path(str(self.args.output_dir)), self.state.global_step
        for name, tensor in cast(nn.Module, self.model).named_parameters():
            if not torch.isfinite(tensor).all():
                raise FloatingPointError(f"{name} is not finite at step {step}. The checkpoint before is kept.")
        if self.args.should_save:
            stage(folder)
        self.accelerator.wait_for_everyone()
        self._staging = folder / STAGING
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if self.ema is not None:
                self.ema.save(folder / STAGING / f"{PREFIX}{step}")
            if self.state.best_global_step == step:
                # The Trainer has noted the place in staging, where a resume would look in vain.
                self.state.best_model_checkpoint = str(folder / f"{PREFIX}{step}")
                self.state.save_to_json(str(folder / STAGING / f"{PREFIX}{step}" / TRAINER_STATE_NAME))
            publish(folder, step, threads=torch.get_num_threads(), world_size=self._world_size)
            rotate_checkpoints(str(folder), self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    @property
    def _world_size(self) -> int:
        """Processes, times the GPUs that one of them feeds: by so much a batch per device is multiplied."""
        return self.args.world_size * max(1, self.args.n_gpu)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        As the Trainer's, but `resume_from_checkpoint=True` takes the last whole checkpoint, and one given by its path
        has to be whole: `ValueError` otherwise.
        """
        self._micro_step = (-1, 0)
        if resume_from_checkpoint:
            resume_from_checkpoint = str(self._whole_checkpoint(resume_from_checkpoint))
            check_resume(Path(resume_from_checkpoint), self._world_size, torch.get_num_threads())
        if self.ema is not None:
            self.ema.checkpoint = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _whole_checkpoint(self, wanted: str | bool) -> Path:
        if isinstance(wanted, bool):
            checkpoint = latest_whole_checkpoint(Path(str(self.args.output_dir)))
            if checkpoint is None:
                raise ValueError(f"There is no whole checkpoint in {self.args.output_dir} to resume from.")
            return checkpoint
        error = manifest_error(wanted)
        if error is not None:
            raise ValueError(f"resume_from_checkpoint is damaged: {error} Resume from the one before.")
        return Path(wanted)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Resumed from its last step, inside an epoch, the Trainer would take one step more.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)


def accuracy(prediction: Any) -> dict[str, float]:
    """`compute_metrics` of the Trainer: top-1 and top-5 as fractions, from ids of shape (images, 5)."""
    metric = TopKAccuracy(keep_in_memory=True)
    return metric.compute(predictions=prediction.predictions, references=prediction.label_ids)


def fit(
    model: nn.Module,
    train: ImageDataset | ImageStream,
    evaluation: ImageDataset,
    args: TrainingArguments,
    *,
    augmentation: BatchAugmentation | None = None,
    mixing: Mixing | None = None,
    distiller: Distiller | None = None,
    ema_decay: float | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    resume: bool = False,
) -> dict[str, Any]:
    """
    Trains `model` in place, from the last whole checkpoint where `resume` finds one; with `ema_decay` it then holds
    the moving average of its weights.

    Returns:
        `{"steps", "seconds", "resumed_from", "threads", "log"}`: `seconds` of this call alone, the log of all.

    Raises:
        `ValueError`: for fewer training images than a step takes.
        `RuntimeError`: where training returned before its last step (on SIGTERM the Trainer may).
    """
    check_data_size(len(train), images_per_step(args))
    folder = Path(str(args.output_dir))
    checkpoint = latest_whole_checkpoint(folder) if resume and folder.is_dir() else None
    trainer = NoseTrainer(
        model=model,
        args=args,
        augmentation=augmentation,
        mixing=mixing,
        distiller=distiller,
        ema=None if ema_decay is None else ExponentialMovingAverage(ema_decay),
        train_dataset=train,
        eval_dataset=evaluation,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(BarCallback)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    state = trainer.state
    if state.global_step != state.max_steps:
        raise RuntimeError(f"Training ended at step {state.global_step} of {state.max_steps}. Continue with --resume.")
    return {
        "steps": state.global_step,
        "seconds": time.perf_counter() - started,
        "resumed_from": None if checkpoint is None else checkpoint.name,
        "threads": torch.get_num_threads(),
        "log": state.log_history,
    }
