"""Records of a made-up run, in the shape that the stages leave, for the tests of what reads them."""

import copy
import json
import math

from hf_nose.files import SCHEMA


LAYERS = [3, 5, 1, 8, 7]
VERSIONS = {"hf_nose": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0"}


def _trace():
    base = [-58.4, -12.1, -33.0, -2.2, -21.7, -9.6, -17.3, -11.4, -8.9, -26.5, -40.2, -70.3]
    trace = []
    for number, picked in enumerate(LAYERS):
        before = LAYERS[:number]
        scores = {
            str(layer): value * (1 + 0.4 * number) - 9.0 * number + 2.5 * math.sin(layer + number)
            for layer, value in enumerate(base)
            if layer not in before
        }
        scores[str(picked)] = -1.9 - 4.0 * number
        trace.append({"picked": picked, "scores": scores})
    return trace


def _log(steps, start_loss, end_loss, start_top1, end_top1, decay=None):
    lines = []
    for step in range(10, steps + 1, 10):
        part = 1 - math.exp(-4 * step / steps)
        wiggle = 0.03 * math.sin(step * 1.7)
        line = {
            "step": step,
            "epoch": step / 21,
            "loss": start_loss + (end_loss - start_loss) * part + wiggle,
            "learning_rate": 1e-3 * (1 - step / steps),
        }
        if decay is not None:
            line["mask"] = max(0.0, 1 - step / decay)
        lines.append(line)
        if step % 100 == 0:
            top1 = start_top1 + (end_top1 - start_top1) * part
            lines.append({"step": step, "epoch": step / 21, "eval_top1": top1, "eval_loss": end_loss})
            if decay is not None:
                lines[-1]["mask"] = line["mask"]
    return lines


def _entry(stream, branch):
    return {
        "stream": stream,
        "branch": branch,
        "stream_scale_free": stream,
        "branch_scale_free": branch,
        "stream_constant_channels": 0,
        "branch_constant_channels": 0,
    }


def _profile_layers():
    return [
        {
            "layer": index,
            "attention": _entry(-20.0 + 6.1 * index + 3 * math.sin(index), -55 + 5.2 * index),
            "mlp": _entry(-16.5 + 6.4 * index + 2 * math.cos(index), -40 + 5.9 * index + 3 * math.sin(2 * index)),
        }
        for index in range(12)
    ]


def _model(top1, top5, loss, parameters, macs, images_per_s, ratio):
    return {
        "top1": top1,
        "top5": top5,
        "loss": loss,
        "num_images": 451,
        "parameters": parameters,
        "macs": macs,
        "images_per_s": images_per_s,
        "images_per_s_quartiles": [images_per_s * 0.97, images_per_s * 1.02],
        "ratio_to_dense": ratio,
        "ratio_interval": [ratio * 0.95, ratio * 1.04],
        "verdict": "faster" if ratio * 0.95 > 1 else "not faster: no difference shown",
    }


RECORDS = {
    "prepare": {
        "settings": {},
        "model": {
            "source": "digits",
            "base_model_id": None,
            "num_hidden_layers": 12,
            "hidden_size": 48,
            "num_labels": 10,
            "parameters": 341_338,
            "macs": 6_124_800,
        },
        "data": {
            "dataset": "digits",
            "dataset_id": None,
            "num_train": 1346,
            "num_eval": 451,
            "notes": ["The digits have no splits: a quarter of each class was set apart by seed 0."],
        },
        "dense_training": {"steps": 1000, "seconds": 61.2, "log": _log(1000, 2.4, 0.55, 0.4, 0.96)},
    },
    "profile": {"settings": {}, "num_images": 512, "sha256": "ab" * 32, "layers": _profile_layers(), "tokens": "all"},
    "selection": {
        "settings": {},
        "layers": LAYERS,
        "num_layers": 5,
        "criterion": "transfer_entropy",
        "search": "greedy",
        "mask": "skip",
        "sign": "absolute",
        "target": "logits",
        "reference": {"entropy": 12.7},
        "trace": _trace(),
        "calibration": {"num_images": 512, "sha256": "ab" * 32, "notes": []},
        "block_forwards": 2936,
        "seconds": 7.4,
        "num_processes": 1,
    },
    "dilution": {
        "settings": {},
        "layers": LAYERS,
        "feature_compensation": True,
        "schedule": "linear",
        "decay": 0.75,
        "unit": "step",
        "steps": 1200,
        "seconds": 71.9,
        "log": _log(1200, 0.62, 0.56, 0.94, 0.957, decay=900),
        "control": {"steps": 1200, "seconds": 80.3, "log": _log(1200, 0.56, 0.53, 0.96, 0.967)},
    },
    "fold": {
        "settings": {},
        "removed_attention_layers": sorted(LAYERS),
        "folded_attention_layers": sorted(LAYERS),
        "max_abs_logit_difference": 0.0,
        "bitwise_equal": True,
        "num_images": 64,
    },
    "metrics": {
        "settings": {},
        "models": {
            "dense": _model(0.9623, 0.9978, 0.2511, 341_338, 6_124_800, 4021.7, 1.0),
            "dense_control": _model(0.9667, 0.9978, 0.2317, 341_338, 6_124_800, 4013.2, 0.998),
            "compressed": _model(0.9579, 0.9956, 0.2754, 293_818, 5_203_712, 5312.4, 1.321),
        },
        "controls": [
            {"name": "NOSE, masked, untrained", "layers": LAYERS, "top1": 0.9512, "top5": 0.9934, "loss": 0.31},
            {
                "name": "First-5, masked, untrained",
                "layers": [0, 1, 2, 3, 4],
                "top1": 0.1619,
                "top5": 0.6,
                "loss": 3.4,
            },
            {
                "name": "random, masked, untrained",
                "layers": [0, 4, 6, 7, 11],
                "seed": 0,
                "top1": 0.7317,
                "top5": 0.96,
                "loss": 1.1,
            },
        ],
        "hardware": {
            "device": "cpu",
            "accelerator": None,
            "processor": "AMD EPYC",
            "system": "Linux x86_64",
            "cores": 2,
            "threads": 2,
            "dtype": "float32",
            "float32_precision": "highest",
        },
        "throughput": {"batch_size": 64, "rounds": 20},
    },
}


def records(*names):
    """A copy of the named records (all of them by default), free to change."""
    return copy.deepcopy({name: RECORDS[name] for name in names or RECORDS})


def write_run(folder, content):
    """Write records into a run's folder; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, record in content.items():
        (folder / f"{name}.json").write_text(json.dumps({"schema": SCHEMA, "versions": VERSIONS, **record}))
    return folder
