"""Every number of a report stands in the records."""

import math
import os
import re

import pytest
from run_records import LAYERS, VERSIONS, records, write_run

from hf_nose.figures import draw_figures
from hf_nose.markdown import escape
from hf_nose.report import duration, headline, load_lines, summary_table, write_report


NUMBER = re.compile(r"\d+(?:\.\d+)?")
# Digits that are words.
WORDS = re.compile(r"top-1|top-5|SHA-256|First-5|x86\\?_64|Fig\. \d|float32|standard error")


def other_metrics():
    """Metrics of another run: worse by far, slower, larger, measured on other images."""
    metrics = records("metrics")["metrics"]
    numbers = {
        "dense": (0.8171, 0.9532, 0.8123, 86_567_656, 17_582_740_224, 31.41, 1.0),
        "dense_control": (0.8213, 0.9551, 0.8011, 86_567_656, 17_582_740_224, 31.37, 1.001),
        "compressed": (0.7733, 0.9377, 0.9777, 74_748_136, 14_956_998_144, 29.99, 0.9551),
    }
    for name, (top1, top5, loss, parameters, macs, rate, ratio) in numbers.items():
        metrics["models"][name] = {
            "top1": top1,
            "top5": top5,
            "loss": loss,
            "num_images": 788,
            "parameters": parameters,
            "macs": macs,
            "images_per_s": rate,
            "images_per_s_quartiles": [rate - 2.2, rate + 3.3],
            "ratio_to_dense": ratio,
            "ratio_interval": [ratio - 0.03, ratio + 0.04],
            "verdict": "not faster: no difference shown",
        }
    metrics["throughput"] = {"batch_size": 37, "rounds": 13}
    metrics["controls"] = metrics["controls"][:1]
    return metrics


def explained(metrics):
    """Every number that a report of these metrics may hold, formatted here from the JSON on its own."""
    models = metrics["models"]
    dense, compressed = models["dense"], models["compressed"]
    rival = models.get("dense_control", dense)
    found = set()
    for model in models.values():
        found |= {f"{100 * model['top1']:.1f}", f"{100 * model['top5']:.1f}", f"{model['loss']:.4f}"}
        found |= {f"{model['parameters'] / 1e6:.{digits}f}" for digits in (2, 3)}
        found |= {f"{model['macs'] / unit:.2f}" for unit in (1e6, 1e9)}
        found |= {f"{rate:.{digits}f}" for rate in rates(model) for digits in (0, 1)}
        found |= {f"{ratio:.2f}" for ratio in (model["ratio_to_dense"], *model["ratio_interval"])}
        found |= {str(model["num_images"])}
    for key in ("parameters", "macs"):
        found.add(f"{abs(100 * (compressed[key] / dense[key] - 1)):.1f}")
    found.add(f"{abs(100 * (compressed['top1'] - rival['top1'])):.1f}")
    found.add(f"{100 * math.sqrt(compressed['top1'] * (1 - compressed['top1']) / compressed['num_images']):.1f}")
    for control in metrics["controls"]:
        found |= {f"{100 * control['top1']:.1f}", f"{100 * control['top5']:.1f}", f"{control['loss']:.4f}"}
        found |= {str(layer) for layer in control["layers"]} | {str(control.get("seed", ""))}
    found |= {str(value) for value in (*metrics["throughput"].values(), *metrics["hardware"].values())}
    return found


def rates(model):
    return [model["images_per_s"], *model["images_per_s_quartiles"]]


def numbers(text):
    return set(NUMBER.findall(WORDS.sub("", text)))


@pytest.mark.parametrize("metrics", [records("metrics")["metrics"], other_metrics()], ids=["digits", "other"])
def test_report_and_table_hold_only_numbers_of_the_json(tmp_path, metrics):
    write_run(tmp_path, {"metrics": metrics})
    text = write_report(tmp_path).read_text()
    versions = set(NUMBER.findall(" ".join(VERSIONS.values())))
    assert numbers(text) <= explained(metrics) | versions
    for model in metrics["models"].values():
        assert f"| {100 * model['top1']:.1f} | {100 * model['top5']:.1f} | {model['loss']:.4f} |" in text
        assert f"{100 * model['top1']:.1f}" in summary_table(tmp_path)
    assert numbers(summary_table(tmp_path)) <= explained(metrics)


def test_two_runs_share_no_measured_number(tmp_path):
    one = numbers(" ".join(headline(records())))
    two = numbers(" ".join(headline({"metrics": other_metrics()})))
    assert one and two and not one & two


