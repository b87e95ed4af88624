"""The stages of the main job, each a function from the run to the record it leaves."""

from __future__ import annotations

from typing import Any

import torch
from transformers import set_seed

from .context import Job, RunContext
from .dilution import DilutionCallback
from .distillation import Distiller
from .entropy import layer_profile
from .figures import draw_figures
from .images import ImageBatches
from .lora import NosePeftModel, lora_of, merge_lora
from .metrics import evaluate_model
from .modeling_nose_vit import NoseViTForImageClassification
from .plan import check_plan, check_teacher, dense_model, distillation_options, other_names, planned_layers
from .profiling import count_macs, count_parameters, hardware, trainable_line
from .progress import Progress
from .records import EMBEDDED, public_id
from .report import write_report
from .selection import Selection, num_passes, random_sets, select_attention_layers
from .surgery import fold
from .timing import compare_throughput, verdict
from .weights import load_classifier


def prepare(run: RunContext) -> dict[str, Any]:
    """The dense model as a NoseViT with nothing removed, trained first where the settings say so."""
    settings = run.settings
    class_names = run.data.class_names
    set_seed(settings.seed)
    model, processor = dense_model(settings, class_names)
    if "select" in settings.stage_list:
        # Refused here, not after the dense training.
        check_plan(settings, model.config)
    if (note := other_names(model.config, class_names)) is not None:
        run.say(note)
    if "dilute" in settings.stage_list and settings.is_distilled:
        check_teacher(settings, model.config, processor)
    if settings.dense_steps or (settings.is_trained and "dilute" in settings.stage_list):
        run.check_training(processor)
    training = None
    if settings.dense_steps:
        run.say(f"Training the dense model for {settings.dense_steps} steps")
        training = run.fit(model, "dense", settings.dense_steps, processor=processor)
    run.save("dense", model, processor)
    return {**start_record(run, model), "dense_training": training}


def start_record(run: Job, model: NoseViTForImageClassification) -> dict[str, Any]:
    """Which model and which data a job starts from."""
    settings = run.settings
    model_id = public_id(settings.model, settings.base_model_id)
    dataset_id = public_id(settings.dataset, settings.dataset_id)
    return {
        "model": {
            "source": shown(settings.model, model_id, "a local folder"),
            "base_model_id": model_id,
            "num_hidden_layers": model.config.num_hidden_layers,
            "hidden_size": model.config.hidden_size,
            "num_labels": model.num_labels,
            "parameters": count_parameters(model),
            "macs": count_macs(model)["total"],
        },
        "data": {
            "dataset": shown(settings.dataset, dataset_id, "a local data set"),
            "dataset_id": dataset_id,
            "num_train": run.data.num_train,
            "num_eval": len(run.data.evaluation),
            "notes": run.data.notes,
        },
    }


def profile(run: RunContext) -> dict[str, Any]:
    """Entropy of every attention and MLP layer of the dense model (Fig. 1)."""
    model = run.load("dense")
    calibration = run.calibration(model.num_labels)
    with Progress(calibration, "Layer entropies", disable=not run.is_main) as batches:
        layers = layer_profile(model, batches, run.settings.tokens)
    return {
        "num_images": calibration.num_images,
        "sha256": calibration.sha256,
        "tokens": run.settings.tokens,
        "layers": layers,
    }


def select(run: RunContext) -> dict[str, Any]:
    """The layers to remove: given, or found by the search."""
    settings, model = run.settings, run.load("dense")
    layers, count = planned_layers(settings, model.config)
    if layers is not None:
        run.say(f"Layers as given: {layers}")
        options = {name: getattr(settings, name) for name in ("criterion", "mask", "sign", "target")}
        selection = Selection(layers=layers, search="given", **options)
        return {**vars(selection), "num_layers": len(layers), "calibration": None}
    calibration = run.calibration(model.num_labels)
    kept = model.vit.kept_attention_layers
    rounds = num_passes(settings.search, len(kept), count, settings.beam_width, settings.num_draws)
    with Progress(calibration, f"Selecting {count} layers", rounds, disable=not run.is_main) as batches:
        selection = select_attention_layers(
            model,
            batches,
            count,
            criterion=settings.criterion,
            search=settings.search,
            mask=settings.mask,
            sign=settings.sign,
            target=settings.target,
            beam_width=settings.beam_width,
            num_draws=settings.num_draws,
            seed=settings.seed,
            confidence=settings.confidence,
            stack_candidates=settings.stack_candidates,
            state_cache_gib=settings.state_cache_gib,
            class_token_tail=settings.search_tail,
            bf16=settings.search_bf16,
        )
    run.say(f"Picked, in this order: {selection.layers}")
    return {
        **vars(selection),
        "num_layers": count,
        "calibration": {
            "num_images": calibration.num_images,
            "sha256": calibration.sha256,
            "notes": [*run.data.notes, *calibration.notes],
        },
    }


