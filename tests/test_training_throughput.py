"""The throughput of training: what its script measures, on a model of seconds."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_run import finished_run
from tiny_training import model

from hf_nose.modeling_nose_vit import NoseViTForImageClassification
from hf_nose.profiling import count_macs
from hf_nose.weights import load_classifier


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import training_throughput as throughput  # noqa: E402


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    output = tmp_path_factory.mktemp("throughput") / "speed.json"
    words = [f"--model={finished_run(tmp_path_factory) / 'dense'}", "--dataset=digits", "--device=cpu"]
    words += ["--diluted=0,2", "--batch_size=8", "--pairs=3", "--batches=9", "--max_train_samples=48"]
    assert throughput.main([*words, f"--output={output}"]) == 0
    return json.loads(output.read_text())


def test_every_share_follows_from_its_parts(record):
    steps = record["steps"]
    assert set(steps["seconds"]) == {"dense", "diluted", "tail"} and min(steps["seconds"].values()) > 0
    assert 0 < steps["macs_saved"] < 0.5
    assert steps["tail_saving_of_macs_saved"] == pytest.approx(steps["tail_saving"] / steps["macs_saved"])
    assert 0 <= record["data"]["waiting_share"] < 1 and record["data"]["images_per_s"] > 0


def test_each_model_is_what_its_name_says(monkeypatch):
    """Dense, half diluted with compensation, and the same at M = 0; what dilution costs is told with its sign."""
    seen, masks = [], {}

    def timed(steps, rounds, warmup, watch):
        for name, call in steps.items():
            masks[name] = call.args[0].vit.mask_values()
            seen.append(call.args[0].config.compensated_attention_layers)
        return {"dense": [10.0] * rounds, "diluted": [11.0] * rounds, "tail": [8.0] * rounds}

    monkeypatch.setattr(throughput, "interleaved", timed)
    found = throughput.compare_steps(model(), [0, 2], torch.device("cpu"), 2, False, 3)
    assert masks == {"dense": [], "diluted": [0.5, 0.5], "tail": [0.0, 0.0]} and seen == [[], [0, 2], [0, 2]]
    assert found["dilution_cost"] == pytest.approx(0.1) and found["tail_saving"] == pytest.approx(0.2)
    whole, without = (
        count_macs(each, class_token_tail=True)["total"]
        for each in (model(), NoseViTForImageClassification.from_vit(model(), [0, 2]))
    )
    assert found["macs_saved"] == pytest.approx(1 - without / whole)


def test_what_is_not_computed_is_left_alone(record):
    assert record["steps"]["skipped_parameters_are_left_alone"] is True


def test_a_diluted_layer_is_not_left_alone(tmp_path_factory):
    """Otherwise the line above could not fail."""
    model = load_classifier(finished_run(tmp_path_factory) / "dense")
    model.dilute([0, 2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    pixel_values, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    for mask, alone in ((0.0, True), (0.5, False)):
        model.set_mask(mask)
        throughput.step(model, optimizer, pixel_values, labels, bf16=False)
        assert throughput.left_alone(model, [0, 2], optimizer) is alone
