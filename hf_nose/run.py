"""The main job: dense ViT in, compressed and folded checkpoint out; every stage leaves its file."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from .arguments import training_arguments, training_words
from .card_text import drop_exports
from .configuration_nose_vit import NoseViTConfig
from .context import Job, RunContext
from .distillation import describe
from .files import locked, read_json, write_json, write_text
from .hub import check_token
from .plan import check_teacher, dense_model, distillation_options, planned_layers
from .profiling import count_macs, count_parameters
from .push import push_finished
from .records import RECORDS
from .report import load_lines, summary_table
from .schedules import scheduled_masks
from .settings import STAGES, Settings
from .stages import STAGE_FUNCTIONS


# Everything a run may leave in its folder; nothing else is ever deleted.
FILES = (*RECORDS.values(), "settings.yaml", "report.md")
EXPORTS = "export"
FOLDERS = ("dense", "diluted", "dense_control", "model", "figures", "training", EXPORTS)
# What stages leave beside their records.
MADE_BY = {
    "prepare": ("dense",),
    "dilute": ("diluted", "dense_control"),
    "fold": ("model",),
    # An export holds what all stages made.
    "report": ("report.md", "figures", EXPORTS),
}
# The stages that train, with the folders of their checkpoints.
TRAININGS = {"prepare": ("dense",), "dilute": ("dilution", "dense_control"), "transfer": ("transfer",)}


def run_job(settings: Settings) -> RunContext:
    """Runs the stages of `settings` in the run's folder, or shows what they would do with `dry_run`."""
    run = RunContext(settings)
    if settings.dry_run:
        dry_run(run)
        return run
    if settings.push_to_hub and run.is_main:
        check_token()
    if settings.overwrite:
        # Refused while the old results are still there.
        dense_model(settings, run.data.class_names)
    with locked(run.folder) if run.is_main else nullcontext():
        open_folder(run)
        run.state.wait_for_everyone()
        run_stages(run, [stage for stage in STAGES if stage in settings.stage_list])
        finish(run)
        if settings.push_to_hub and run.is_main:
            run.say("\n" + push_finished(run.folder, settings.repo_id, settings.private))
    return run


def stages_after(stage: str) -> tuple[str, ...]:
    """The stages whose results rest on that of `stage`: all later ones, but of the profile, which is only told of."""
    return ("report",) if stage == "profile" else STAGES[STAGES.index(stage) + 1 :]


def rerun_stage(settings: Settings, stage: str) -> RunContext:
    """Runs one stage of an existing folder again; what later stages made of its old result is dropped."""
    asked = [name for name in ("dry_run", "resume", "overwrite", "push_to_hub") if getattr(settings, name)]
    if asked:
        raise ValueError(f"{' and '.join(asked)} belong to `hf-nose run`: `hf-nose {stage}` runs its stage anew.")
    run = RunContext(settings)
    with locked(run.folder) if run.is_main else nullcontext():
        check_settings(run, STAGES[: STAGES.index(stage)])
        later = stages_after(stage)
        if stage == "dilute" and settings.is_distilled:
            # Refused while the old results are still there.
            check_teacher(settings, run.load("dense").config, run.processor)
        if stage in TRAININGS:
            # From here on its checkpoints are those of the new training, which may be resumed.
            drop_results(run, (stage, *later))
            drop(run, EXPORTS)
        start_stage(run, stage, "[1/1]")
        record = STAGE_FUNCTIONS[stage](run)
        # A stage that does not train and fails has lost nothing.
        drop_results(run, later)
        for name in (name for each in later for name in MADE_BY.get(each, ())):
            drop(run, name)
        run.write(stage, record)
    return run


def run_stages(
    run: Job, stages: Sequence[str], functions: Mapping[str, Callable[[Any], dict[str, Any]]] = STAGE_FUNCTIONS
) -> None:
    """Runs stages in order, skipping those that have left their record; the report is always made anew."""
    for number, stage in enumerate(stages, start=1):
        if run.is_finished(stage) and stage != "report":
            run.say(f"[{number}/{len(stages)}] {stage}: finished before")
            continue
        if stage != "report":
            # An export of before would be pushed as the result of now.
            drop(run, EXPORTS)
        start_stage(run, stage, f"[{number}/{len(stages)}]")
        run.write(stage, functions[stage](run))