def dilute(run: RunContext) -> dict[str, Any]:
    """
    Trains while M falls to 0; beside it, where asked for, the dense model for the same steps.

    Only the dilution is distilled, unless `distillation_control` gives the dense model beside it the same loss. Off,
    the control is ordinary training, the alternative that people have; on, only the removal tells the two apart.
    """
    settings, layers = run.settings, run.read("select")["layers"]
    model = run.load("dense")
    model.dilute(layers, feature_compensation=settings.uses_compensation)
    record: dict[str, Any] = {
        "layers": layers,
        "feature_compensation": settings.uses_compensation,
        "schedule": settings.schedule if settings.is_trained else "none",
        "decay": settings.decay,
        "unit": settings.unit,
        "order": settings.order,
        "steps": 0,
        "seconds": 0.0,
        "log": [],
        "control": None,
        "distillation": None,
        "ema_decay": settings.ema_decay if settings.is_trained else None,
    }
    if settings.is_trained:
        callback = DilutionCallback(settings.schedule, settings.decay, settings.unit, settings.order)
        distiller, record["distillation"] = teach(run, model) if settings.is_distilled else (None, None)
        arms: list[tuple] = [("dilution", model, [callback], distiller)]
        if settings.control:
            arms.append(("dense_control", run.load("dense"), [], distiller if settings.distillation_control else None))
        for name, arm, callbacks, teacher in arms:
            run.say(f"Training: {name.replace('_', ' ')}")
            set_seed(settings.seed)
            trained = lora_of(arm, settings) if settings.lora_rank else arm
            run.say(trainable_line(trained))
            training = run.fit(trained, name, settings.steps, settings.epochs, callbacks=callbacks, distiller=teacher)
            training["trainable_parameters"] = count_parameters(trained, only_trainable=True)
            if isinstance(trained, NosePeftModel):
                merge_lora(trained)
            if name == "dilution":
                record.update(training)
            else:
                record["control"] = training
                run.save(name, arm)
    model.set_mask(0.0)
    run.save("diluted", model)
    return record


def teach(run: RunContext, student: NoseViTForImageClassification) -> tuple[Distiller, dict[str, Any]]:
    """The distiller of the settings, and its record."""
    settings = run.settings
    check_teacher(settings, student.config, run.processor)
    if settings.has_own_teacher:
        name, teacher = "dense", run.load("dense")
    else:
        source = str(settings.teacher)
        name, teacher = shown(source, public_id(source), "a local folder"), load_classifier(source)
    distiller = Distiller(teacher, **distillation_options(settings))
    return distiller, {"teacher": name, **distiller.to_record(), "control": settings.distillation_control}


def fold_stage(run: RunContext) -> dict[str, Any]:
    """Removes the diluted attention and divides the doubling out, checked on evaluation images."""
    model = run.load("diluted")
    folded = fold(model)
    images = run.images("evaluation", model.num_labels)
    count = min(len(images), run.settings.eval_batch_size)
    pixel_values = torch.stack([images[index]["pixel_values"] for index in range(count)]).to(run.device)
    with torch.no_grad():
        before, after = model(pixel_values).logits, folded(pixel_values).logits
    if folded.dtype == torch.float32 and not torch.equal(before, after):
        difference = float((before - after).abs().max())
        raise ArithmeticError(f"Folding changed the logits of evaluation images by up to {difference:.3g}.")
    run.save("model", folded)
    return {
        "removed_attention_layers": folded.config.removed_attention_layers,
        "folded_attention_layers": folded.config.folded_attention_layers,
        "max_abs_logit_difference": float((before - after).abs().max()),
        "bitwise_equal": torch.equal(before, after),
        "num_images": count,
    }


