"""A benchmark's record as CSV, as tables, and in words: every number in them stands in the record."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .files import write_text
from .markdown import table
from .memory import UNITS
from .published import BASES, shape_figures, shape_setting
from .roofline import best
from .shapes import PUBLISHED_SETS, SHAPES


# Of a model in a group, as in the record; lists become one column an item.
MODEL_COLUMNS = (
    "name",
    "kind",
    "removed",
    "chunk_size_feed_forward",
    "chunk_size_attention",
    "fuse_qkv",
    "parameters",
    "macs",
    "macs_computed",
    "images_per_s",
    "quartiles",
    "latency_s",
    "latency_quartiles",
    "ratio_to_first",
    "ratio_quartiles",
    "ratio_interval",
    "verdict",
    "gemm_share",
    "ratio_to_plain",
    "plain_interval",
    "peak_bytes",
    "allocated_bytes",
    "reserved_bytes",
)
MEMORY_COLUMNS = (
    *MODEL_COLUMNS[:6],
    "images",
    *MODEL_COLUMNS[-3:],
    "weights_bytes",
    "bytes_per_image",
    "ratio_to_first",
)
GROUP_COLUMNS = ("shape", "dtype", "attention", "torch_compile", "batch_size", "rounds", "warmup")
PAIRS = ("quartiles", "latency_quartiles", "ratio_quartiles", "ratio_interval", "plain_interval")


def groups_csv(record: dict[str, Any]) -> str:
    """One line a model and group, with hardware and the versions that decide speed."""
    return _csv(record, record["groups"], GROUP_COLUMNS, MODEL_COLUMNS)


def memory_csv(record: dict[str, Any]) -> str:
    """One line a model, data type and attention under a budget of memory."""
    return _csv(record, record["memory"], ("shape", "dtype", "attention", "budget_bytes"), MEMORY_COLUMNS)


def _csv(
    record: dict[str, Any], entries: list[dict[str, Any]], entry_columns: Sequence[str], model_columns: Sequence[str]
) -> str:
    packages = ("hf_nose", "python", "torch", "transformers")
    columns = [name for column in model_columns for name in _names(column)]
    machine = list(record["hardware"])
    text = io.StringIO()
    writer = csv.DictWriter(text, [*entry_columns, *columns, *machine, *packages], lineterminator="\n")
    writer.writeheader()
    shared = record["hardware"] | {name: record["versions"][name] for name in packages}
    for entry in entries:
        for model in entry["models"]:
            row = {name: entry[name] for name in entry_columns} | shared
            for column in model_columns:
                value = model.get(column)
                if column == "removed":
                    row[column] = " ".join(map(str, value))
                else:
                    values = value or ("", "") if column in PAIRS else (value,)
                    row |= dict(zip(_names(column), values, strict=True))
            writer.writerow(row)
    return text.getvalue()


def _names(column: str) -> tuple[str, ...]:
    return (f"{column}_lower", f"{column}_upper") if column in PAIRS else (column,)


def write_tables(record: dict[str, Any], path: Path) -> None:
    """Beside the record's JSON file: its groups and its budgets as CSV, and everything as Markdown."""
    for suffix, text in ((".csv", groups_csv(record)), ("-memory.csv", memory_csv(record)), (".md", tables(record))):
        target = path.with_name(f"{path.stem}{suffix}")
        # A header alone says nothing.
        if text.count("\n") > 1:
            write_text(target, text)
        else:
            target.unlink(missing_ok=True)


def tables(record: dict[str, Any]) -> str:
    """All groups and budgets of a record as Markdown, with what is not faster in words."""
    parts = [_group(entry, record["groups"]) for entry in record["groups"]]
    parts += [_budget(entry) for entry in record["memory"]]
    return "\n\n".join(parts) + "\n" if parts else "Nothing was measured.\n"


def _group(entry: dict[str, Any], groups: list[dict[str, Any]]) -> str:
    models = entry["models"]
    is_timed, has_memory = "images_per_s" in models[0], "peak_bytes" in models[0]
    paper = _published(entry) if is_timed else {}
    header = ["model", "M params", "GMACs as published", "GMACs computed"]
    header += ["ms", "images/s (quartiles)", "x stock (95 %)", "", "of GEMM rate"] if is_timed else []
    header += ["peak MiB", "allocated", "reserved"] if has_memory else []
    header += [f"paper: {title}" for title in ("images/s", "x dense")] if paper else []
    rows = []
    for model in models:
        row = [model["name"], f"{model['parameters'] / 1e6:.2f}"]
        row += [f"{model[key] / 1e9:.2f}" for key in ("macs", "macs_computed")]
        row += _speed_cells(model) if is_timed else []
        row += (
            [_mebibytes(model.get(f"{key}_bytes")) for key in ("peak", "allocated", "reserved")] if has_memory else []
        )
        row += paper.get(model["name"], ["", ""]) if paper else []
        rows.append(row)
    compiled = ", compiled" if entry["torch_compile"] else ""
    where = f"{entry['shape']}, {entry['dtype']}, {entry['attention']}{compiled}, batch {entry['batch_size']}"
    lines = [
        f"**{where}{_variants(models)}**",
        "",
        *markdown_table(header, rows),
    ]
    if is_timed:
        lines += ["", *_words(entry, groups)]
    if paper:
        lines += ["", f"The paper's columns: {shape_setting(entry['shape'])}, another machine and another code."]
    return "\n".join(lines)


def _variants(models: list[dict[str, Any]]) -> str:
    """For the title of a table: how some of its models run a second time."""
    is_sliced = any(model["chunk_size_feed_forward"] or model["chunk_size_attention"] for model in models)
    is_fused = any(model["fuse_qkv"] for model in models)
    return ", whole and in slices" * is_sliced + ", q, k and v apart and as one product" * is_fused


