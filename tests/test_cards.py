"""Cards tell what stands in their records and nothing else, and no text from outside runs or breaks anything."""

import copy
import getpass
import json
import math
import re
import shutil
import socket
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from reference_vit import nose
from run_records import LAYERS, records, write_run

from hf_nose.card_records import card_record, export_card, recipe_record, run_record
from hf_nose.cards import render_card
from hf_nose.command_line import read_recipe, recipe_path
from hf_nose.configuration_nose_vit import NoseViTConfig
from hf_nose.export import export_folder
from hf_nose.files import read_json, write_json
from hf_nose.images import digits_processor
from hf_nose.published import BASES, checkpoint_name, published_figures, rows
from hf_nose.records import read_records
from hf_nose.surgery import fold


ROOT = Path(__file__).resolve().parents[1]
CARDS = ROOT / "model_cards"
sys.path.insert(0, str(ROOT / "scripts"))
import render_cards  # noqa: E402
from cifar10_plans import SHORT, TRAINING  # noqa: E402
from cifar10_summary import best_arm, summary  # noqa: E402


@pytest.fixture(scope="module")
def committed():
    """The record of every committed card."""
    return render_cards.records(CARDS / "results")


NAMES = sorted(path.stem for path in CARDS.glob("*.md"))


# The committed cards


def test_every_card_is_what_its_record_renders_to(committed):
    assert sorted(committed) == NAMES
    for name, record in committed.items():
        assert (CARDS / f"{name}.md").read_text() == render_card(record), f"run scripts/render_cards.py: {name}"


def test_recipes_and_cards_share_their_names():
    recipes = {path.stem for path in (ROOT / "hf_nose" / "recipes").glob("deit-*.yaml")}
    assert recipes == set(render_cards.RECIPES) and recipes <= set(NAMES)
    for name in recipes:
        recipe = yaml.safe_load((ROOT / "hf_nose" / "recipes" / f"{name}.yaml").read_text())
        count = len(recipe["layers"].split(",")) if "layers" in recipe else round(12 * recipe["ratio"])
        assert checkpoint_name(recipe["model"], count) == name


@pytest.mark.parametrize("name", NAMES)
def test_cards_parse(name):
    text = (CARDS / f"{name}.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    card = ModelCard(text)
    assert front["pipeline_tag"] == "image-classification" and front["library_name"] == "transformers"
    assert card.data.license == "apache-2.0" and "nose_vit" in card.data.tags
    if "model-index" in front:
        found, results = model_index_to_eval_results(front["model-index"])
        assert found == name and results and all(0 < result.metric_value <= 1 for result in results)
    assert ("model-index" in front) == (not name.startswith("deit-"))


@pytest.mark.parametrize("name", NAMES)
def test_figures_of_a_card_exist(name):
    text = (CARDS / f"{name}.md").read_text()
    for path in re.findall(r"!\[[^]]*\]\(([^)]*)\)", text):
        assert (CARDS / path).is_file() and ".." not in path and not path.startswith("/")


# Digits that are words, code, or the citation.
WORDS = re.compile(
    r"top-\d|SHA-256|First-\d|Fig\. \d|float32|9\d % interval|arxiv\.org/abs/[\d.]+|CVPR 2024|[Aa]pache-2\.0|YOUR_NAME"
    r"|images in 10 GB|counted from 0|random set \d|[\w.-]*deit-[\w-]+|imagenet-1k|cifar10+|digits-vit|`[^`]*`"
    r"|\b5 of 12|\b9 of 12"
)
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e-?\d+)?")