def start_stage(run: Job, stage: str, count: str) -> None:
    """Announces a stage and, where it trains, notes the settings under which it does."""
    run.say(f"{count} {stage}")
    if run.is_main and stage in TRAININGS:
        started_record(run, stage).parent.mkdir(exist_ok=True)
        write_json(started_record(run, stage), {"settings": run.settings.of_stage(stage)})


def open_folder(run: Job, stages: Sequence[str] = STAGES) -> None:
    """Makes the job's folder ready: empty, continued or overwritten; refuses anything else."""
    if not run.is_main:
        return
    settings = run.settings
    # Beside a run's own files, what a killed write left of them: .NAME.partial and .NAME.old.
    own = {form.format(name) for name in (*FILES, *FOLDERS) for form in ("{}", ".{}.partial", ".{}.old")}
    found = {path.name for path in run.folder.iterdir()} - {".lock"}
    used, strangers = sorted(found & own), sorted(found - own)
    if settings.overwrite:
        check_inputs(run)
        for name in used:
            drop(run, name)
    elif settings.resume:
        check_settings(run, stages)
    elif used or strangers:
        raise ValueError(
            f"output_dir {run.folder} is not empty ({', '.join((used or strangers)[:4])}): continue it with "
            "--resume, delete what is in it with --overwrite, or name another folder."
        )
    write_text(run.folder / "settings.yaml", settings.to_yaml())


def check_inputs(run: Job) -> None:
    """`ValueError` where what the job starts from lies in the folder that it is to empty."""
    for name in ("model", "teacher", "dataset"):
        value = getattr(run.settings, name, None)
        if value is not None and Path(value).exists() and Path(value).resolve().is_relative_to(run.folder.resolve()):
            raise ValueError(
                f"{name} {value} lies in output_dir {run.folder}, which is overwritten: name another one."
            )


def check_settings(run: Job, stages: Sequence[str]) -> None:
    """Refuses, by key, settings that differ from those a stage was finished with, or has started to train with."""
    changed = []
    for stage in stages:
        path = run.folder / RECORDS[stage] if run.is_finished(stage) else started_record(run, stage)
        before = read_json(path)["settings"] if path.is_file() else {}
        for name, now in run.settings.of_stage(stage).items():
            if name in before and before[name] != now:
                changed.append(f"{name} (stage {stage}: {before[name]!r}, now {now!r})")
    if changed:
        raise ValueError(
            f"Stages were run with other settings: {'; '.join(changed)}. Keep them, run the stage again by "
            f"`hf-nose STAGE {run.folder} ...`, or start anew with --overwrite."
        )


def drop_results(run: RunContext, stages: Sequence[str]) -> None:
    """Drops the records and checkpoints of `stages`, and saves the settings under which they will be run again."""
    for stage in stages:
        run.forget(stage)
        drop_training(run, stage)
    if run.is_main:
        write_text(run.folder / "settings.yaml", run.settings.to_yaml())
    run.state.wait_for_everyone()


def drop(run: Job, name: str) -> None:
    """Deletes a file or folder of the run, where it is there."""
    path = run.folder / name
    if not run.is_main:
        return
    if name == EXPORTS and path.is_dir():
        for card in drop_exports(path):
            run.say(f"{card} was written by hand and is kept; the export around it is gone.")
    else:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def drop_training(run: RunContext, stage: str) -> None:
    """Checkpoints of a stage that is run anew would otherwise be resumed."""
    if not run.is_main:
        return
    started_record(run, stage).unlink(missing_ok=True)
    for arm in TRAININGS.get(stage, ()):
        folder = run.folder / "training" / arm
        if folder.exists():
            shutil.rmtree(folder)


def started_record(run: Job, stage: str) -> Path:
    """Where the settings stand that a stage started to train with: its checkpoints are of no use under others."""
    return run.folder / "training" / f"{stage}.json"


def finish(run: RunContext) -> None:
    """The last words of a run: a short table and the line of code that loads the result."""
    if not run.is_main:
        return
    if run.is_finished("evaluate"):
        run.say("\n" + summary_table(run.folder))
    if (run.folder / "model").is_dir():
        run.say("\nLoad it:\n" + "\n".join(load_lines(run.folder / "model")))
    if run.is_finished("report"):
        run.say(f"\nReport: {run.folder / 'report.md'}")


