"""The CIFAR-10 experiment in small: what is run once, what is compared with what."""

import copy
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
from cifar10_plans import NUM_RANDOM, PAPER, PLANS, SHORT  # noqa: E402
from cifar10_summary import best_arm, page, summary, unpacked, verdicts  # noqa: E402

from hf_nose.command_line import parse_settings  # noqa: E402
from hf_nose.evaluation import evaluation_images  # noqa: E402
from hf_nose.images import ImageBatches, load_processor  # noqa: E402
from hf_nose.metrics import evaluate_model  # noqa: E402
from hf_nose.weights import load_classifier  # noqa: E402


ARMS = ["nose-one-shot", "dense-trained-on", "nose-dilution-compensated", "first-one-shot"]
ARMS += [f"random-{draw}-one-shot" for draw in range(NUM_RANDOM)]


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
        f"--results={folder / 'results'}", "--num_train=48", "--image_size=32", "--dense_epochs=2", "--epochs=1",
        "--seeds=0,1", f"--arms={','.join(ARMS)}",
    ], folder / "results"  # fmt: skip


@pytest.fixture(scope="module")
def results(options):
    """The records of the whole small experiment."""
    patch = pytest.MonkeyPatch()
    patch.setitem(SHORT.training, "batch_size", 12)
    assert experiment.main(options[0]) == 0
    patch.undo()
    return {path.stem: json.loads(path.read_text()) for path in options[1].glob("*.json")}


pytestmark = pytest.mark.slow


def test_every_arm_of_every_seed_leaves_a_record(results):
    assert set(results) == {"summary", *(f"{arm}-seed{seed}" for arm in ["dense", *ARMS] for seed in (0, 1))}
    for name, record in results.items():
        if name != "summary":
            assert record["num_images"] == 37 and record["training"]["steps"] == (8 if record["arm"] == "dense" else 4)
            assert unpacked(record).mean() == pytest.approx(record["top1"])
            assert "hostname" not in json.dumps(record) and "/" not in record["model"].replace("facebook/", "")


def test_what_masking_alone_leaves_is_measured(options, results):
    """In the dense model of the seed, on the test images, with the layers of the arm masked."""
    found = results["first-one-shot-seed1"]
    folder = options[1].parent
    masked = load_classifier(folder / "work" / "seed1" / "dense" / "model")
    with masked.masked_attention(found["layers"]):
        top1 = evaluate_checkpoint_of(masked, folder)
    assert found["masked_untrained_top1"] == top1


def evaluate_checkpoint_of(model, folder):
    """Top-1 of a model on the test images."""
    images, _ = evaluation_images(str(folder / "data"), load_processor(folder / "vit"))
    return evaluate_model(model, ImageBatches(images, 8), "cpu")["top1"]


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
    hits = {name: unpacked(record) for name, record in results.items() if name != "summary"}
    ours = sum(hits[f"nose-one-shot-seed{seed}"] for seed in (0, 1)) / 2
    randoms = sum(hits[f"random-{draw}-one-shot-seed{seed}"] for draw in range(3) for seed in (0, 1)) / 6
    gap = results["summary"]["arms"]["nose-one-shot"]["gap"]["random"]
    differences = 100 * (ours - randoms)
    assert gap["points"] == pytest.approx(differences.mean())
    half = 1.96 * differences.std(ddof=1) / np.sqrt(37)
    assert (gap["low"], gap["high"]) == pytest.approx((differences.mean() - half, differences.mean() + half))
    arms = results["summary"]["arms"]
    # Nothing is compared with itself, and what removes nothing with no removal.
    assert set(arms["nose-one-shot"]["gap"]) == {"dense_trained_on", "random"}
    assert set(arms["first-one-shot"]["gap"]) == {"dense_trained_on", "one_shot", "random"}
    assert set(arms["dense"]["gap"]) == {"dense_trained_on"} and arms["dense-trained-on"]["gap"] == {}


def test_what_is_there_is_not_run_again(options, results, monkeypatch):
    monkeypatch.setattr(experiment, "run_arm", None)
    before = (options[1] / "summary.json").read_text()
    assert experiment.main(options[0]) == 0
    assert (options[1] / "summary.json").read_text() == before


def test_a_summary_of_half_an_experiment_compares_what_is_there(options, results, tmp_path):
    for name in ("dense-seed0", "dense-trained-on-seed0", "nose-one-shot-seed0", "nose-one-shot-seed1", "dense-seed1"):
        (tmp_path / f"{name}.json").write_text((options[1] / f"{name}.json").read_text())
    found = summary(tmp_path, SHORT)
    assert list(found["arms"]) == ["dense", "nose-one-shot", "dense-trained-on"]
    # Two seeds have no rival of both; one seed has one of the same.
    assert found["arms"]["nose-one-shot"]["gap"]["random"] is None
    assert found["arms"]["nose-one-shot"]["gap"]["dense_trained_on"] is None
    assert found["arms"]["dense-trained-on"]["seeds"] == [0]


def test_the_page_shows_every_arm_and_no_other_number(options, results):
    text = (options[1] / "README.md").read_text()
    assert text == page(results["summary"])
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    assert {row[0].strip("| ") for row in rows} == {"dense", *ARMS}
    means = [float(row[1]) for row in rows]
    assert means == sorted(means, reverse=True)
    for row in rows:
        arm = results["summary"]["arms"][row[0].strip("| ")]
        assert row[1] == f"{arm['top1_mean']:.2f}" and row[2] == ", ".join(f"{value:.1f}" for value in arm["top1"])
        assert row[-1].rstrip(" |") == shown_gap(arm["gap"].get("random"))


