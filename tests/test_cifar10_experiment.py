"""The CIFAR-10 experiment in small: what is run once, what is compared with what."""

import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import cifar10_experiment as experiment  # noqa: E402


ARMS = ["nose-one-shot", "dense-trained-on", "nose-dilution-compensated", "first-one-shot"]
ARMS += [f"random-{draw}-one-shot" for draw in range(experiment.NUM_RANDOM)]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """A command line for a tiny ViT of twelve blocks and a few images laid out as CIFAR-10's."""
    folder = tmp_path_factory.mktemp("cifar")
    config = ViTConfig(
        hidden_size=12, num_hidden_layers=12, num_attention_heads=2, intermediate_size=16, image_size=32,
        patch_size=16, num_labels=3, initializer_range=0.1,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder / "vit")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c", "d"])})
    (folder / "data").mkdir()
    for name, count in (("train", 60), ("test", 37)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        rows = {"img": [Image.fromarray(image) for image in pixels], "label": [index % 4 for index in range(count)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "data" / f"{name}.parquet")
    return [
        f"--model={folder / 'vit'}", f"--dataset={folder / 'data'}", f"--work_dir={folder / 'work'}",
        f"--results={folder / 'results'}", "--num_train=48", "--image_size=32", "--dense_epochs=1", "--epochs=1",
        "--seeds=0,1", f"--arms={','.join(ARMS)}",
    ], folder / "results"  # fmt: skip


@pytest.fixture(scope="module")
def results(options):
    """The records of the whole small experiment."""
    patch = pytest.MonkeyPatch()
    patch.setitem(experiment.TRAINING, "batch_size", 12)
    assert experiment.main(options[0]) == 0
    patch.undo()
    return {path.stem: json.loads(path.read_text()) for path in options[1].glob("*.json")}


pytestmark = pytest.mark.slow


def test_every_arm_of_every_seed_leaves_a_record(results):
    assert set(results) == {"summary", *(f"{arm}-seed{seed}" for arm in ["dense", *ARMS] for seed in (0, 1))}
    for name, record in results.items():
        if name != "summary":
            assert record["num_images"] == 37 and record["training"]["steps"] == 4
            assert experiment.unpacked(record).mean() == pytest.approx(record["top1"])
            assert "hostname" not in json.dumps(record) and "/" not in record["model"].replace("facebook/", "")


def test_arms_differ_in_what_they_say(results):
    assert results["nose-dilution-compensated-seed0"]["training"]["feature_compensation"] is True
    assert results["nose-one-shot-seed0"]["training"]["schedule"] == "one_shot"
    assert results["nose-one-shot-seed0"]["training"]["feature_compensation"] is False
    assert results["first-one-shot-seed1"]["layers"] == [0, 1, 2, 3, 4]
    for seed in (0, 1):
        nose = sorted(results[f"nose-one-shot-seed{seed}"]["layers"])
        assert sorted(results[f"nose-dilution-compensated-seed{seed}"]["layers"]) == nose
        draws = [tuple(results[f"random-{draw}-one-shot-seed{seed}"]["layers"]) for draw in range(3)]
        assert len({*draws, tuple(nose), (0, 1, 2, 3, 4)}) == 5
    assert results["dense-trained-on-seed0"]["parameters"] == results["dense-seed0"]["parameters"]
    assert results["nose-one-shot-seed0"]["parameters"] < results["dense-seed0"]["parameters"]


def test_the_gaps_are_paired_by_image(results):
    hits = {name: experiment.unpacked(record) for name, record in results.items() if name != "summary"}
    ours = np.concatenate([hits[f"nose-one-shot-seed{seed}"] for seed in (0, 1)])
    randoms = np.concatenate(
        [sum(hits[f"random-{draw}-one-shot-seed{seed}"] for draw in range(3)) / 3 for seed in (0, 1)]
    )
    gap = results["summary"]["arms"]["nose-one-shot"]["gap"]["random"]
    differences = 100 * (ours - randoms)
    assert gap["points"] == pytest.approx(differences.mean())
    half = 1.96 * differences.std(ddof=1) / np.sqrt(74)
    assert (gap["low"], gap["high"]) == pytest.approx((differences.mean() - half, differences.mean() + half))
    itself = results["summary"]["arms"]["nose-one-shot"]["gap"]["one_shot"]
    assert itself == {"points": 0.0, "low": 0.0, "high": 0.0}


def test_what_is_there_is_not_run_again(options, results, monkeypatch):
    monkeypatch.setattr(experiment, "run_arm", None)
    monkeypatch.setattr(experiment, "run_dense", None)
    before = (options[1] / "summary.json").read_text()
    assert experiment.main(options[0]) == 0
    assert (options[1] / "summary.json").read_text() == before


def test_a_summary_of_half_an_experiment_leaves_out_what_is_missing(options, results, tmp_path):
    for name in ("dense-seed0", "nose-one-shot-seed0", "nose-one-shot-seed1", "dense-seed1"):
        (tmp_path / f"{name}.json").write_text((options[1] / f"{name}.json").read_text())
    found = experiment.summary(tmp_path)
    assert set(found["arms"]) == {"dense", "nose-one-shot"} and found["random_top1_mean"] is None
    assert found["arms"]["nose-one-shot"]["gap"]["random"] is None