def test_headline_of_a_faster_model():
    gained, lost = headline(records())
    assert gained == (
        "Gained: 0.341 M parameters become 0.294 M (-13.9 %), 6.12 M MACs become 5.20 M (-15.0 %), and the model is "
        "faster, at 1.32 times (confidence interval 1.25 to 1.37) the dense model's images/s."
    )
    assert lost == (
        "Lost: top-1 is 95.8 % against 96.7 %, 0.9 points below the dense model trained for the same total steps, on "
        "451 images (a standard error of such a figure: 0.9 points)."
    )


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        ("not faster: slower", "is not faster, at 1.32"),
        ("not faster: no difference shown", "is not faster, at 1.32"),
        ("faster", "is faster, at 1.32"),
    ],
)
def test_not_faster_is_said_in_words(verdict, words):
    """A median above 1 is not enough: the whole interval has to be."""
    content = records("metrics")
    content["metrics"]["models"]["compressed"]["verdict"] = verdict
    gained, _ = headline(content)
    assert words in gained


def test_the_seconds_of_a_resumed_training_are_of_its_last_part():
    assert duration({"steps": 1000, "seconds": 3.21, "resumed_from": None}) == "1000 steps, 3.2 s"
    assert duration({"steps": 0, "seconds": 0.0}) == "0 steps, 0.0 s"
    resumed = {"steps": 1000, "seconds": 3.21, "resumed_from": "checkpoint-950"}
    assert duration(resumed) == "1000 steps, 3.2 s since step 950"


@pytest.mark.parametrize(
    ("top1", "words"),
    [
        (0.9567, "Lost: top-1 is 95.7 % against 96.7 %, 1.0 points below the dense model trained"),
        (0.9667, "Nothing lost in accuracy: top-1 is 96.7 % against 96.7 %, level with the dense model trained"),
        (0.9717, "Nothing lost in accuracy: top-1 is 97.2 % against 96.7 %, 0.5 points above the dense model trained"),
    ],
)
def test_what_was_lost(top1, words):
    content = records("metrics")
    content["metrics"]["models"]["compressed"]["top1"] = top1
    content["metrics"]["models"]["dense_control"]["top1"] = 0.9667
    assert headline(content)[1].startswith(words)


def test_without_a_control_the_dense_model_that_went_in_is_the_rival(tmp_path):
    content = records()
    del content["metrics"]["models"]["dense_control"]
    assert "0.4 points below the dense model that went in" in headline(content)[1]
    text = write_report(write_run(tmp_path, content)).read_text()
    assert "A dense model of equal total steps" in section(text, "What was not run")
    assert "dense, trained on" not in text


def section(text, title):
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_full_report(tmp_path):
    folder = write_run(tmp_path, records())
    (folder / "model").mkdir()
    draw_figures(folder)
    path = write_report(folder)
    text = path.read_text()
    assert path == folder / "report.md"
    assert "What was not run" not in text
    figures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert figures == [f"figures/{name}.png" for name in ("comparison", "entropy", "trajectory", "training")]
    assert all((folder / figure).is_file() for figure in figures)
    assert "import hf_nose\n" in text and "AutoModelForImageClassification.from_pretrained('model')" in text
    search = section(text, "The search")
    assert "Attention layers 3, 5, 1, 8, 7, in the order picked" in search
    for word in ("criterion transfer\\_entropy", "search greedy", "mask skip", "sign absolute", "target logits"):
        assert word in search
    assert "512 calibration images" in search and "ab" * 32 in search and "2936 block forwards" in search
    controls = section(text, "Without training")
    assert "| First-5, masked, untrained | 0, 1, 2, 3, 4 | 16.2 | 60.0 | 3.4000 |" in controls
    assert "(seed 0)" in controls
    training = section(text, "Training and folding")
    assert "linear schedule, with feature compensation, 1200 steps, 71.9 s" in training
    assert "64 images: equal bit for bit, greatest difference 0." in training
    assert "a quarter of each class was set apart" in section(text, "Data")
    measured = section(text, "Measured with")
    assert "AMD EPYC" in measured and "torch 2.13.0" in measured and "accelerator" not in measured
    assert str(tmp_path) not in text


def test_layers_that_faded_in_turns_are_said(tmp_path):
    content = records()
    content["dilution"]["order"] = "descending"
    text = write_report(write_run(tmp_path, content)).read_text()
    assert "linear schedule, from the highest layer down, with feature compensation" in text