def test_the_page_says_what_was_kept_and_what_was_missed(results):
    found = copy.deepcopy(results["summary"])
    arms = found["arms"]
    for name, arm in arms.items():
        arm["top1_mean"] = {"dense": 86.2, "nose-one-shot": 85.1}.get(name, 80.0)
    arms["nose-one-shot"]["gap"] |= {
        "dense_trained_on": {"points": -1.25, "low": -1.5, "high": -1.0},
        "random": {"points": 0.2, "low": -0.1, "high": 0.5},
    }
    found["not_run"] = ["kl-one-shot"]
    arms["first-one-shot"]["seeds"] = [1]
    dense, lost, nose, single, missing = verdicts(found)
    assert dense == "- Dense, mean of the seeds: 86.20 %, at least +86 asked: kept."
    assert lost.startswith("- nose-one-shot against") and lost.endswith("at least -1 asked: missed by 0.25.")
    assert nose.endswith("the interval holds 0: not told apart, at least +0 asked: kept.")
    assert "first-one-shot" in single and missing.endswith("not run: kl-one-shot.")
    # What was run with one seed is never the best.
    arms["first-one-shot"]["top1_mean"] = 99.0
    assert best_arm(found) == "nose-one-shot"


def shown_gap(gap):
    return "" if gap is None else f"{gap['points']:+.2f} [{gap['low']:+.2f}, {gap['high']:+.2f}]"


# The paper's tables in small


def test_the_plan_holds_every_cell_of_the_papers_tables():
    arms, removed = PAPER.arms, PAPER.removed
    assert {(kind, removed(f"{kind}-{count}")) for kind in ("nose", "first") for count in (3, 5, 6)} == {
        (kind, count) for kind in ("nose", "first") for count in (3, 5, 6)
    }
    for count in (3, 5, 6):
        assert len(PAPER.random_arms(f"nose-{count}")) == NUM_RANDOM
        assert PAPER.search_arm(f"first-{count}") == f"nose-{count}-one-shot"
    decays = {
        (values["schedule"], values["decay"])
        for name, values in arms.items()
        if name.startswith("nose-5") and "decay" in values
    }
    assert decays == {(schedule, decay) for schedule in ("linear", "cosine") for decay in (0.5, 0.75, 1.0)}
    off = {removed(name) for name, values in arms.items() if values.get("feature_compensation") is False}
    assert off == {5, 6}
    assert PAPER.epochs >= 100 and PAPER.num_train == 50_000


@pytest.mark.parametrize("plan", PLANS)
def test_every_arm_is_a_job_that_its_settings_allow(options, plan):
    words = experiment_options(options[0], plan)
    for arm, values in words.plan.arms.items():
        if not {"dense", "transfer_from"} & set(values):
            kept = {key: value for key, value in values.items() if key not in ("layers", "num_removed")}
            told = experiment.flags(Path("run"), 0, words, {"model": "vit", "epochs": 1, "num_removed": 5, **kept})
            settings = parse_settings(told)
            assert settings.is_distilled is ("distillation_weight" in values), arm
            assert settings.uses_compensation is values.get("feature_compensation", False), arm


def experiment_options(words, plan):
    patch, seen = pytest.MonkeyPatch(), []
    patch.setattr(experiment, "run_arm", lambda arm, seed, found: seen.append(found) or {})
    patch.setattr(experiment, "write_json", lambda *args: None)
    patch.setattr(experiment, "summary", lambda *args: {})
    patch.setattr(experiment, "page", lambda found: "")
    patch.setattr(experiment, "write_text", lambda *args: None)
    more = [word for word in words if not word.startswith(("--arms", "--seeds", "--results", "--work_dir"))]
    folder = next(word for word in words if word.startswith("--work_dir")).split("=")[1]
    experiment.main(
        [*more, f"--plan={plan}", "--seeds=0", "--arms=", f"--work_dir={folder}", f"--results={folder}/other"]
    )
    patch.undo()
    return seen[0]


def test_a_small_model_on_other_data_is_an_arm(options, results, monkeypatch, tmp_path):
    """Table 2: what was compressed learns another data set, here the same images."""
    monkeypatch.setitem(PAPER.training, "batch_size", 12)
    monkeypatch.setitem(PAPER.training, "num_workers", 0)
    data = next(word for word in options[0] if word.startswith("--dataset=")).split("=")[1]
    words = [word for word in options[0] if not word.startswith(("--arms", "--seeds", "--results", "--work"))]
    words += [
        "--plan=paper",
        "--seeds=0",
        f"--results={tmp_path}",
        f"--work_dir={tmp_path / 'work'}",
        f"--transfer_dataset={data}",
    ]
    arms = ["dense-trained-on", "nose-5-one-shot", "nose-5", "dense-trained-on-probed", "nose-5-probed"]
    assert experiment.main([*words, f"--arms={','.join(arms)}"]) == 0
    found = json.loads((tmp_path / "summary.json").read_text())["arms"]
    assert found["nose-5-probed"]["parameters"] == found["nose-5"]["parameters"]
    assert set(found["nose-5-probed"]["gap"]) == {"dense_trained_on"}
    assert found["nose-5"]["gap"]["one_shot"] is not None