def leaves(value):
    """Every number and text in a record, and the length of every list of layers."""
    if isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def explained(record):
    """Every number that a card of `record` may hold, as a text: what stands in it, scaled as the card's units say."""
    found = set()
    for value in leaves({key: part for key, part in record.items() if key != "source"}):
        if isinstance(value, str):
            found |= set(NUMBER.findall(value))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found |= {str(value), f"{value:g}", f"{value:.0f}", f"{value:.2f}", f"{value:.4f}", f"{100 * value:.1f}"}
            found |= {f"{value / unit:.{digits}f}" for unit in (1e6, 1e9) for digits in (2, 3)}
    models = record["records"].get("metrics", {}).get("models") or record["counted"]
    dense, small = models["dense"], models["compressed"]
    found |= {f"{abs(100 * (small[key] / dense[key] - 1)):.1f}" for key in ("parameters", "macs")}
    if "top1" in small:
        rival = models.get("dense_control", dense)
        found.add(f"{abs(100 * (small['top1'] - rival['top1'])):.1f}")
        found.add(f"{100 * math.sqrt(small['top1'] * (1 - small['top1']) / small['num_images']):.1f}")
    return found


def body(text):
    """A card without what is not its record's: the YAML in front, code, and the citation."""
    text = re.sub(r"```.*?```", "", text.split("---\n", 2)[2], flags=re.S)
    return WORDS.sub("", text)


@pytest.mark.parametrize("name", NAMES)
def test_no_number_of_a_card_is_missing_from_its_record(committed, name):
    assert set(NUMBER.findall(body((CARDS / f"{name}.md").read_text()))) <= explained(committed[name])


def test_a_forged_number_would_be_noticed(committed):
    text = render_card(committed["digits"]).replace("96.9", "97.9")
    assert not set(NUMBER.findall(body(text))) <= explained(committed["digits"])


def test_the_papers_figures_come_from_its_tables():
    """Row by row, against the table itself."""
    table = {(row["setting"], row["method"], row["metric"]): row["value"] for row in rows()}
    for base_id, base in BASES.items():
        for count, method in base.compressed.items():
            found = published_figures(base_id, "ILSVRC/imagenet-1k", count)
            text = (CARDS / f"{checkpoint_name(base_id, count)}.md").read_text()
            for metric, label in (("top1", "top-1 %"), ("params_m", "parameters, M"), ("images_per_s", "images/s")):
                dense, small = (table[base.setting, name, metric] for name in (base.dense, method))
                assert (found["dense"][metric], found["compressed"][metric]) == (dense, small)
                ours = r"[\d.]+" if metric == "params_m" else "not measured"
                assert re.search(rf"\| {re.escape(label)} \| {dense} \| {ours} \| {small} \| {ours} \|", text), metric
    assert published_figures("facebook/deit-base-patch16-224", "uoft-cs/cifar100", 5) is None
    assert published_figures("facebook/deit-base-patch16-224", "ILSVRC/imagenet-1k", 7) is None
    assert published_figures(None, None, 5) is None


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("deit-")])
def test_a_recipe_that_nobody_ran_says_so_and_how_to_run_it(name):
    text = (CARDS / f"{name}.md").read_text()
    assert "**Weights not trained by us.**" in text and "There are no weights here yet." in text
    assert f"accelerate launch scripts/run_nose.py --recipe {name}\n" in text
    assert "Accuracy and speed of these weights: there are none yet." in text
    recipe = yaml.safe_load((ROOT / "hf_nose" / "recipes" / f"{name}.yaml").read_text())
    layers = recipe["layers"].replace(",", ", ") if "layers" in recipe else None
    assert (f"Attention layers {layers}," in text) if layers else "is searched in the run" in text


def test_exact_costs_of_the_papers_models(committed):
    millions = {"deit-b-nose40": "74.75", "deit-b-nose50": "72.38", "deit-s-nose25": "20.27", "deit-s-nose30": "19.68"}
    millions |= {"deit-s-nose40": "19.09", "deit-t-nose25": "5.27", "deit-t-nose30": "5.12"}
    for name, value in millions.items():
        assert f"{committed[name]['counted']['compressed']['parameters'] / 1e6:.2f}" == value