def evaluate(run: RunContext) -> dict[str, Any]:
    """Accuracy, cost and speed of dense and compressed, on the same images, side by side in this process."""
    settings = run.settings
    names = {"dense": "dense", "dense_control": "dense_control", "compressed": "model"}
    if run.read("dilute")["control"] is None:
        del names["dense_control"]
    models = {name: run.load(folder) for name, folder in names.items()}
    images = run.images("evaluation", models["dense"].num_labels)

    def measure(model: NoseViTForImageClassification, what: str) -> dict[str, Any]:
        with Progress(ImageBatches(images, settings.eval_batch_size), what, disable=not run.is_main) as batches:
            return evaluate_model(model, batches, run.device)

    results = {name: measure(model, f"Evaluating {name.replace('_', ' ')}") for name, model in models.items()}
    controls = []
    for control in control_sets(run, models["dense"].vit.kept_attention_layers):
        with models["dense"].masked_attention(control["layers"], settings.mask):
            controls.append({**control, **measure(models["dense"], control["name"])})
    if not run.is_main:
        # One process measures speed, while the others wait.
        return {}
    run.say("Measuring speed, models in turn")
    size = min(settings.throughput_batch_size, len(images))
    batch = torch.stack([images[index]["pixel_values"] for index in range(size)]).to(run.device)
    speeds = compare_throughput(models, batch, rounds=settings.throughput_rounds)
    for name, model in models.items():
        speed = speeds[name]
        results[name] |= {
            "parameters": count_parameters(model),
            "macs": count_macs(model)["total"],
            "images_per_s": speed["images_per_s"],
            "images_per_s_quartiles": speed["quartiles"],
            "ratio_to_dense": speed["ratio_to_first"],
            "ratio_interval": speed["ratio_interval"],
            "verdict": verdict(speed["ratio_interval"]),
        }
    return {
        "models": results,
        "controls": controls,
        "hardware": hardware(run.device, models["dense"].dtype),
        "throughput": {"batch_size": size, "rounds": settings.throughput_rounds},
    }


def report(run: RunContext) -> dict[str, Any]:
    """Figures and report from the records alone."""
    if not run.is_main:
        return {}
    figures = draw_figures(run.folder)
    return {
        "report": write_report(run.folder).relative_to(run.folder).as_posix(),
        "figures": [path.relative_to(run.folder).as_posix() for path in figures],
    }


def shown(source: str, public: str | None, local: str) -> str:
    """What people read where a model or data set is named: its public id, the embedded one's name, never a path."""
    return public or (source if source in EMBEDDED else local)


STAGE_FUNCTIONS = {
    "prepare": prepare,
    "profile": profile,
    "select": select,
    "dilute": dilute,
    "fold": fold_stage,
    "evaluate": evaluate,
    "report": report,
}


def control_sets(run: RunContext, candidates: list[int]) -> list[dict[str, Any]]:
    """Sets to evaluate masked and untrained in the dense model: the chosen one, the first N, random ones."""
    selection = run.read("select")
    count = len(selection["layers"])
    is_nose = selection["search"] in ("greedy", "racing") and selection["criterion"] == "transfer_entropy"
    chosen = "NOSE" if is_nose else f"{selection['search']} by {selection['criterion']}".replace("_", " ")
    chosen = "as given" if selection["search"] == "given" else chosen
    number = run.settings.random_controls
    draws = random_sets(candidates, count, number, run.settings.seed) if number else []
    return [
        {"name": f"{chosen}, masked, untrained", "layers": sorted(selection["layers"])},
        {"name": f"First-{count}, masked, untrained", "layers": candidates[:count]},
        *(
            {"name": "random, masked, untrained", "layers": list(layers), "seed": run.settings.seed, "draw": draw}
            for draw, layers in enumerate(draws)
        ),
    ]