def _speed_cells(model: dict[str, Any]) -> list[str]:
    lower, upper = model["ratio_interval"]
    return [
        _milliseconds(model["latency_s"]),
        f"{rate(model['images_per_s'])} ({' to '.join(map(rate, model['quartiles']))})",
        f"{model['ratio_to_first']:.2f} ({lower:.2f} to {upper:.2f})",
        model["verdict"] if model["kind"] != "stock" else "",
        f"{100 * model['gemm_share']:.0f} %",
    ]


def _words(entry: dict[str, Any], groups: list[dict[str, Any]]) -> list[str]:
    """What the table says, in sentences: the roofline, and who is not faster."""
    first = entry["models"][0]
    gemm = best([group["gemm"] for group in groups if group["dtype"] == entry["dtype"] and "gemm" in group])
    lines = [
        f"Medians of {entry['rounds']} rounds, the models in turn. This machine multiplies matrices at "
        f"{gemm['macs_per_s'] / 1e12:.3g} T MAC/s (the best that was measured, at "
        f"{' x '.join(map(str, gemm['size']))}; beside these models {entry['gemm']['macs_per_s'] / 1e12:.3g})."
    ]
    for model in entry["models"][1:]:
        if model["verdict"] != "faster":
            lower, upper = model["ratio_interval"]
            lines.append(
                f"{model['name']} is {model['verdict'].partition(':')[0]} than {first['name']}: "
                f"{model['ratio_to_first']:.2f}x, {lower:.2f} to {upper:.2f} with 95 % confidence."
            )
    for model in entry["models"]:
        if "ratio_to_plain" in model:
            cost, lower, upper = (
                100 * (1 / ratio - 1) for ratio in (model["ratio_to_plain"], *reversed(model["plain_interval"]))
            )
            lines.append(
                f"{model['name']} takes {abs(cost):.1f} % {'more' if cost >= 0 else 'less'} time than "
                f"{model['variant_of']}: {lower:+.1f} to {upper:+.1f} % with 95 % confidence, {entry['rounds']} pairs."
            )
    return ["  \n".join(lines)]


def _published(entry: dict[str, Any]) -> dict[str, list[str]]:
    """The paper's images per second and their ratio to dense by name, where this group is in its setting."""
    if not _is_in_the_papers_way(entry) or entry["torch_compile"]:
        return {}
    if not shape_setting(entry["shape"]).endswith(f" batch {entry['batch_size']}"):
        return {}
    return _paper_cells(entry, "images_per_s")


def _paper_cells(entry: dict[str, Any], metric: str) -> dict[str, list[str]]:
    """A figure of the paper, and what it is of its dense model's, for every model that the paper has."""
    dense, cells = shape_figures(entry["shape"], 0)[metric], {}
    for model in entry["models"]:
        value = paper_figures(entry["shape"], model).get(metric)
        # Its dense model is the stock one.
        if value is not None and (model["kind"] == "stock" or model["removed"]):
            cells[model["name"]] = [f"{value:.0f}", f"{value / dense:.2f}"]
    return cells


def paper_figures(shape: str, model: dict[str, Any]) -> dict[str, float]:
    """
    The paper's figures of a model in a record, by metric: of DeiT itself, by its shape or its checkpoint, dense or
    without as many layers as in the paper, those that it removed where it says which. Empty for anything else: another
    ViT of the same shape, another set of layers, slices, a checkpoint of one's own.
    """
    names = {shape, *(base_id.split("/")[1] for base_id, base in BASES.items() if base.shape == shape)}
    is_its = model["name"].split(" ")[0] in names and model["kind"] != "checkpoint" and model["variant_of"] is None
    removed = model["removed"]
    is_its_set = PUBLISHED_SETS.get((shape, len(removed)), removed) == removed
    return shape_figures(shape, len(removed)) if is_its and is_its_set else {}


def _is_in_the_papers_way(entry: dict[str, Any]) -> bool:
    """Its figures are float32's without fused attention."""
    return entry["shape"] in SHAPES and (entry["dtype"], entry["attention"]) == ("float32", "eager")


def _budget(entry: dict[str, Any]) -> str:
    header = ["model", "images", "x stock", "weights MiB", "KiB an image above the weights"]
    is_paper_s = _is_in_the_papers_way(entry) and entry["budget_bytes"] in (10 * UNITS["GB"], 10 * UNITS["GiB"])
    paper = _paper_cells(entry, "images_in_10gb") if is_paper_s else {}
    header += ["paper: images", "x dense"] if paper else []
    rows = []
    for model in entry["models"]:
        above, ratio = model["bytes_per_image"], model["ratio_to_first"]
        row = [
            model["name"],
            str(model["images"]),
            "" if ratio is None else f"{ratio:.2f}",
            _mebibytes(model["weights_bytes"]),
            "" if above is None else f"{above / 1024:.0f}",
        ]
        rows.append(row + (paper.get(model["name"], ["", ""]) if paper else []))
    budget = _mebibytes(entry["budget_bytes"])
    title = f"**{entry['shape']}, {entry['dtype']}, {entry['attention']}: images in {budget} MiB**"
    return "\n".join([title, "", *markdown_table(header, rows)])


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}" if seconds >= 1 else f"{1e3 * seconds:.3g}"


def rate(images_per_s: float) -> str:
    """Images per second, three or four digits."""
    return f"{images_per_s:.0f}" if images_per_s >= 100 else f"{images_per_s:.3g}"


def _mebibytes(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:.0f}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table whose cells may hold a bar."""
    head, *body = ([cell.replace("|", r"\|") for cell in row] for row in (header, *rows))
    return table(head, body)
