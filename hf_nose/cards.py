"""Model cards: rendered from a record alone, by a template that can run nothing; text from outside is escaped."""

from __future__ import annotations

from importlib import resources
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .card_text import NOBODY
from .card_words import (
    commands,
    comparison,
    gains,
    licence,
    licence_words,
    limits,
    missing,
    models_of,
    notes,
    removal,
    rows_of,
    status,
    summary,
    training,
    versions,
    word,
)
from .markdown import escape
from .report import CAPTIONS


TAGS = ["nose_vit", "hf_nose", "vision-transformer", "model-compression", "attention-removal"]


class Safe(str):
    """Markdown made here; any other text is escaped."""


def render_card(record: dict[str, Any]) -> str:
    """
    The model card of a checkpoint: YAML in front, Markdown behind. Every number in it stands in `record`.

    Args:
        record (`dict`): what [`card_records.run_record`] and its siblings make, JSON throughout:

            - `name` and `repo_id` (`None` where it has no place on the Hub yet);
            - `trained_by`: `"us"`, `"authors"` (then with `source`), `"nobody"` or `"unknown"`;
            - `base_model`, as shown, and `base_model_id`, `license`, `dataset`, `dataset_id`, or `None`;
            - `model`: `num_hidden_layers`, `num_removed`, `removed`, `diluted`, `mask`, `image_size`, and `chosen_by`,
              who chose layers that no search found;
            - `records`: those of a run's stages by name, where there are any;
            - `recipe` (its name) and `settings` of the training, `published` (the paper's figures), `counted` (costs
              of models that were not run), `experiment` (further results), or `None`;
            - `figures`: path inside the repository by name.

    Raises:
        `ValueError`: where an id is none, or a path leads out of the repository.
    """
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, finalize=plain
    )
    environment.filters |= {"code": code, "word": lambda value: Safe(word(value))}
    template = (resources.files("hf_nose") / "assets" / "card.md.j2").read_text(encoding="utf-8")
    text = environment.from_string(template).render(context(record))
    card = ModelCard(f"---\n{metadata(record).to_yaml()}\n---\n\n{text}")
    return str(card)


def plain(value: Any) -> Any:
    """What the template writes for a value."""
    return value if isinstance(value, Safe) else escape(str(value))


def code(value: str) -> Safe:
    """The same as a literal of Python."""
    return Safe(f'"{word(value)}"')


def metadata(record: dict[str, Any]) -> ModelCardData:
    """What the Hub reads: a base model and a data set only by their ids, results only where something was measured."""
    for name in ("repo_id", "base_model_id", "dataset_id"):
        if record[name] is not None:
            validate_repo_id(record[name])
    word(record["name"])
    # On one line: a line of dashes would end the front matter.
    dataset = " ".join(record["dataset"].split())
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=record["dataset_id"] or dataset,
            dataset_name=dataset,
            metric_type="accuracy",
            metric_name=f"{name} accuracy",
            metric_value=value,
        )
        for name, value in results_of(record).items()
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        license=licence(record),
        base_model=record["base_model_id"],
        datasets=None if record["dataset_id"] is None else [record["dataset_id"]],
        tags=TAGS,
        metrics=["accuracy"] if results else None,
        model_name=record["name"] if results else None,
        eval_results=results or None,
    )


def results_of(record: dict[str, Any]) -> dict[str, float]:
    """Accuracies of these weights, as fractions."""
    if record["experiment"] is not None and "results" in record["experiment"]:
        return record["experiment"]["results"]
    compressed = models_of(record).get("compressed", {})
    return {f"top-{k}": compressed[f"top{k}"] for k in (1, 5) if f"top{k}" in compressed}


def context(record: dict[str, Any]) -> dict[str, Any]:
    """What the template needs, in words."""
    model = record["model"]
    return {
        "name": record["name"],
        "repo": record["repo_id"] or f"{NOBODY}/{record['name']}",
        "summary": Safe(summary(record)),
        "status": Safe(status(record)),
        "headline": [Safe(line) for line in gains(record)],
        "has_weights": record["trained_by"] != "nobody",
        "is_folded": not model["diluted"],
        "removal": [Safe(line) for line in removal(record)],
        "figures": [
            {"name": name, "path": path, "caption": CAPTIONS[name]} for name, path in record["figures"].items()
        ],
        "comparison": Safe(comparison(record)),
        "notes": [Safe(line) for line in notes(record)],
        "experiment": safe_texts(record["experiment"]),
        "training": [Safe(line) for line in training(record)],
        "commands": [Safe(line) for line in commands(record)],
        "missing": [Safe(line) for line in missing(record)],
        "limits": [Safe(line) for line in limits(record)],
        "licence": Safe(licence_words(record)),
        "versions": versions(record),
    }


def safe_texts(experiment: dict[str, Any] | None) -> dict[str, Any] | None:
    """An experiment's words, escaped, and its table."""
    if experiment is None:
        return None
    table = rows_of([[escape(str(cell)) for cell in row] for row in experiment["table"]])
    return {**experiment, "table": Safe(table)}
