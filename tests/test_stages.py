"""What each stage leaves behind."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import NUM_BLOCKS, TINY, finished_run, record, rerun, resume, run
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_nose import NoseViTForImageClassification
from hf_nose import stages as stages_module
from hf_nose.command_line import parse_settings
from hf_nose.context import RunContext
from hf_nose.files import SCHEMA
from hf_nose.images import digits_processor
from hf_nose.modeling_nose_vit import NoseViTModel
from hf_nose.plan import dense_model, num_layers, other_names, parse_layers, planned_layers
from hf_nose.records import RECORDS
from hf_nose.selection import Selection
from hf_nose.settings import STAGES, Settings
from hf_nose.stages import STAGE_FUNCTIONS, control_sets


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run through all stages; only read."""
    return finished_run(tmp_path_factory)


@pytest.fixture
def copy(finished, tmp_path):
    """A run through all stages, to be changed."""
    return shutil.copytree(finished, tmp_path / "run")


# What the stages leave


def test_every_stage_has_a_function_and_a_record():
    assert tuple(STAGE_FUNCTIONS) == STAGES and tuple(RECORDS) == (*STAGES, "transfer")


@pytest.mark.parametrize("stage", STAGES)
def test_every_record_says_what_wrote_it_from_which_settings(finished, stage):
    content = json.loads((finished / RECORDS[stage]).read_text())
    assert content["schema"] == SCHEMA
    assert content["versions"]["torch"] == torch.__version__
    expected = parse_settings(["--resume", f"--output_dir={finished}"]).of_stage(stage)
    assert content["settings"] == expected


def test_prepare(finished):
    content = record(finished, "prepare")
    model = content["model"]
    assert model["source"] == "a local folder" and model["base_model_id"] is None
    assert (model["num_hidden_layers"], model["hidden_size"], model["num_labels"]) == (NUM_BLOCKS, 12, 10)
    dense = NoseViTForImageClassification.from_pretrained(finished / "dense")
    assert dense.config.removed_attention_layers == [] == dense.config.diluted_attention_layers
    assert model["parameters"] == sum(parameter.numel() for parameter in dense.parameters())
    assert (content["data"]["num_train"], content["data"]["num_eval"]) == (48, 20)
    assert content["data"]["dataset"] == "digits"
    training = content["dense_training"]
    assert training["steps"] == TINY["dense_steps"] and training["resumed_from"] is None
    assert [line["step"] for line in training["log"] if "loss" in line] == [2, 4]
    assert [line["step"] for line in training["log"] if "eval_top1" in line] == [4]
    assert not any("mask" in line for line in training["log"])


def test_profile(finished):
    content = record(finished, "profile")
    assert content["num_images"] == 24 and content["tokens"] == "all"
    assert content["sha256"] == record(finished, "selection")["calibration"]["sha256"]
    assert [line["layer"] for line in content["layers"]] == list(range(NUM_BLOCKS))
    for line in content["layers"]:
        for part in ("attention", "mlp"):
            assert math.isfinite(line[part]["stream"]) and math.isfinite(line[part]["branch"])


def test_select(finished):
    content = record(finished, "selection")
    assert content["search"] == "greedy" and content["criterion"] == "transfer_entropy"
    assert content["num_layers"] == 2 == len(content["layers"]) == len(content["trace"])
    assert [line["picked"] for line in content["trace"]] == content["layers"]
    assert set(content["trace"][0]["scores"]) == {str(layer) for layer in range(NUM_BLOCKS)}
    for line in content["trace"]:
        assert min(line["scores"], key=lambda layer: abs(line["scores"][layer])) == str(line["picked"])
    assert content["calibration"]["num_images"] == content["num_images"] == 24
    assert content["num_processes"] == 1 and math.isfinite(content["reference"]["entropy"])


def test_select_by_a_race(copy):
    """With every option of the search; the same layers, sure to be."""
    greedy = record(copy, "selection")["layers"]
    flags = ["--search=racing", "--confidence=0.95", "--search_bf16=true", "--stack_candidates=true"]
    rerun(copy, "select", *flags, "--state_cache_gib=0.5")
    content = record(copy, "selection")
    assert (content["search"], content["confidence"]) == ("racing", 0.95)
    assert content["layers"] == greedy
    assert content["precision"]["num_images"] == TINY["calibration_batch_size"]
    assert content["settings"]["stack_candidates"] is True and "state_cache_gib" not in content["settings"]
    for line in content["trace"]:
        assert set(line["images"]) == set(line["scores"]) > set(line["margins"])
    assert control_names(copy)[0] == "NOSE, masked, untrained"


