"""Settings of a run: defaults, then a recipe, then flags; and which of them each stage depends on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, cast

import yaml
from transformers import HfArgumentParser

from .criteria import CRITERIA, SIGNS
from .distillation import FEATURES, check_distillation
from .modeling_nose_vit import MASK_GAINS
from .schedules import SCHEDULES, UNITS, decay_length
from .selection import SEARCHES


STAGES = ("prepare", "profile", "select", "dilute", "fold", "evaluate", "report")
DEFAULT_RECIPE = "digits"


def option(default: Any, text: str, choices: Sequence[str] | None = None) -> Any:
    """A field of [`Settings`]: its default, its help, its choices."""
    return field(default=default, metadata={"help": text} | ({} if choices is None else {"choices": list(choices)}))


@dataclass
class Settings:
    """Everything a run can be told. Learning rates and steps are those of the whole run, batch sizes per process."""

    recipe: str | None = option(
        None, "Recipe in the package, or a YAML file; flags win over it. By default digits, or none beside a --model."
    )
    output_dir: str | None = option(None, "Folder of the run; runs/<recipe>, or runs/<model>, by default.")
    stages: str = option(",".join(STAGES), "Stages to run, comma-separated, in their order.")
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
    mask: str = option("skip", "Masked attention leaves x ('skip') or 2x ('double').", choices=tuple(MASK_GAINS))
    sign: str = option("absolute", "Minimise |TE| or the signed TE.", choices=SIGNS)
    target: str = option("logits", "Whose entropy counts.", choices=("logits", "features"))

    dense_steps: int = option(0, "Steps to train the dense model before anything is removed.")
    steps: int = option(0, "Steps to train while M decays; 0 removes without training.")
    epochs: float | None = option(None, "Length of that training in epochs, instead of steps.")
    schedule: str = option("linear", "How M falls from 1 to 0.", choices=SCHEDULES)
    decay: float = option(0.75, "How long it falls: a fraction of training, or units above 1.")
    unit: str = option("step", "Whether M changes by step or by epoch.", choices=UNITS)
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

    batch_size: int = option(64, "Training images a step and process.")
    gradient_accumulation_steps: int = option(1, "Batches a step.")
    learning_rate: float = option(1e-3, "Peak learning rate of AdamW.")
    min_learning_rate: float = option(1e-5, "Where the cosine ends.")
    warmup: float = option(0.05, "Share of the steps that the learning rate rises for.")
    weight_decay: float = option(0.05, "Weight decay, but for biases, norms, class token, positions.")
    label_smoothing: float = option(0.1, "Label smoothing.")
    ema_decay: float | None = option(None, "Average the weights, with this decay; the average is the result.")
    drop_path_rate: float = option(0.0, "Stochastic depth.")
    shift: int = option(0, "Training images are shifted by up to so many pixels.")
    flip: bool = option(False, "Training images are mirrored half of the time.")
    bf16: bool = option(False, "Train in bfloat16.")
    gradient_checkpointing: bool = option(False, "Trade time for memory in training.")
    num_workers: int = option(0, "Loader processes.")
    save_steps: int = option(500, "Steps between checkpoints.")
    eval_steps: int = option(200, "Steps between evaluations while training.")
    logging_steps: int = option(20, "Steps between log lines.")

    eval_batch_size: int = option(64, "Images a forward in evaluation.")
    random_controls: int = option(3, "Random sets evaluated beside the chosen one.")
    throughput_batch_size: int = option(32, "Images a forward where speed is measured.")
    throughput_rounds: int = option(10, "Interleaved rounds there.")

    def __post_init__(self) -> None:
        self.check_numbers()
        self.check_lengths()
        given = [name for name in ("num_removed", "ratio", "layers") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"Give one of num_removed, ratio and layers, got {' and '.join(given)}.")
        unknown = sorted(set(self.stage_list) - set(STAGES))
        if unknown or not self.stage_list:
            raise ValueError(f"stages must be among {','.join(STAGES)}, got {self.stages!r}.")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other.")
        check_distillation(vars(self), self.is_distilled, self.is_trained)
        if self.schedule == "one_shot" and self.feature_compensation:
            raise ValueError("schedule=one_shot removes at once, as f = x: it excludes feature_compensation.")
        if not self.is_trained and self.feature_compensation:
            raise ValueError("feature_compensation needs training: set steps or epochs. Untrained, it ends at chance.")

    def check_numbers(self) -> None:
        """Refuses, by name, numbers out of range."""
        for name in POSITIVE:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("seed", "steps", "dense_steps", "num_workers", "shift", "random_controls"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}.")
        if self.throughput_rounds < 2:
            raise ValueError(f"throughput_rounds must be at least 2, for quartiles, got {self.throughput_rounds}.")
        for name in ("ratio", "ema_decay"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be in (0, 1), got {getattr(self, name)}.")

    def check_lengths(self) -> None:
        """Refuses, by name, a training or a decay without a length."""
        if self.epochs is not None and (self.epochs <= 0 or self.steps):
            raise ValueError(f"epochs must be positive, and steps 0 beside it, got {self.epochs} and {self.steps}.")
        if self.unit == "epoch" and self.steps:
            raise ValueError("unit=epoch needs the length of training in epochs: give epochs instead of steps.")
        if self.steps or self.unit == "epoch" and self.epochs:
            # Refused here, not after the dense training.
            decay_length(self.decay, self.steps or math.ceil(self.epochs or 0))

    @property
    def stage_list(self) -> list[str]:
        """The stages to run."""
        return [name.strip() for name in self.stages.split(",") if name.strip()]

    @property
    def is_trained(self) -> bool:
        """Whether the dilution trains."""
        return self.steps > 0 or self.epochs is not None

    @property
    def is_distilled(self) -> bool:
        """Whether the dilution has a teacher."""
        return self.distillation_weight > 0 or self.distillation_features != "none"

    @property
    def has_own_teacher(self) -> bool:
        """Whether the teacher is the run's own dense model."""
        return self.teacher in (None, "dense")

    @property
    def uses_compensation(self) -> bool:
        """Feature compensation as asked for, or by default: on, but not with one_shot or without training."""
        if self.feature_compensation is not None:
            return self.feature_compensation
        return self.is_trained and self.schedule != "one_shot"

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return run_folder(self.output_dir, self.recipe, self.model)

    def of_stage(self, stage: str) -> dict[str, Any]:
        """The settings that the result of `stage` depends on; those of training only where the stage trains."""
        is_trained = {"prepare": self.dense_steps > 0, "dilute": self.is_trained}.get(stage, True)
        names = [name for name in DEPENDS.get(stage, "").split() if is_trained or name not in OF_TRAINING.split()]
        return {name: getattr(self, name) for name in names}

    def to_yaml(self) -> str:
        """All settings but those of one call, as a recipe that repeats the run."""
        return yaml.safe_dump({k: v for k, v in asdict(self).items() if k not in OF_ONE_CALL}, sort_keys=False)


