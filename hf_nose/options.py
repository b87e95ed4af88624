"""What jobs can be told, by field: where they work, what is removed, how models are trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml

from .criteria import CRITERIA, SIGNS
from .distillation import FEATURES
from .modeling_nose_vit import MASK_GAINS
from .optimization import OPTIMIZERS, WARMUP_UNITS, check_training
from .schedules import ORDERS, SCHEDULES, UNITS
from .selection import SEARCHES


# Instead of a recipe's name: nothing but defaults and flags.
NO_RECIPE = "none"
TRACKERS = ("tensorboard", "trackio", "wandb")
CROPS = ("none", "random_resized")
# The matrices of a block.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")


def option(default: Any, text: str, choices: Sequence[str] | None = None) -> Any:
    """A field of [`Settings`]: its default, its help, its choices."""
    return field(default=default, metadata={"help": text} | ({} if choices is None else {"choices": list(choices)}))


@dataclass
class JobOptions:
    """What any job can be told about its folder, its model and its data."""

    recipe: str | None = option(
        None,
        "Recipe in the package, or a YAML file; flags win over it. By default digits, or short where --model or "
        "--dataset names something else; 'none' for nothing but defaults and flags.",
    )
    output_dir: str | None = option(None, "Folder of the run; runs/<recipe>, or runs/<model>, by default.")
    dry_run: bool = option(False, "Show settings, costs and schedule, run one forward, write nothing.")
    resume: bool = option(False, "Continue a run: after its last finished stage, inside training from a checkpoint.")
    overwrite: bool = option(False, "Delete what an earlier run left in the folder.")
    device: str = option("auto", "Where to compute.", choices=("auto", "cpu", "cuda", "mps"))
    seed: int = option(0, "Seed of splits, samples, initial weights and training.")

    model: str = option(
        "digits-vit", "Hub id or folder of a ViT; a config.json, or 'digits-vit', to train from scratch."
    )
    base_model_id: str | None = option(None, "Public name of a model that was loaded from a path.")
    dataset: str = option("digits", "'digits', a parquet file, a folder, or a Hub id.")
    dataset_id: str | None = option(None, "Public name of a data set that was loaded from a path.")
    image_column: str | None = option(None, "Column of images; found by type otherwise.")
    label_column: str | None = option(None, "Column of labels; found by type otherwise.")
    train_split: str | None = option(None, "Split that trains and calibrates.")
    eval_split: str | None = option(None, "Split that evaluates.")
    max_train_samples: int | None = option(None, "Take a sample of so many training images.")
    max_eval_samples: int | None = option(None, "Take a sample of so many evaluation images.")
    cache_gib: float = option(0.25, "Processed images of a split are kept in memory up to so many GiB.")
    streaming: bool = option(False, "Stream the training images instead of loading them.")
    train_images: int | None = option(None, "How many images a stream has, where nothing else says so.")
    shuffle_buffer_size: int = option(1000, "Images that a stream is mixed in, held by every loader process.")


@dataclass
class RemovalOptions(JobOptions):
    """What is removed, and how."""

    num_calibration: int = option(512, "Images that entropies and scores are measured on.")
    calibration_batch_size: int = option(64, "Images a forward there.")
    tokens: str = option("all", "Tokens that the layer profile counts.", choices=("all", "class"))

    num_removed: int | None = option(None, "How many attention layers to remove.")
    ratio: float | None = option(None, "Share of attention layers to remove: round(ratio x blocks).")
    layers: str | None = option(None, "Layers to remove, such as 0,1,3,4,6; skips the search.")
    criterion: str = option("transfer_entropy", "What a set of layers is scored by.", choices=tuple(CRITERIA))
    search: str = option("greedy", "How sets are searched.", choices=tuple(SEARCHES))
    beam_width: int = option(3, "Sets the beam search keeps.")
    num_draws: int = option(1, "Sets the random search draws and scores; the first is taken.")
    confidence: float = option(0.99, "Confidence of the racing search that it picks what the greedy one would.")
    search_bf16: bool = option(False, "Score in bfloat16; what that changes is measured on the first batch.")
    search_tail: bool = option(False, "Score by the class token alone from the last attention on.")
    stack_candidates: bool = option(False, "Score candidates as one growing batch: for a GPU that one does not fill.")
    state_cache_gib: float = option(
        1.0, "Block inputs kept on the device between rounds of the search, up to so many GiB."
    )
    mask: str = option("skip", "Masked attention leaves x ('skip') or 2x ('double').", choices=tuple(MASK_GAINS))
    sign: str = option("absolute", "Minimise |TE| or the signed TE.", choices=SIGNS)
    target: str = option("logits", "Whose entropy counts.", choices=("logits", "features"))

    dense_steps: int = option(0, "Steps to train the dense model before anything is removed.")
    schedule: str = option("linear", "How M falls from 1 to 0.", choices=SCHEDULES)
    decay: float = option(0.75, "How long it falls: a fraction of training, or units above 1.")
    unit: str = option("step", "Whether M changes by step or by epoch.", choices=UNITS)
    order: str = option("together", "Whether layers fade together or in turns, by their index.", choices=ORDERS)
    feature_compensation: bool | None = option(
        None, "Double the stream as M falls (Eq. 9); on by default, off with one_shot or without training."
    )
    control: bool = option(False, "Train the dense model on for the same steps, to compare with.")

    teacher: str | None = option(
        None, "Teacher of that training: Hub id or folder; 'dense', the run's own, by default."
    )
    distillation_weight: float = option(0.0, "Share of the teacher's soft logits in the loss, beside the labels.")
    distillation_temperature: float = option(2.0, "What logits are divided by for them.")
    distillation_features: str = option(
        "none", "Tokens whose features are to be the teacher's, too.", choices=tuple(FEATURES)
    )
    distillation_blocks: str | None = option(None, "Blocks behind which they are compared, from 0, such as 3,7,11.")
    distillation_feature_weight: float = option(1.0, "Weight of that loss.")
    distillation_control: bool = option(
        False, "Distil the dense model trained on beside it, too; off, it shows what training without a teacher gives."
    )


@dataclass
class TrainingOptions(JobOptions):
    """How models are trained and evaluated: with [`JobOptions`], what every job that trains can be told."""

    # Of a job that names no recipe: for its default model and data, and for any other.
    default_recipe: ClassVar[str | None] = None
    general_recipe: ClassVar[str | None] = None

    steps: int = option(0, "Steps to train; in a run while M decays, where 0 removes without training.")
    epochs: float | None = option(None, "Length of that training in epochs, instead of steps.")
    batch_size: int = option(64, "Training images a step and process.")
    gradient_accumulation_steps: int = option(1, "Batches a step.")
    optimizer: str = option("adamw", "AdamW, or SGD with momentum 0.9.", choices=OPTIMIZERS)
    learning_rate: float = option(1e-3, "Peak learning rate.")
    base_learning_rate: float | None = option(
        None, "Peak learning rate of 512 images a step, instead: it grows with them."
    )
    min_learning_rate: float = option(1e-5, "Where the cosine ends.")
    warmup: float = option(0.05, "How long the learning rate rises: a share of the steps, or as the unit says.")
    warmup_unit: str = option("fraction", "What the warm-up is counted in.", choices=WARMUP_UNITS)
    max_grad_norm: float = option(1.0, "Norm that longer gradients are cut to; 0 is off.")
    weight_decay: float = option(0.05, "Weight decay, but for biases, norms, class token, positions.")
    label_smoothing: float = option(0.1, "Label smoothing.")
    ema_decay: float | None = option(None, "Average the weights, with this decay; the average is the result.")
    drop_path_rate: float = option(0.0, "Stochastic depth.")
    drop_path_schedule: str = option(
        "linear", "Whether its rate rises from 0 block by block.", choices=("linear", "constant")
    )
    crop: str = option("none", "Random part of training images, resized, or the whole.", choices=CROPS)
    crop_scale: float = option(0.08, "Smallest share of an image's area that a crop takes.")
    crop_ratio: float = option(4 / 3, "Largest ratio of a crop's width to its height; the smallest is its inverse.")
    repeated_augmentation: int = option(1, "How often an image of an epoch appears in it, beside itself.")
    shift: int = option(0, "Training images are shifted by up to so many pixels.")
    flip: bool = option(False, "Training images are mirrored half of the time.")
    color_jitter: float = option(0.0, "Brightness, contrast and saturation change by up to this share.")
    rand_augment: float = option(0.0, "Magnitude of RandAugment, up to 10; 0 is off.")
    random_erasing: float = option(0.0, "Share of training images of which a box becomes noise.")
    mixup: float = option(0.0, "Parameter of mixup's Beta distribution; 0 is off.")
    cutmix: float = option(0.0, "That of cutmix; beside mixup, half of the batches get either.")
    bf16: bool = option(False, "Train in bfloat16.")
    gradient_checkpointing: bool = option(False, "Trade time for memory in training.")
    lora_rank: int = option(0, "Train LoRA matrices of so small a rank and the head instead of all weights; 0 is off.")
    lora_alpha: int = option(16, "Scale of the LoRA update: alpha / rank.")
    lora_dropout: float = option(0.0, "Dropout in front of the LoRA matrices.")
    lora_targets: str = option(",".join(LORA_TARGETS), "Matrices of the blocks that get LoRA, comma-separated.")
    torch_compile: bool = option(False, "Compile the model for training.")
    num_workers: int = option(0, "Loader processes.")
    prefetch_factor: int | None = option(None, "Batches that each of them makes ahead; 2 by default.")
    save_steps: int = option(500, "Steps between checkpoints.")
    eval_steps: int = option(200, "Steps between evaluations while training.")
    logging_steps: int = option(20, "Steps between log lines.")
    report_to: str = option("none", "Where log lines go, comma-separated: tensorboard, trackio, wandb, or none.")

    eval_batch_size: int = option(64, "Images a forward in evaluation.")

    def __post_init__(self) -> None:
        self.check_numbers()
        self.check_loading()
        if self.base_learning_rate is not None and self.learning_rate != TrainingOptions.learning_rate:
            raise ValueError("Give one of learning_rate and base_learning_rate.")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other.")

    def check_loading(self) -> None:
        """Refuses, by name, what a stream, a crop or a loader without processes cannot do."""
        if self.streaming and self.repeated_augmentation > 1:
            raise ValueError("repeated_augmentation asks for images again, which a stream cannot: switch one off.")
        if not 0 < self.crop_scale <= 1:
            raise ValueError(f"crop_scale must be in (0, 1], got {self.crop_scale}.")
        if not 1 <= self.crop_ratio < math.inf:
            raise ValueError(f"crop_ratio must be at least 1, got {self.crop_ratio}.")
        if self.prefetch_factor is not None and self.num_workers == 0:
            raise ValueError("prefetch_factor is of loader processes: set num_workers, or leave it out.")

    def check_numbers(self) -> None:
        """Refuses, by name, numbers out of range."""
        for names, least in ((POSITIVE, 1), (NOT_NEGATIVE, 0)):
            for name in names:
                value = vars(self).get(name)
                if value is not None and value < least:
                    raise ValueError(f"{name} must be {'at least 1' if least else '0 or more'}, got {value}.")
        if self.epochs is not None and (self.epochs <= 0 or self.steps):
            raise ValueError(f"epochs must be positive, and steps 0 beside it, got {self.epochs} and {self.steps}.")
        if not set(self.trackers) <= set(TRACKERS):
            raise ValueError(f"report_to must be none or among {','.join(TRACKERS)}, got {self.report_to!r}.")
        if not 0 <= self.cache_gib < math.inf:
            raise ValueError(f"cache_gib must be 0 or more, got {self.cache_gib}.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in (0, 1), got {self.ema_decay}.")
        check_training(vars(self))
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.lora_dropout}.")
        if not set(self.lora_target_list) <= set(LORA_TARGETS):
            # Refused here, not after the dense training.
            raise ValueError(f"lora_targets must be among {','.join(LORA_TARGETS)}, got {self.lora_targets!r}.")

    @property
    def trackers(self) -> list[str]:
        """Where log lines go beside the run's folder."""
        return [name.strip() for name in self.report_to.split(",") if name.strip() != "none"]

    @property
    def lora_target_list(self) -> list[str]:
        """The matrices that get LoRA."""
        return [name.strip() for name in self.lora_targets.split(",")]

    @property
    def is_trained(self) -> bool:
        """Whether `steps` or `epochs` say that there is training."""
        return self.steps > 0 or self.epochs is not None

    @property
    def folder(self) -> Path:
        """The job's folder."""
        return run_folder(self.output_dir, self.recipe, self.model)

    def of_stage(self, stage: str) -> dict[str, Any]:
        """The settings that the result of `stage` depends on: here all but those that change no result."""
        return {name: value for name, value in asdict(self).items() if name not in (*OF_ONE_CALL, *NO_RESULT)}

    def to_yaml(self) -> str:
        """All settings but those of one call, as a recipe that repeats the job."""
        return yaml.safe_dump({k: v for k, v in asdict(self).items() if k not in OF_ONE_CALL}, sort_keys=False)