def control_names(folder) -> list[str]:
    settings = parse_settings(["--resume", f"--output_dir={folder}"])
    return [control["name"] for control in control_sets(RunContext(settings), list(range(NUM_BLOCKS)))]


def test_dilute(finished):
    content = record(finished, "dilution")
    assert content["layers"] == record(finished, "selection")["layers"]
    assert content["feature_compensation"] is True and content["steps"] == TINY["steps"]
    masks = {line["step"]: line["mask"] for line in content["log"] if "loss" in line}
    assert masks == {2: pytest.approx(0.8), 4: pytest.approx(0.4), 6: 0.0, 8: 0.0}
    assert content["control"]["steps"] == TINY["steps"]
    assert not any("mask" in line for line in content["control"]["log"])
    diluted = NoseViTForImageClassification.from_pretrained(finished / "diluted")
    assert diluted.config.diluted_attention_layers == sorted(content["layers"])
    assert diluted.config.compensated_attention_layers == sorted(content["layers"])
    assert diluted.vit.is_mask_zero


def test_every_parameter_that_is_used_was_trained(finished):
    start, end, control = (
        load_file(finished / name / "model.safetensors") for name in ("dense", "diluted", "dense_control")
    )
    # No gradient moves the bias of the keys but by rounding.
    for other in (end, control):
        same = [name for name in start if torch.equal(start[name], other[name]) and "k_proj.bias" not in name]
        assert same == []


def test_fold(finished):
    content = record(finished, "fold")
    layers = sorted(record(finished, "selection")["layers"])
    assert content["removed_attention_layers"] == content["folded_attention_layers"] == layers
    assert content["bitwise_equal"] is True and content["max_abs_logit_difference"] == 0.0
    assert content["num_images"] == TINY["eval_batch_size"]


def test_the_result_loads_by_the_auto_class_and_holds_no_removed_attention(finished):
    layers = sorted(record(finished, "selection")["layers"])
    model, info = AutoModelForImageClassification.from_pretrained(finished / "model", output_loading_info=True)
    assert type(model) is NoseViTForImageClassification
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.removed_attention_layers == layers and not model.config.diluted_attention_layers
    assert model.config.id2label == {index: str(index) for index in range(10)}
    for names in (model.state_dict(), load_file(finished / "model" / "model.safetensors")):
        parts = {name.split("layers.")[1].split(".")[1] for name in names if f"layers.{layers[0]}." in name}
        assert parts == {"layernorm_after", "mlp"}
        kept = next(index for index in range(NUM_BLOCKS) if index not in layers)
        assert any(f"layers.{kept}.attention." in name for name in names)
    assert AutoImageProcessor.from_pretrained(finished / "model", backend="pil").size == {"height": 8, "width": 8}


def test_evaluate(finished):
    content = record(finished, "metrics")
    assert list(content["models"]) == ["dense", "dense_control", "compressed"]
    for found in content["models"].values():
        assert found["num_images"] == 20
        assert 0 <= found["top1"] <= found["top5"] <= 1 and found["loss"] > 0
        assert found["images_per_s"] > 0 and len(found["images_per_s_quartiles"]) == 2
    dense, control, compressed = content["models"].values()
    assert dense["ratio_to_dense"] == 1.0
    assert dense["parameters"] == control["parameters"] > compressed["parameters"]
    # Per layer removed: four projections of 12 x 12 with their biases, and a norm.
    assert dense["parameters"] - compressed["parameters"] == 2 * (4 * (12 * 12 + 12) + 2 * 12)
    assert dense["macs"] == control["macs"] > compressed["macs"]
    layers = sorted(record(finished, "selection")["layers"])
    controls = content["controls"]
    assert [line["name"] for line in controls] == [
        "NOSE, masked, untrained",
        "First-2, masked, untrained",
        *(2 * ["random, masked, untrained"]),
    ]
    assert controls[0]["layers"] == layers and controls[1]["layers"] == [0, 1]
    assert all(line["num_images"] == 20 for line in controls)
    assert content["hardware"]["device"] == "cpu"
    assert content["throughput"] == {"batch_size": 4, "rounds": 2}


