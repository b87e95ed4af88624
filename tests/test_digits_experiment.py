"""The digits experiment in small: every arm from one dense model, and what its summary says."""

import json
import statistics
import sys
from pathlib import Path

import pytest
from tiny_run import CONFIG, flags, tiny_model


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import digits_experiment as experiment  # noqa: E402


pytestmark = pytest.mark.slow
ARMS = ("nose-5-dilution", "nose-5-one-shot")


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """A command line of two seeds and two arms, for a model of seconds."""
    folder = tmp_path_factory.mktemp("digits")
    words = [f"--work_dir={folder / 'work'}", f"--results={folder / 'results'}", "--seeds=0,1"]
    config = tiny_model(folder / "model")
    config.write_text(json.dumps(CONFIG | {"num_hidden_layers": 7}))
    values = flags(folder / "run", output_dir=None, recipe=None, num_removed=None, model=config)
    return [*words, f"--arms={','.join(ARMS)}", *values], folder


@pytest.fixture(scope="module")
def results(options):
    assert experiment.main(options[0]) == 0
    return {path.stem: json.loads(path.read_text()) for path in (options[1] / "results").glob("*.json")}


def test_arms_share_their_dense_model(options, results):
    assert set(results) == {"summary", *(f"{arm}-seed{seed}" for arm in ARMS for seed in (0, 1))}
    work = options[1] / "work"
    for seed in (0, 1):
        weights = [(work / f"seed{seed}" / arm / "dense" / "model.safetensors").read_bytes() for arm in ARMS]
        assert weights[0] == weights[1]
        assert "dense_control" in results[f"{ARMS[0]}-seed{seed}"]["models"]
        assert "dense_control" not in results[f"{ARMS[1]}-seed{seed}"]["models"]
    assert results[f"{ARMS[1]}-seed0"]["training"]["schedule"] == "one_shot"
    assert results[f"{ARMS[0]}-seed0"]["training"]["feature_compensation"] is True


def test_the_summary_is_what_the_arms_say(results):
    found = results["summary"]["arms"]
    for arm in ARMS:
        records = [results[f"{arm}-seed{seed}"] for seed in (0, 1)]
        after = [100 * record["models"]["compressed"]["top1"] for record in records]
        # The arm's own layers, masked and not trained: not the first ones, nor random ones.
        masked = []
        for record in records:
            (own,) = [each for each in record["controls"] if sorted(each["layers"]) == sorted(record["layers"])][:1]
            masked.append(100 * own["top1"])
        assert found[arm]["top1"] == after and found[arm]["top1_median"] == statistics.median(after)
        assert found[arm]["masked_untrained_top1"] == masked
        assert found[arm]["gain"] == [after - before for after, before in zip(after, masked, strict=True)]
    trained_on = [100 * results[f"{ARMS[0]}-seed{seed}"]["models"]["dense_control"]["top1"] for seed in (0, 1)]
    assert found["dense-trained-on"]["top1"] == trained_on


def test_what_is_there_is_not_run_again(options, results, monkeypatch):
    monkeypatch.setattr(experiment, "run_arm", None)
    assert experiment.main(options[0]) == 0