@pytest.mark.parametrize("path", sorted(p for p in CARDS.rglob("*") if p.suffix in (".md", ".json", ".csv", ".yaml")))
def test_nothing_published_tells_of_a_place_or_a_person(path):
    text = path.read_text()
    # A path from the root, from a home or from a drive; what stands behind a colon of an address is none.
    assert not re.search(r"(?<![\w.:/)~-])/(?:[a-z]\w*)/\w|~/|[A-Za-z]:\\|file://|\.\./", text)
    assert not re.search(r"hf_[A-Za-z]{20,}|ghp_|AKIA[A-Z0-9]{16}|[\w.]+@[\w.]+\.\w+|(?:\d{1,3}\.){3}\d{1,3}", text)
    names = {socket.gethostname(), getpass.getuser(), Path.home().name, ROOT.parent.name} - {"root", "work", "runner"}
    assert not [name for name in names if len(name) > 2 and re.search(rf"\b{re.escape(name)}\b", text)]


# Cards of runs


@pytest.fixture
def run(tmp_path):
    made = records()
    # A teacher from a path, which no card may tell.
    made["dilution"]["settings"] = {"teacher": str(tmp_path / "a-teacher"), "batch_size": 64, "learning_rate": 1e-3}
    folder = write_run(tmp_path / "deit-x", made)
    (folder / "figures").mkdir()
    (folder / "figures" / "trajectory.png").write_bytes(b"")
    model = nose()
    model.dilute([1, 3])
    model.set_mask(0.0)
    fold(model).save_pretrained(folder / "model")
    return folder


def test_a_run_s_card(run):
    record = run_record(run, repo_id="me/deit-x")
    card = ModelCard(render_card(json.loads(json.dumps(record))))
    assert str(run.parent) not in str(card) and "**Trained with hf_nose**" in card.text
    assert [result.metric_value for result in card.data.eval_results] == [0.9579, 0.9956]
    assert card.data.base_model is None and card.data.datasets is None and card.data.license is None
    assert (
        "(blocks 1, 3, counted from 0)" in card.text
        and f"Attention layers {', '.join(map(str, LAYERS))}," in card.text
    )
    assert "| top-1 % | 96.2 | 96.7 | 95.8 |" in card.text and "paper |" not in card.text
    assert "SHA-256 `" + "ab" * 32 + "`" in card.text and "512 calibration images" in card.text
    assert card.text.count("![") == 1 and "![trajectory](figures/trajectory.png)" in card.text
    assert 'from_pretrained("me/deit-x", trust_remote_code=True)' in card.text and 'revision="stock"' in card.text
    assert "Speed on AMD EPYC, 2 cores, float32" in card.text and "The paper has no figure" in card.text
    assert "whose licence this card does not know" in card.text and "Lost: top-1 is 95.8 %" in card.text
    assert "Teacher: a-teacher." in card.text and "| `learning_rate` | 0.001 |" in card.text
    assert "| `feature_compensation` | True |" in card.text and "| `steps` | 1200 |" in card.text
    order = [card.text.index(part) for part in ("trust_remote_code=True", "import hf_nose", 'revision="stock"')]
    assert order == sorted(order)


def test_ids_bring_the_papers_columns_and_the_licence(run):
    prepare = records("prepare")["prepare"]
    base = "facebook/deit-base-patch16-224"
    prepare["model"] |= {"base_model_id": base, "source": base}
    prepare["data"] |= {"dataset_id": "ILSVRC/imagenet-1k", "dataset": "ILSVRC/imagenet-1k"}
    write_run(run, {"prepare": prepare})
    config = json.loads((run / "model" / "config.json").read_text())
    record = run_record(run)
    record["published"] = published_figures(base, "ILSVRC/imagenet-1k", 5)
    card = ModelCard(render_card(record))
    assert (card.data.base_model, card.data.datasets, card.data.license) == (
        base,
        ["ILSVRC/imagenet-1k"],
        "apache-2.0",
    )
    assert "| top-1 % | 81.8 | 96.2 | 96.7 | 81.8 | 95.8 |" in card.text
    assert "| images in 10 GB | 606 | not measured | not measured | 730 | not measured |" in card.text
    assert config["removed_attention_layers"] == [1, 3]