def dry_run(run: RunContext) -> None:
    """Shows what the run would do, and runs one forward; writes nothing."""
    settings = run.settings
    run.say(settings.to_yaml())
    run.say(f"Stages: {', '.join(stage for stage in STAGES if stage in settings.stage_list)}; folder: {run.folder}")
    model, processor = dense_model(settings, run.data.class_names)
    layers, count = planned_layers(settings, model.config)
    candidates = model.vit.kept_attention_layers
    # Which layers go changes neither parameters nor MACs.
    gone = candidates[:count] if layers is None else layers
    removed = [*model.config.removed_attention_layers, *gone]
    config = NoseViTConfig.from_vit(model.config, removed_attention_layers=removed)
    with torch.device("meta"):
        compressed = type(model)(config)
    run.say(f"Layers: {'to be searched' if layers is None else layers}, {count} of {len(candidates)}")
    for name, function, unit in (("Parameters", count_parameters, 1e6), ("MACs", macs, 1e9)):
        before, after = function(model), function(compressed)
        scale = "M" if unit == 1e6 else "G"
        run.say(f"{name}: {before / unit:.2f} {scale} -> {after / unit:.2f} {scale} ({after / before - 1:+.1%})")
    if settings.is_trained:
        run.say(
            f"Schedule: {schedule_points(run, count)}; compensation {'on' if settings.uses_compensation else 'off'}"
        )
    if settings.is_trained or settings.dense_steps:
        run.augmentation(processor)
        steps, on_cpu = settings.steps or settings.dense_steps, run.device.type == "cpu"
        args = training_arguments(settings, run.folder / "training", steps, settings.epochs, on_cpu)
        run.say(f"Training: {training_words(settings, args)}")
    if settings.is_distilled:
        check_teacher(settings, model.config, processor)
        run.say(f"Distillation: from {settings.teacher or 'dense'}, {describe(distillation_options(settings))}")
    if settings.ema_decay is not None:
        run.say(f"EMA: of the weights, over some {1 / (1 - settings.ema_decay):.0f} steps")
    shape = (1, model.config.num_channels, *model.vit.embeddings.image_size)
    with torch.no_grad():
        logits = model.eval().to(run.device)(torch.zeros(shape, device=run.device)).logits
    finite = bool(logits.isfinite().all())
    run.say(f"One forward on {run.device}: {tuple(shape)} -> {tuple(logits.shape)}, finite: {finite}")
    run.say("Dry run: nothing was written.")


def macs(model: torch.nn.Module) -> int:
    """Multiply-accumulates of one forward of one image."""
    return count_macs(model)["total"]


def schedule_points(run: RunContext, count: int) -> str:
    """M at the quarters of training; of each of `count` layers where they decay in turns."""
    settings = run.settings
    steps = settings.steps or math.ceil((settings.epochs or 0) * steps_per_epoch(run))
    points = [0, steps // 4, steps // 2, 3 * steps // 4, steps - 1]
    told = (settings.schedule, settings.decay, settings.unit)
    how_many = 1 if settings.order == "together" else count
    values = [scheduled_masks(*told, step, steps, settings.epochs, settings.order, how_many) for step in points]
    words = [" ".join(f"{value:.3f}" for value in masks) for masks in values]
    shown = ", ".join(f"{point}: {word}" for point, word in zip(points, words, strict=True))
    return f"{settings.schedule} ({settings.order}), M at step {shown}, of {steps} steps"


def steps_per_epoch(run: RunContext) -> int:
    """Optimizer steps in which every training image is seen once."""
    settings = run.settings
    batches = math.ceil(run.data.num_train / (settings.batch_size * run.state.num_processes))
    return math.ceil(batches / settings.gradient_accumulation_steps)


def folder_settings(folder: Path) -> Path:
    """The settings file of an existing run; `ValueError` where the folder is none."""
    path = folder / "settings.yaml"
    if not path.is_file():
        raise ValueError(f"{folder} is not the folder of a run: it holds no settings.yaml.")
    return path