OF_TRAINING = (
    "batch_size gradient_accumulation_steps learning_rate min_learning_rate warmup weight_decay label_smoothing "
    "shift flip bf16 gradient_checkpointing eval_steps ema_decay"
)
# The settings that the result of each stage depends on; the others follow from the stages before.
DEPENDS = {
    "prepare": (
        "seed model base_model_id dataset dataset_id image_column label_column train_split eval_split "
        f"max_train_samples max_eval_samples dense_steps drop_path_rate {OF_TRAINING}"
    ),
    "profile": ("num_calibration calibration_batch_size tokens"),
    "select": (
        "seed num_calibration calibration_batch_size num_removed ratio layers criterion search "
        "beam_width num_draws mask sign target"
    ),
    "dilute": (
        "seed steps epochs schedule decay unit feature_compensation control teacher distillation_weight "
        "distillation_temperature distillation_features distillation_blocks distillation_feature_weight "
        f"distillation_control {OF_TRAINING}"
    ),
    "evaluate": ("eval_batch_size random_controls throughput_batch_size throughput_rounds"),
}
POSITIVE = (
    *("num_removed", "max_train_samples", "max_eval_samples"),
    *(
        "num_calibration",
        "calibration_batch_size",
        "beam_width",
        "num_draws",
        "batch_size",
        "gradient_accumulation_steps",
    ),
    *("save_steps", "eval_steps", "logging_steps", "eval_batch_size", "throughput_batch_size"),
)
# A flag of a group takes the place of whatever the recipe says of the group.
EXCLUSIVE = (("num_removed", "ratio", "layers"), ("steps", "epochs"))
OF_ONE_CALL = ("recipe", "output_dir", "stages", "dry_run", "resume", "overwrite")