def test_the_metrics_are_those_of_the_models_in_the_folder(finished):
    """By hand, over the evaluation images in one batch."""
    context = RunContext(parse_settings(["--resume", f"--output_dir={finished}"]))
    images = context.images("evaluation", 10)
    pixels = torch.stack([images[index]["pixel_values"] for index in range(20)])
    labels = torch.tensor(images.labels)
    found = record(finished, "metrics")["models"]
    for name, folder in (("dense", "dense"), ("dense_control", "dense_control"), ("compressed", "model")):
        model = AutoModelForImageClassification.from_pretrained(finished / folder).eval()
        with torch.no_grad():
            logits = model(pixels).logits
        assert found[name]["top1"] == pytest.approx(float((logits.argmax(-1) == labels).double().mean()))
        assert found[name]["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)


def test_report(finished):
    content = record(finished, "report")
    assert content["report"] == "report.md"
    names = {"entropy.png", "trajectory.png", "training.png", "comparison.png"}
    assert {name.removeprefix("figures/") for name in content["figures"]} == names
    for name in content["figures"]:
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
    text = (finished / "report.md").read_text()
    assert all(f"figures/{name}" in text for name in names)


def test_what_is_shown_and_published_holds_no_path(finished):
    """Only the settings say where things came from: without that no run could be resumed."""
    own = str(finished.parent)
    for stage in STAGES:
        content = {name: value for name, value in record(finished, RECORDS[stage][:-5]).items() if name != "settings"}
        assert own not in json.dumps(content), stage
    for path in [finished / "report.md", *(finished / "model").glob("*.json")]:
        assert own not in path.read_text(), path


# Other ways through the stages


def test_layers_as_given_skip_the_search(copy):
    rerun(copy, "select", "--layers", "3,0")
    content = record(copy, "selection")
    assert content["search"] == "given" and sorted(content["layers"]) == [0, 3]
    assert content["trace"] == [] and content["calibration"] is None and content["block_forwards"] == 0
    resume(copy, "--steps=2", "--decay=1", "--control=false")
    assert record(copy, "fold")["removed_attention_layers"] == [0, 3]
    assert record(copy, "metrics")["controls"][0]["name"] == "as given, masked, untrained"
    assert "dense_control" not in record(copy, "metrics")["models"]
    assert (copy / "report.md").stat().st_mtime > (copy / "metrics.json").stat().st_mtime


def test_without_training_the_result_is_the_masked_model(copy):
    rerun(copy, "dilute", "--steps=0")
    resume(copy)
    content = record(copy, "dilution")
    assert content["steps"] == 0 and content["log"] == [] and content["control"] is None
    assert content["feature_compensation"] is False and content["schedule"] == "none"
    metrics = record(copy, "metrics")
    masked, compressed = metrics["controls"][0], metrics["models"]["compressed"]
    assert [masked[name] for name in ("top1", "top5", "loss")] == [
        compressed[name] for name in ("top1", "top5", "loss")
    ]
    assert record(copy, "fold")["folded_attention_layers"] == []


def test_one_shot(copy):
    rerun(copy, "dilute", "--schedule=one_shot", "--steps=4", "--control=false")
    rerun(copy, "fold")
    content = record(copy, "dilution")
    assert content["feature_compensation"] is False
    assert {line["mask"] for line in content["log"] if "mask" in line} == {0.0}
    layers = content["layers"]
    before, after = (load_file(copy / name / "model.safetensors") for name in ("dense", "diluted"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    # Attention that is gone from the first step gets no gradient, and no decay either.
    assert not any(f"layers.{layer}.{part}." in name for name in moved for layer in layers for part in ("attention",))
    assert any(f"layers.{layers[0]}.mlp." in name for name in moved)
    assert record(copy, "fold")["bitwise_equal"] is True


def test_training_in_epochs(copy):
    rerun(copy, "dilute", "--epochs=2", "--unit=epoch", "--decay=2", "--logging_steps=6", "--control=false")
    content = record(copy, "dilution")
    assert content["steps"] == 12 and content["unit"] == "epoch"
    assert [line["mask"] for line in content["log"] if "loss" in line] == [1.0, 0.0]


@pytest.mark.parametrize("number", [0, 1])
def test_number_of_random_controls(copy, number):
    (copy / "metrics.json").unlink()
    resume(copy, "--stages=evaluate", f"--random_controls={number}")
    names = [line["name"] for line in record(copy, "metrics")["controls"]]
    assert names == [
        "NOSE, masked, untrained",
        "First-2, masked, untrained",
        *(number * ["random, masked, untrained"]),
    ]


def test_a_compressed_model_is_compressed_again(finished, tmp_path):
    removed = record(finished, "fold")["removed_attention_layers"]
    run(tmp_path / "again", model=finished / "model", dense_steps=0, steps=2, num_removed=1, control="false")
    content = record(tmp_path / "again", "fold")
    assert len(content["removed_attention_layers"]) == 3 and set(removed) < set(content["removed_attention_layers"])
    assert content["bitwise_equal"] is True
    assert record(tmp_path / "again", "prepare")["dense_training"] is None
    profile = record(tmp_path / "again", "profile")["layers"]
    assert [line["layer"] for line in profile if line["attention"]["branch"] is None] == removed


def test_public_names_take_the_place_of_paths(finished, tmp_path):
    ids = {"base_model_id": "someone/dense", "dataset_id": "someone/digits"}
    run(tmp_path / "run", model=finished / "dense", dense_steps=0, stages="prepare", **ids)
    content = record(tmp_path / "run", "prepare")
    assert content["model"]["source"] == content["model"]["base_model_id"] == "someone/dense"
    assert content["data"]["dataset"] == content["data"]["dataset_id"] == "someone/digits"


def test_a_stage_without_the_one_before_says_so(tmp_path):
    for stages, message in [
        ("profile", "dense holds no model"),
        ("select", "dense holds no model"),
        ("dilute", "Stage 'select' has left no selection.json"),
        ("fold", "diluted holds no model"),
        ("evaluate", "Stage 'dilute' has left no dilution.json"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(tmp_path / stages, stages=stages)
        assert not list((tmp_path / stages).glob("*.json"))


# What is not finite


@pytest.mark.parametrize("stage", ["profile", "select"])
def test_weights_that_are_not_finite_name_the_batch(copy, stage):
    path = copy / "dense" / "model.safetensors"
    state = load_file(path)
    state["vit.layers.1.mlp.fc1.bias"][0] = math.nan
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(FloatingPointError, match="batch 0: .*NaN"):
        rerun(copy, stage)


def test_training_that_diverges_leaves_no_record_and_no_model(tmp_path):
    with pytest.raises(FloatingPointError, match="step|not finite"):
        run(tmp_path / "run", stages="prepare", learning_rate=1e30, dense_steps=8)
    assert not (tmp_path / "run" / "dense").exists() and not (tmp_path / "run" / "prepare.json").exists()


# Models


def test_embedded_model_takes_the_class_names_of_the_data():
    names = ["zero", "one", "two"]
    model, processor = dense_model(Settings(dense_steps=1), names)
    assert model.config.id2label == dict(enumerate(names)) and model.config.num_hidden_layers == 12
    assert processor.size == {"height": 8, "width": 8}


def test_random_weights_are_not_compressed():
    with pytest.raises(ValueError, match="random weights: set dense_steps"):
        dense_model(Settings(), None)


def test_a_new_head_has_to_be_trained(finished):
    names = ["a", "b", "c"]
    with pytest.raises(ValueError, match="The model has 10 classes, the data set 3: the new head .* Set dense_steps"):
        dense_model(Settings(model=str(finished / "dense")), names)
    model, _ = dense_model(Settings(model=str(finished / "dense"), dense_steps=1), names)
    assert model.classifier.out_features == 3 and model.config.label2id == {"a": 0, "b": 1, "c": 2}


def test_a_model_without_a_head_gets_one_that_is_trained(finished, tmp_path):
    NoseViTModel.from_vit(str(finished / "dense")).save_pretrained(tmp_path / "headless")
    digits_processor().save_pretrained(tmp_path / "headless")
    names = [str(number) for number in range(10)]
    with pytest.raises(ValueError, match="The model has no head, the data set 10: .* Set dense_steps"):
        dense_model(Settings(model=str(tmp_path / "headless")), names)
    model, _ = dense_model(Settings(model=str(tmp_path / "headless"), dense_steps=1), names)
    assert model.config.id2label == dict(enumerate(names)) and model.classifier.out_features == 10


def test_half_a_checkpoint_is_compressed_in_float32(finished, tmp_path):
    NoseViTForImageClassification.from_pretrained(finished / "dense").half().save_pretrained(tmp_path / "half")
    digits_processor().save_pretrained(tmp_path / "half")
    model, _ = dense_model(Settings(model=str(tmp_path / "half")), None)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_classes_of_other_names_are_told(finished):
    model, _ = dense_model(Settings(model=str(finished / "dense")), None)
    own = [model.config.id2label[label] for label in range(10)]
    assert other_names(model.config, own) is None and other_names(model.config, None) is None
    note = other_names(model.config, [*own[:3], "three", *own[4:]])
    assert note == f"Class 3 is {own[3]!r} to the model, 'three' in the data set: its head and names are kept."


HALF = {"num_removed": None, "ratio": 0.5}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"random_controls": 7}, "random_controls must be at most 6, the sets of 2 among 4 layers, got 7"),
        ({**HALF, "decay": 0.1, "order": "ascending", "feature_compensation": "false"}, "each of 2 layers a turn"),
        ({**HALF, "decay": 2, "order": "ascending"}, "one step or epoch for M to fall"),
    ],
)
def test_what_cannot_be_is_refused_before_the_dense_training(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", **values)
    assert not (tmp_path / "run" / "training" / "dense").exists()


def test_the_search_does_as_it_is_told(copy, monkeypatch):
    """Every setting of it, by name, and none of them as it is by default."""
    told = {}

    def search(model, batches, count, **options):
        told.update(options)
        names = ("criterion", "search", "mask", "sign", "target")
        return Selection(layers=[1, 2], **{name: options[name] for name in names})

    monkeypatch.setattr(stages_module, "select_attention_layers", search)
    wanted = {
        "criterion": "loss",
        "search": "beam",
        "mask": "double",
        "sign": "signed",
        "target": "features",
        "beam_width": 2,
        "num_draws": 3,
        "confidence": 0.5,
        "stack_candidates": True,
        "state_cache_gib": 0.25,
    }
    flags = [f"--{name}={value}" for name, value in wanted.items()]
    rerun(copy, "select", *flags, "--seed=0", "--search_tail=true", "--search_bf16=true")
    assert told == wanted | {"seed": 0, "class_token_tail": True, "bf16": True}


# How many layers, and which


@pytest.mark.parametrize("ratio, count", [(0.25, 3), (0.3, 4), (0.4, 5), (0.5, 6), (0.75, 9), (0.05, 1)])
def test_ratio_is_rounded_to_layers(ratio, count):
    config = dense_model(Settings(dense_steps=1), None)[0].config
    assert num_layers(Settings(ratio=ratio), config) == count


@pytest.mark.parametrize(
    "values, message",
    [
        ({"ratio": 0.04}, "ratio 0.04 of 12 blocks rounds to no layer"),
        ({"ratio": 0.99}, r"num_removed must be in \[1, 11\], got 12.*class token sees no patch"),
        ({"num_removed": 12}, r"num_removed must be in \[1, 11\], got 12.*class token sees no patch"),
        ({}, "Say how much to remove: num_removed, ratio or layers"),
        ({"layers": "0,x"}, "layers must be indices such as 0,1,3,4,6, got '0,x'"),
        ({"layers": ""}, "layers must be indices"),
        ({"layers": "0,12"}, "12"),
        ({"layers": "-1"}, "-1"),
        ({"layers": "3,3"}, "twice|double|more than once|repeat"),
        ({"layers": ",".join(map(str, range(12)))}, "class token"),
    ],
)
def test_layers_that_cannot_go(values, message):
    config = dense_model(Settings(dense_steps=1), None)[0].config
    with pytest.raises(Exception, match=message) as caught:
        planned_layers(Settings(**values), config)
    assert type(caught.value).__name__ in ("ValueError", "StrictDataclassClassValidationError")


def test_layers_in_any_order():
    assert parse_layers("3, 1,0") == [3, 1, 0]