def run_folder(output_dir: str | None, recipe: str | None, model: str) -> Path:
    """Where a run works: as told, or `runs/` with the name of its recipe or, without one, of its model."""
    name = Path(model).resolve().name if recipe in (None, NO_RECIPE) else Path(recipe).stem
    return Path(output_dir or Path("runs") / name)


POSITIVE = (
    *("train_images", "shuffle_buffer_size", "repeated_augmentation", "prefetch_factor"),
    *("num_removed", "max_train_samples", "max_eval_samples"),
    *("num_calibration", "calibration_batch_size", "beam_width", "num_draws", "batch_size", "lora_alpha"),
    *("gradient_accumulation_steps", "save_steps", "eval_steps", "logging_steps"),
    *("eval_batch_size", "throughput_batch_size"),
)
NOT_NEGATIVE = ("seed", "steps", "dense_steps", "num_workers", "shift", "random_controls", "lora_rank")
OF_ONE_CALL = ("recipe", "output_dir", "stages", "dry_run", "resume", "overwrite", "push_to_hub", "repo_id", "private")
# Say where or how fast something is computed, or what is kept and logged on the way: no result depends on them.
NO_RESULT = (
    *("device", "cache_gib", "state_cache_gib", "num_workers", "prefetch_factor"),
    *("save_steps", "logging_steps", "report_to"),
)
Options = TypeVar("Options", bound=TrainingOptions)