def test_a_run_that_was_not_measured_says_so(run):
    (run / "metrics.json").unlink()
    text = render_card(run_record(run))
    assert "model-index" not in text and "- Accuracy and speed of these weights.\n" in text
    assert "not measured by us.\n" in text
    (run / "dilution.json").unlink()
    write_run(run, {"dilution": {**records("dilution")["dilution"], "steps": 0}})
    assert "**Not trained after the removal**" in render_card(run_record(run))


def test_no_dense_control_is_said(run):
    metrics = records("metrics")["metrics"]
    del metrics["models"]["dense_control"]
    write_run(run, {"metrics": metrics})
    assert "A dense model trained for the same total steps" in render_card(run_record(run))


def test_a_half_diluted_model_says_its_m_and_no_stock_revision(run):
    record = run_record(run)
    record["model"] |= {"diluted": [1, 3], "mask": [0.37, 0.37], "removed": [], "num_removed": 0}
    text = render_card(record)
    assert "blocks 1, 3 is faded out, at M = 0.37, 0.37" in text and 'revision="stock"' not in text
    assert "It is not finished" in text


def test_a_transfer_s_card(run):
    start = records("prepare")["prepare"]
    metrics = {
        "method": "linear_probe",
        "trainable_parameters": 490,
        "metrics": {"top1": 0.8123, "top5": 0.9777, "loss": 0.4321, "num_images": 333},
        "training": {"steps": 77},
        "model": start["model"],
        "data": start["data"],
    }
    for path in run.glob("*.json"):
        path.unlink()
    write_run(run, {"metrics": {**metrics, "settings": {}}})
    card = ModelCard(render_card(run_record(run)))
    assert [result.metric_value for result in card.data.eval_results] == [0.8123, 0.9777]
    assert "Top-1 81.2 % on 333 images; no dense model was trained beside it." in card.text
    assert "linear\\_probe: 490 parameters trained, 77 steps." in card.text
    assert "says nothing of what the removal cost" in card.text


def test_an_export_s_card(run):
    """As `export_folder` asks for it: of a run, and of a checkpoint of which nothing is known."""
    config = NoseViTConfig.from_pretrained(run / "model")
    shutil.copytree(run / "figures", run / "model" / "figures")
    card = ModelCard(export_card(run / "model", config, read_records(run), "facebook/deit-tiny-patch16-224"))
    assert "![trajectory](figures/trajectory.png)" in card.text and "# deit-t-nose25" in card.text
    assert card.data.eval_results[0].metric_value == 0.9579 and card.data.license == "apache-2.0"
    card = ModelCard(export_card(run / "model", config, {}, None, name="mine", repo_id="me/mine", license="mit"))
    assert "**Origin not told.**" in card.text and "a model this card was not told of" in card.text
    assert card.data.license == "mit" and card.data.base_model is None and card.data.eval_results is None
    assert "Trained with" not in card.text and "# mine" in card.text


def test_an_exported_card_is_true(run, tmp_path):
    """As it is in the folder: it parses, its figures are there, and its numbers are the run's."""
    digits_processor().save_pretrained(run / "model")
    out = export_folder(run, tmp_path / "out", base_model_id="facebook/deit-tiny-patch16-224")
    text = (out / "README.md").read_text()
    name, results = model_index_to_eval_results(yaml.safe_load(text.split("---\n")[1])["model-index"])
    assert name == "deit-x" and [result.metric_value for result in results] == [0.9579, 0.9956]
    figures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    assert figures == ["figures/trajectory.png"] and (out / figures[0]).is_file()
    record = run_record(run) | {"base_model": "facebook/deit-tiny-patch16-224"}
    assert set(NUMBER.findall(body(text))) <= explained(record)
    assert not set(NUMBER.findall(body(text.replace("95.8", "98.8")))) <= explained(record)
    assert "hf-nose transfer --model YOUR_NAME/deit-x " in text and text.count('"YOUR_NAME/deit-x"') == 4