def recipe_path(name: str) -> Path:
    """The file of a recipe: one of the package by name, or a YAML file. `ValueError` where there is none."""
    packaged = resources.files("hf_nose") / "recipes"
    names = sorted(item.name.removesuffix(".yaml") for item in packaged.iterdir() if item.name.endswith(".yaml"))
    path = Path(str(packaged / f"{name}.yaml")) if name in names else Path(name)
    if not path.is_file():
        raise ValueError(f"recipe must be one of {', '.join(names)}, or a YAML file, got {name!r}.")
    return path


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings in a recipe; `ValueError` naming keys that no setting has."""
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name} is not YAML: {error}.") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path.name} must map settings to values, got {type(recipe).__name__}.")
    known = {item.name for item in fields(Settings)} - {"recipe"}
    unknown = sorted(set(map(str, recipe)) - known)
    if unknown:
        raise ValueError(
            f"{path.name} has unknown settings {', '.join(unknown)}. Known are {', '.join(sorted(known))}."
        )
    return recipe


def as_typed(value: Any) -> str:
    """A recipe's value as on the command line; a YAML list as its items with commas."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def run_folder(output_dir: str | None, recipe: str | None, model: str) -> Path:
    """Where a run works: as told, or `runs/` with the name of its recipe or, without one, of its model."""
    return Path(output_dir or Path("runs") / (Path(recipe).stem if recipe else Path(model).resolve().name))


def settings_parser(prog: str | None) -> HfArgumentParser:
    """One flag for every field of [`Settings`]."""
    return HfArgumentParser(cast(Any, Settings), prog=prog, allow_abbrev=False)


def parse_settings(arguments: Sequence[str], prog: str | None = None, base: Path | None = None) -> Settings:
    """
    Settings from a command line. The recipe's values come first, as if they had been typed before the flags, so flags
    win and both are checked alike. Without `--recipe` it is the digits', or none where `--model` or `--dataset` names
    something else: what suits the digits trains nothing else by accident. A settings.yaml takes the recipe's place:
    `base`, or that of the folder where `--resume` is given without `--recipe`.
    """
    first = settings_parser(prog).parse_known_args(list(arguments))[0]
    # The parser takes --num-removed for --num_removed.
    names = {"--" + argument.split("=")[0][2:].replace("-", "_") for argument in arguments if argument[:2] == "--"}
    is_chosen = first.recipe is not None
    if not is_chosen and (first.model, first.dataset) == (Settings.model, Settings.dataset):
        first.recipe = DEFAULT_RECIPE
    saved = run_folder(first.output_dir, first.recipe, first.model) / "settings.yaml"
    if base is None and first.resume and not is_chosen and saved.is_file():
        base = saved
    if base is None and first.recipe is not None:
        base = recipe_path(first.recipe)
    recipe = {} if base is None else read_recipe(base)
    for group in EXCLUSIVE:
        if names & {f"--{key}" for key in group}:
            recipe = {key: value for key, value in recipe.items() if key not in group}
    recipe["recipe"] = first.recipe
    # As one word: a value such as -1 is no flag.
    typed = [f"--{key}={as_typed(value)}" for key, value in recipe.items() if value is not None]
    parser = settings_parser(prog)
    settings, unknown = parser.parse_args_into_dataclasses(args=[*typed, *arguments], return_remaining_strings=True)
    if unknown:
        raise ValueError(f"Unknown settings: {' '.join(unknown)}. See --help.")
    return settings
