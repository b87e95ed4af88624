"""Speed and memory of models side by side: every combination that was asked for, each written when it is done."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from .contenders import ATTENTIONS, DTYPES, Contender, contenders, release
from .devices import choose_device
from .files import read_json, stamped, write_json
from .memory import check_budget, images_in_budget, parse_bytes, probe
from .profiling import hardware, hardware_slug
from .roofline import best, gemm_rate, update_shares
from .shapes import sides
from .timing import LEAST_ROUNDS, compare_throughput, median_interval, paired_ratios, verdict


MAX = "max"
# What torch.compile makes kernels with.
COMPILER = "inductor"
Say = Callable[[str], object]


@dataclass(frozen=True)
class BenchmarkOptions:
    """
    What a benchmark measures; every combination of data types, attentions and batch sizes.

    Args:
        models (`list[str]`): shapes such as `deit-base` with random weights, folders, Hub ids; dense or compressed.
        removed (`list[str]`, *optional*): layers such as `0,1,3,4,6`, or shares such as `40%`, to fold away.
        batch_sizes (`list[str]`, *optional*): numbers, or `max`: what the budget holds of the stock model.
        dtypes (`list[str]`, *optional*): among float32, bfloat16, float16.
        attentions (`list[str]`, *optional*): among eager, sdpa, flash.
        torch_compile (`bool`, *optional*): compile every model, `fullgraph`.
        device (`str`, *optional*): auto, cpu, cuda, mps.
        memory (`bool`, *optional*): also the peak of every model at every batch size, each in a fresh process.
        memory_budget (`str`, *optional*): a size such as `10GB`; the images that every model fits into it.
        chunk_size_feed_forward (`int`, *optional*): tokens a slice; NoseViTs run whole and in slices.
        chunk_size_attention (`int`, *optional*): images a slice; likewise.
        fuse_qkv (`bool`, *optional*): q, k and v as one matrix product; likewise.
        threads (`int`, *optional*): of torch on the CPU; as many as it takes by default.
        rounds (`int`, *optional*): timed forwards of each model, at least 6; 0 measures no time.
        warmup (`int`, *optional*): rounds before.

    Raises:
        ValueError: naming what is out of range.
    """

    models: list[str]
    removed: list[str] = field(default_factory=list)
    batch_sizes: list[str] = field(default_factory=lambda: ["1", "8", "32"])
    dtypes: list[str] = field(default_factory=lambda: ["float32"])
    attentions: list[str] = field(default_factory=lambda: ["sdpa"])
    torch_compile: bool = False
    device: str = "auto"
    memory: bool = False
    memory_budget: str | None = None
    chunk_size_feed_forward: int = 0
    chunk_size_attention: int = 0
    fuse_qkv: bool = False
    threads: int | None = None
    rounds: int = 20
    warmup: int = 3

    def __post_init__(self) -> None:
        for name, given, known in (("dtypes", self.dtypes, DTYPES), ("attention", self.attentions, ATTENTIONS)):
            if not given or not set(given) <= set(known):
                raise ValueError(f"{name} must be among {', '.join(known)}, got {','.join(given)!r}.")
        for size in self.batch_sizes:
            if size != MAX and not (size.isdecimal() and int(size) > 0):
                raise ValueError(f"batch_sizes must be at least 1, or 'max', got {size!r}.")
        if MAX in self.batch_sizes and self.memory_budget is None:
            raise ValueError("batch_sizes 'max' is what memory_budget holds: give one, such as --memory_budget 10GB.")
        self.check_numbers()
        if self.memory_budget is not None:
            parse_bytes(self.memory_budget)
        if "flash" in self.attentions and "float32" in self.dtypes:
            raise ValueError("attention 'flash' computes in bfloat16 and float16 only: leave float32 out of dtypes.")

    def check_numbers(self) -> None:
        """Refuses, by name, numbers out of range."""
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}.")
        if self.rounds and self.rounds < LEAST_ROUNDS:
            raise ValueError(
                f"rounds must be at least {LEAST_ROUNDS}, or 95 % confidence cannot be had, or 0 to measure no time; "
                f"got {self.rounds}."
            )
        if self.warmup < 0:
            raise ValueError(f"warmup must be 0 or more, got {self.warmup}.")


def run_benchmark(
    options: BenchmarkOptions, folder: Path | None = None, overwrite: bool = False, say: Say = lambda text: None
) -> tuple[Path | None, dict[str, Any]]:
    """
    Measures what the options ask for; with a folder, a JSON file there that is called after the machine is written
    after every group, and what it already holds (of these versions, models, slices, rounds) is not measured again. A
    group is measured as a whole, because only runs in turn compare: with one more model in it, it is another group;
    with other rounds its times are replaced.

    Args:
        options ([`BenchmarkOptions`]): what to measure.
        folder (`Path`, *optional*): where the file stands; made where there is none.
        overwrite (`bool`, *optional*, defaults to `False`): begin a new record.
        say (`Callable[[str], None]`, *optional*): is told what is going on.

    Returns:
        `tuple`: the file, and the record: `hardware`; `groups`, one for every shape, data type, attention and batch
        size, with the models in it; `memory`, one for every shape, data type and attention under the budget.

    Raises:
        ValueError: for a device that is not there, a budget smaller than the weights, a record of other versions.
    """
    device = choose_device(options.device)
    if "flash" in options.attentions and device.type != "cuda":
        raise ValueError(f"attention 'flash' needs a CUDA device, this one is {device.type}.")
    variants = options.chunk_size_feed_forward, options.chunk_size_attention, options.fuse_qkv
    shapes = contenders(options.models, options.removed, *variants)
    budget = None if options.memory_budget is None else parse_bytes(options.memory_budget)
    if budget is not None:
        for shape, dtype in product(shapes, options.dtypes):
            for contender in shapes[shape]:
                check_budget(budget, contender, dtype, device)
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads or before)
    try:
        path, record = start_record(device, folder, overwrite)
        for setting in settings_of(options, shapes):
            for _ in measure(setting, shapes[setting["shape"]], options, device, budget, record, say):
                update_shares(record["groups"])
                if path is not None:
                    write_json(path, record)
    finally:
        torch.set_num_threads(before)
    return path, record


def settings_of(options: BenchmarkOptions, shapes: dict[str, list[Contender]]) -> Iterator[dict[str, Any]]:
    """What is measured together: one shape, data type and attention."""
    for shape, dtype, attention in product(shapes, options.dtypes, options.attentions):
        yield {"shape": shape, "dtype": dtype, "attention": attention}


def start_record(device: torch.device, folder: Path | None, overwrite: bool) -> tuple[Path | None, dict[str, Any]]:
    """The file of this machine in the folder, and what stands in it, or an empty record."""
    machine = hardware(device)
    # One record holds several.
    machine.pop("dtype")
    record: dict[str, Any] = stamped({"hardware": machine, "groups": [], "memory": []})
    if folder is None:
        return None, record
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hardware_slug(machine)}.json"
    if overwrite or not path.exists():
        return path, record
    found = read_json(path)
    if any(found[name] != record[name] for name in ("hardware", "versions")):
        raise ValueError(
            f"{path.name} in output_dir was measured on other hardware or with other versions: give another "
            "output_dir, or --overwrite."
        )
    return path, found


def measure(
    setting: dict[str, Any],
    group: list[Contender],
    options: BenchmarkOptions,
    device: torch.device,
    budget: int | None,
    record: dict[str, Any],
    say: Say,
) -> Iterator[None]:
    """Adds to the record what it does not hold yet of one setting; yields after every entry."""
    where = " ".join(setting.values())
    images = {}
    if budget is not None:
        key = setting | {"budget_bytes": budget}
        held = held_entry(record["memory"], key, group)
        if held is None:
            say(f"{where}: images in {options.memory_budget}")
            held = key | {"models": [in_budget(contender, key, device, say) for contender in group]}
            first = held["models"][0]["images"]
            for model in held["models"]:
                model["ratio_to_first"] = model["images"] / first if first else None
            record["memory"].append(held)
            yield
        images = {model["name"]: model["images"] for model in held["models"]}
    if not options.rounds and not options.memory:
        return
    sizes = [images[group[0].name] if size == MAX else int(size) for size in options.batch_sizes]
    keys = [setting | {"torch_compile": options.torch_compile, "batch_size": size} for size in dict.fromkeys(sizes)]
    missing = [
        key for key in keys if key["batch_size"] and not is_complete(held_entry(record["groups"], key, group), options)
    ]
    if not missing:
        return
    models: dict[str, nn.Module] = {}
    if options.rounds:
        models = {contender.name: built(contender, setting, device, options.torch_compile) for contender in group}
    costs = {contender.name: contender.costs() for contender in group}
    for key in missing:
        say(f"{where}: batch {key['batch_size']}")
        # Otherwise a second batch size would run on a graph for any size.
        torch.compiler.reset()
        entry, held = one_group(key, group, models, costs, options, device), held_entry(record["groups"], key, group)
        if held is None:
            record["groups"].append(entry)
        else:
            replace_figures(held, entry)
        yield
    del models
    release()


def held_entry(entries: list[dict[str, Any]], key: dict[str, Any], group: list[Contender]) -> dict[str, Any] | None:
    """What a record already says of the same models, slices included, in the same setting."""
    models = [described(contender) for contender in group]
    for entry in entries:
        if entry | key == entry and len(entry["models"]) == len(models):
            if all(held | model == held for held, model in zip(entry["models"], models, strict=True)):
                return entry
    return None


def is_complete(entry: dict[str, Any] | None, options: BenchmarkOptions) -> bool:
    """Whether an entry holds all that the options ask for: times of as many rounds, peaks of memory."""
    if entry is None:
        return False
    is_timed = not options.rounds or (entry["rounds"], entry["warmup"]) == (options.rounds, options.warmup)
    return is_timed and (not options.memory or "peak_bytes" in entry["models"][0])


def replace_figures(held: dict[str, Any], entry: dict[str, Any]) -> None:
    """Puts a newer entry in the place of `held`; of that stays what was not measured again."""
    models = [old | new for old, new in zip(held["models"], entry["models"], strict=True)]
    rounds = {} if entry["rounds"] else {name: held[name] for name in ("rounds", "warmup")}
    held |= entry | rounds | {"models": models}


def built(contender: Contender, setting: dict[str, Any], device: torch.device, is_compiled: bool) -> nn.Module:
    """The model on its device, compiled where that was asked for (when it first runs)."""
    model: Any = contender.build(device, DTYPES[setting["dtype"]], setting["attention"])
    return cast(nn.Module, torch.compile(model, fullgraph=True, backend=COMPILER)) if is_compiled else model


def in_budget(contender: Contender, key: dict[str, Any], device: torch.device, say: Say) -> dict[str, Any]:
    """The images of one model under the budget."""
    found = images_in_budget(
        contender, key["budget_bytes"], device, key["dtype"], key["attention"], torch.get_num_threads()
    )
    say(f"  {contender.name}: {found['images']} images")
    return described(contender) | found


def one_group(
    key: dict[str, Any],
    group: list[Contender],
    models: dict[str, nn.Module],
    costs: dict[str, dict[str, Any]],
    options: BenchmarkOptions,
    device: torch.device,
) -> dict[str, Any]:
    """All models of a setting at one batch size: time in turn, memory each in a process of its own."""
    dtype, batch_size = DTYPES[key["dtype"]], key["batch_size"]
    entry: dict[str, Any] = {**key, "rounds": options.rounds, "warmup": options.warmup}
    rows = [described(contender) | costs[contender.name] for contender in group]
    if models:
        config = group[0].config()
        generator = torch.Generator().manual_seed(0)
        shape = (batch_size, config.num_channels, *sides(config.image_size))
        images = torch.randn(shape, generator=generator).to(device, dtype)
        rates = [gemm_rate(device, dtype)]
        speeds = compare_throughput(models, images, options.rounds, options.warmup)
        rates.append(gemm_rate(device, dtype))
        entry["gemm"] = best(rates)
        for row in rows:
            speed = speeds[row["name"]]
            row |= speed | {"verdict": verdict(speed["ratio_interval"])}
            if row["variant_of"] is not None:
                pairs = paired_ratios(speed["seconds"], speeds[row["variant_of"]]["seconds"])
                row |= {"ratio_to_plain": statistics.median(pairs), "plain_interval": list(median_interval(pairs))}
    if options.memory:
        for contender, row in zip(group, rows, strict=True):
            where = (device, key["dtype"], key["attention"], torch.get_num_threads())
            row |= probe(contender, batch_size, *where)
    return entry | {"models": rows}


def described(contender: Contender) -> dict[str, Any]:
    """What a record says of a model: no path, only what it is."""
    values = contender.to_dict()
    del values["source"]
    return values | {"removed": list(contender.removed)}