@pytest.mark.parametrize(
    ("present", "missing"),
    [
        (("prepare", "profile", "selection"), "dilute, fold, evaluate"),
        (("metrics",), "prepare, profile, select, dilute, fold"),
        ((), "prepare, profile, select, dilute, fold, evaluate"),
    ],
)
def test_missing_stages_are_said(tmp_path, present, missing):
    write_run(tmp_path, records(*present) if present else {})
    text = write_report(tmp_path).read_text()
    assert f"Stages not run in this folder: {missing}." in section(text, "What was not run")
    assert "![" not in text and "from_pretrained" not in text
    if "metrics" not in present:
        assert "No compressed model has been measured" in text and "Gained" not in text
        assert "No compressed model has been measured" in summary_table(tmp_path)
    if "selection" in present:
        assert "Selected for removal: attention layers 3, 5, 1, 8, 7." in text


def test_a_dense_model_alone_is_no_gain(tmp_path):
    content = records("metrics")
    for name in ("dense_control", "compressed"):
        del content["metrics"]["models"][name]
    content["metrics"]["controls"] = []
    text = write_report(write_run(tmp_path, content)).read_text()
    assert "No compressed model has been measured" in text
    assert "| dense | 96.2 |" in text and "Masked, untrained controls" in text


def test_unfaithful_fold_and_given_layers_are_said(tmp_path):
    content = records()
    content["fold"] |= {"bitwise_equal": False, "max_abs_logit_difference": 0.00123}
    content["selection"] |= {"search": "given", "trace": []}
    text = write_report(write_run(tmp_path, content)).read_text()
    assert "not equal bit for bit, greatest difference 0.00123" in text
    assert "as given: nothing was searched" in text


def test_how_sure_a_race_is_and_what_bfloat16_changed(tmp_path):
    content = records()
    before = section(write_report(write_run(tmp_path, content)).read_text(), "The search")
    assert "race" not in before and "float32" not in before
    precision = {"dtype": "bfloat16", "num_images": 64, "num_sets": 54, "largest_difference": 0.01234}
    content["selection"] |= {"search": "racing", "confidence": 0.99, "precision": precision}
    found = section(write_report(write_run(tmp_path, content)).read_text(), "The search")
    assert "with 0.99 confidence or more these are the layers that the greedy search on all images would pick" in found
    assert "In bfloat16, 54 sets on 64 images score up to 0.0123 off float32" in found


def test_versions_that_differ_between_stages_are_told_apart(tmp_path):
    content = records("profile", "metrics")
    content["profile"]["versions"] = VERSIONS | {"torch": "2.99.0"}
    measured = section(write_report(write_run(tmp_path, content)).read_text(), "Measured with")
    profile, metrics = [line for line in measured.splitlines() if ".json" in line]
    assert "profile.json" in profile and "torch 2.99.0" in profile
    assert "metrics.json" in metrics and "torch 2.13.0" in metrics


HOSTILE = "a|b <img src=x> [c](http://d) `e` *f*\n# g & h"


def test_hostile_names_do_not_break_the_report(tmp_path):
    content = records()
    plain = write_report(write_run(tmp_path / "plain", content)).read_text()
    content["prepare"]["data"] |= {"dataset": HOSTILE, "dataset_id": HOSTILE, "notes": [HOSTILE]}
    content["prepare"]["model"] |= {"base_model_id": HOSTILE}
    content["metrics"]["controls"][0]["name"] = HOSTILE
    text = write_report(write_run(tmp_path / "hostile", content)).read_text()
    assert len(text.splitlines()) == len(plain.splitlines())
    assert [line for line in text.splitlines() if line.startswith("## ")] == re.findall(r"^## .*$", plain, re.M)
    assert "<img" not in text and "](http" not in text.replace("\\](http", "").replace("]\\(", "")
    rows = [line for line in section(text, "Without training").splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {6}


def test_escape():
    assert escape("tench, Tinca tinca") == "tench, Tinca tinca"
    assert escape("a|b\n<c> & `d`") == "a\\|b &lt;c&gt; &amp; \\`d\\`"
    assert escape("back\\slash") == "back\\\\slash"


def test_summary_table_is_plain_and_aligned(tmp_path):
    table = summary_table(write_run(tmp_path, records()))
    lines = table.splitlines()
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1
    assert lines[-1].startswith("compressed") and lines[-1].endswith("1.32x")
    assert table.isascii() and "|" not in table


def test_the_line_that_loads_the_result():
    line = load_lines(os.path.join("runs", "it's"))[-1]
    assert line == 'model = AutoModelForImageClassification.from_pretrained("runs/it\'s")'


def test_layers_of_the_records_are_those_of_the_search():
    assert records("selection")["selection"]["layers"] == LAYERS


def test_a_corrupt_record_is_named_and_an_older_report_stays(tmp_path):
    write_run(tmp_path, records())
    before = write_report(tmp_path).read_text()
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match="metrics.json"):
        write_report(tmp_path)
    assert (tmp_path / "report.md").read_text() == before
