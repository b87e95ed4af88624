"""Settings from a command line: defaults, then a recipe, then flags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any, cast

import yaml
from transformers import HfArgumentParser

from .options import NO_RECIPE, Options, TrainingOptions, run_folder
from .settings import Settings


# A flag of a group takes the place of whatever the recipe says of the group.
EXCLUSIVE = (("num_removed", "ratio", "layers"), ("steps", "epochs"), ("learning_rate", "base_learning_rate"))


def recipe_path(name: str) -> Path:
    """The file of a recipe: one of the package by name, or a YAML file. `ValueError` where there is none."""
    packaged = resources.files("hf_nose") / "recipes"
    names = sorted(item.name.removesuffix(".yaml") for item in packaged.iterdir() if item.name.endswith(".yaml"))
    path = Path(str(packaged / f"{name}.yaml")) if name in names else Path(name)
    if not path.is_file():
        raise ValueError(f"recipe must be one of {', '.join(names)}, or a YAML file, got {name!r}.")
    return path


def read_recipe(path: Path, kind: type[TrainingOptions] = Settings) -> dict[str, Any]:
    """The settings of a `kind` in a recipe; `ValueError` naming keys that no setting has."""
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name} is not YAML: {error}.") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path.name} must map settings to values, got {type(recipe).__name__}.")
    known = {item.name for item in fields(kind)} - {"recipe"}
    unknown = sorted(set(map(str, recipe)) - known)
    if unknown:
        raise ValueError(
            f"{path.name} has unknown settings {', '.join(unknown)}. Known are {', '.join(sorted(known))}."
        )
    return recipe


def as_typed(value: Any) -> str:
    """A recipe's value as on the command line; a YAML list as its items with commas."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def settings_parser(prog: str | None, kind: type[TrainingOptions] = Settings) -> HfArgumentParser:
    """One flag for every field of the settings."""
    return HfArgumentParser(cast(Any, kind), prog=prog, allow_abbrev=False)


def parse_settings(arguments: Sequence[str], prog: str | None = None, base: Path | None = None) -> Settings:
    """The [`Settings`] of a run, see [`parse_job`]."""
    return parse_job(Settings, arguments, prog, base)


def parse_job(
    kind: type[Options], arguments: Sequence[str], prog: str | None = None, base: Path | None = None
) -> Options:
    """
    Settings of a `kind` from a command line. The recipe's values come first, as if they had been typed before the
    flags, so flags win and both are checked alike. Without `--recipe` a run's is the digits', or the short one where
    `--model` or `--dataset` names something else; `--recipe none` is nothing but defaults and flags. A settings.yaml
    takes the recipe's place: `base`, or that of the folder where `--resume` is given without `--recipe`.
    """
    first = settings_parser(prog, kind).parse_known_args(list(arguments))[0]
    # The parser takes --num-removed for --num_removed.
    names = {"--" + argument.split("=")[0][2:].replace("-", "_") for argument in arguments if argument[:2] == "--"}
    is_chosen = first.recipe is not None
    is_general = not is_chosen and (first.model, first.dataset) != (kind.model, kind.dataset)
    if not is_chosen and not is_general:
        first.recipe = kind.default_recipe
    elif first.recipe == NO_RECIPE:
        first.recipe = None
    saved = run_folder(first.output_dir, first.recipe, first.model) / "settings.yaml"
    if base is None and first.resume and not is_chosen and saved.is_file():
        base = saved
    # The general recipe serves many models: the folder, and what is told of the run, go by the model's name.
    source = kind.general_recipe if is_general else first.recipe
    if base is None and source is not None:
        base = recipe_path(source)
    recipe = {} if base is None else read_recipe(base, kind)
    for group in EXCLUSIVE:
        if names & {f"--{key}" for key in group}:
            recipe = {key: value for key, value in recipe.items() if key not in group}
    recipe["recipe"] = first.recipe
    # As one word: a value such as -1 is no flag.
    typed = [f"--{key}={as_typed(value)}" for key, value in recipe.items() if value is not None]
    parser = settings_parser(prog, kind)
    settings, unknown = parser.parse_args_into_dataclasses(args=[*typed, *arguments], return_remaining_strings=True)
    if unknown:
        raise ValueError(f"Unknown settings: {' '.join(unknown)}. See --help.")
    return settings