def test_a_half_diluted_export_s_card_reads_m_from_the_weights(tmp_path):
    model = nose()
    model.dilute([1, 3])
    model.set_mask([0.25, 0.5])
    model.save_pretrained(tmp_path)
    text = export_card(tmp_path, model.config, {}, None)
    assert "blocks 1, 3 is faded out, at M = 0.25, 0.5" in text and "# nose-vit" in text


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(ValueError, match="it holds no model"):
        run_record(tmp_path)


# Text from outside


HOSTILE = [
    "{{ 7 * 7 }}",
    "{% for x in ().__class__.__mro__ %}{{ x }}{% endfor %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a\n---\nlicense: mit\n---\n# b",
    "<script>alert(1)</script>",
    "[x](javascript:alert(1)) ![y](https://a.b/c.png)",
    "`x` | y | **z**",
    "!!python/object/apply:os.system [echo x]",
    "{# gone #}",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_from_outside_is_text(run, text):
    plain = run_record(run)
    before = ModelCard(render_card(plain))
    record = copy.deepcopy(plain) | {"base_model": text, "dataset": text}
    record["records"]["prepare"]["data"]["notes"] = [text]
    record["records"]["selection"]["criterion"] = text
    record["records"]["metrics"]["hardware"]["processor"] = text
    record["settings"]["optimizer"] = text
    record["experiment"] = {"title": text, "text": text, "table": [["", text], [text, text]], "note": text}
    card = ModelCard(render_card(record))
    front = yaml.safe_load(str(card).split("---\n")[1])
    assert {key: value for key, value in front.items() if key != "model-index"} == {
        key: value for key, value in yaml.safe_load(str(before).split("---\n")[1]).items() if key != "model-index"
    }
    assert front["model-index"][0]["results"][0]["dataset"]["name"] == " ".join(text.split())
    assert "49" not in re.sub(r"\d[\d.]+|\w{64}", "", card.text) and "<script>" not in card.text
    assert not re.search(r"(?<!\\)\]\((javascript|https://a\.b)", card.text) and "object at 0x" not in card.text
    assert not re.search(r"^(---|# b|license: mit)", card.text, flags=re.M)
    width = {line.count(" | ") for line in card.text.splitlines() if line.startswith("| top-1 %")}
    assert len(width) == 1


@pytest.mark.parametrize("name", ["repo_id", "base_model_id", "dataset_id"])
@pytest.mark.parametrize("value", ["../x", "a/b/c", "a b", "/etc/passwd", "x\ny", 'a"b', "{{x}}"])
def test_what_is_no_id_is_refused(run, name, value):
    with pytest.raises(ValueError):
        render_card(run_record(run) | {name: value})


@pytest.mark.parametrize("path", ["../x.png", "/x.png", "a/../../x.png", "x) ![y](z", "https://a.b/c.png", "C:\\x"])
def test_a_figure_outside_is_refused(run, path):
    with pytest.raises(ValueError, match="inside the repository"):
        render_card(run_record(run) | {"figures": {"trajectory": path}})


def test_a_record_of_unknown_fields_is_refused():
    with pytest.raises(ValueError, match="A card has no"):
        card_record("x", {}, colour="red")
    with pytest.raises(ValueError, match="recipe must start from"):
        recipe_record(str(ROOT / "hf_nose" / "recipes" / "digits.yaml"))


# The CIFAR-10 card, whose results may not be there yet


def cifar_results(folder, accuracies):
    """Records as the experiment's script leaves them, with made-up hits."""
    folder.mkdir()
    for arm, accuracy in accuracies.items():
        for seed in (0, 1):
            hits = np.random.default_rng(zlib.crc32(arm.encode()) + seed).random(2000) < accuracy
            record = {
                "arm": arm,
                "seed": seed,
                "model": "facebook/deit-tiny-patch16-224",
                "dataset": "uoft-cs/cifar10",
                "num_train": 20_000,
                "image_size": 64,
                "bf16": True,
                "top1": float(hits.mean()),
                "num_images": 2000,
                "correct": np.packbits(hits).tobytes().hex(),
                "parameters": 5_500_000 if arm.startswith("dense") else 4_800_000,
                "macs": 100_000_000 if arm.startswith("dense") else 83_000_000,
                "hardware": {"cores": 2, "processor": "made", "accelerator": None},
                "training": {
                    "steps": 1099,
                    "seconds": 1.0,
                    "schedule": "linear",
                    "decay": 0.6,
                    "feature_compensation": True,
                },
            }
            if not arm.startswith("dense"):
                record |= {"layers": [3, 5, 1, 8, 7 + seed], "masked_untrained_top1": 0.7 + 0.01 * seed}
            write_json(folder / f"{arm}-seed{seed}.json", record)
    write_json(folder / "summary.json", summary(folder, SHORT))
    return folder


ACCURACIES = {"dense": 0.86, "dense-trained-on": 0.88, "nose-dilution-compensated": 0.80, "nose-one-shot": 0.879}


def test_the_cifar_card_says_what_was_lost(tmp_path):
    folder = cifar_results(tmp_path / "cifar10-deit-tiny", ACCURACIES)
    record = render_cards.cifar_record(folder)
    card, arms = ModelCard(render_card(record)), read_json(folder / "summary.json")["arms"]
    gap = arms["nose-dilution-compensated"]["gap"]["dense_trained_on"]
    assert "- Gained: parameters -12.7 %, MACs -17.0 %" in card.text
    assert "- Lost: NOSE: dilution with compensation (the paper's way) has top-1" in card.text
    assert f"{gap['points']:+.1f} ({gap['low']:+.1f}" in card.text
    assert "Not told from the dense model: The best arm, picked by these very figures" in card.text
    assert "3, 5, 1, 8, 7; 3, 5, 1, 8, 8" in card.text and "70.0, 71.0" in card.text
    assert card.data.base_model == "facebook/deit-tiny-patch16-224" and card.data.datasets == ["uoft-cs/cifar10"]
    (result,) = card.data.eval_results
    assert result.metric_value == pytest.approx(arms["nose-one-shot"]["top1_mean"] / 100)
    assert set(NUMBER.findall(body(str(card)))) <= explained(record)
    assert "Speed: the runs shared their machine" in card.text


def test_every_arm_of_the_plan_has_a_name():
    assert {"dense", *SHORT.arms} <= set(render_cards.ARMS)


def test_the_best_arm_was_run_with_every_seed(tmp_path):
    folder = cifar_results(tmp_path / "cifar10-deit-tiny", {**ACCURACIES, "nose-dilution": 0.95})
    (folder / "nose-dilution-seed1.json").unlink()
    assert best_arm(summary(folder, SHORT)) == "nose-one-shot"


def test_the_short_recipe_is_the_best_arm_of_the_committed_table():
    path = CARDS / "results" / "cifar10-deit-tiny" / "summary.json"
    if not path.is_file():
        pytest.skip("The experiment is not finished.")
    found = read_json(path)
    arm = {**TRAINING, **SHORT.arms[best_arm(found)], "epochs": SHORT.epochs}
    recipe = read_recipe(recipe_path("short"))
    # How often it saves and looks is no part of what was found.
    skipped = {"eval_batch_size", "eval_steps", "save_steps", "logging_steps", "cache_gib"}
    assert {name: recipe.get(name) for name in set(arm) - skipped} == {
        name: value for name, value in arm.items() if name not in skipped
    }


def test_an_unfinished_experiment_has_no_card(tmp_path):
    half = {name: value for name, value in ACCURACIES.items() if name != "dense-trained-on"}
    with pytest.raises(ValueError, match=r"is not finished: \['dense-trained-on'\]"):
        render_cards.cifar_record(cifar_results(tmp_path / "x", half))
