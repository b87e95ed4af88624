"""LoRA on what is left of a model, with M in its adapter checkpoints."""

import json
import math
import shutil

import pytest
import tiny_training as tiny
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from tiny_run import record, resume, run
from transformers import TrainerCallback

from hf_nose.dilution import DilutionCallback
from hf_nose.lora import STATE, NosePeftModel, add_lora, lora_of, merge_lora
from hf_nose.modeling_nose_vit import NoseViTForImageClassification, nose_vit
from hf_nose.options import TrainingOptions
from hf_nose.surgery import fold
from hf_nose.training import fit


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]


def adapted(diluted=(), compensated=True, targets=TARGETS, dropout=0.0, seed=0):
    """A LoRA model whose update is not zero, as after training."""
    model = add_lora(tiny.model(diluted, compensated), 2, 4, dropout, targets)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return model.eval()


def pixels(count=5):
    return tiny.Images(count).pixel_values


@torch.no_grad()
def logits(model):
    return model.eval()(pixel_values=pixels()).logits


# What is trained


def test_only_lora_and_the_head_are_trained():
    model = add_lora(tiny.model(), 2, 4, 0.0, ["q_proj", "fc1"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    matrices = {f"vit.layers.{layer}.{place}" for layer in range(4) for place in ("attention.q_proj", "mlp.fc1")}
    lora = {f"base_model.model.{name}.lora_{part}.default.weight" for name in matrices for part in "AB"}
    head = {f"base_model.model.classifier.modules_to_save.default.{part}" for part in ("weight", "bias")}
    assert trained == lora | head
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes["base_model.model.vit.layers.0.mlp.fc1.lora_A.default.weight"] == (2, 12)


def test_at_first_the_model_is_the_one_before():
    before = logits(tiny.model())
    assert torch.equal(logits(add_lora(tiny.model(), 2, 4, 0.5, TARGETS)), before)


def test_the_settings_reach_the_matrices():
    settings = TrainingOptions(lora_rank=3, lora_alpha=5, lora_dropout=0.25, lora_targets="fc1, o_proj")
    model = lora_of(tiny.model(), settings)
    adapted_modules = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert {name.rpartition(".")[2] for name in adapted_modules} == {"fc1", "o_proj"}
    for module in adapted_modules.values():
        assert module.r["default"] == 3 and module.lora_dropout["default"].p == 0.25
        with torch.no_grad():
            module.lora_B["default"].weight.normal_()
        before, update = module.weight.clone(), module.lora_B["default"].weight @ module.lora_A["default"].weight
        module.merge()
        assert torch.allclose(module.weight - before, 5 / 3 * update, atol=1e-6)


@pytest.mark.parametrize("targets", [["nothing"], ["q_proj", "classifier"], ["query"], [], ["attention"]])
def test_targets_that_match_nothing_are_refused(targets):
    with pytest.raises(ValueError, match="lora_targets must be among fc1, fc2, k_proj, o_proj, q_proj, v_proj, got"):
        add_lora(tiny.model(), 2, 4, 0.0, targets)


def test_what_was_removed_gets_no_lora():
    model = tiny.model(diluted=[0, 2])
    model.set_mask(0.0)
    model = add_lora(fold(model), 2, 4, 0.0, ["q_proj"])
    found = {int(name.split("layers.")[1].split(".")[0]) for name, _ in model.named_parameters() if "lora" in name}
    assert found == {1, 3}


# Merging


@pytest.mark.parametrize("layers, compensated", [((), True), ((1, 3), True), ((1, 3), False)])
def test_merged_it_is_an_ordinary_model_of_equal_logits(tmp_path, layers, compensated):
    model = adapted(layers, compensated)
    if layers:
        nose_vit(model).set_mask(0.37)
    before = logits(model)
    assert (before - logits(tiny.model(layers, compensated))).abs().max() > 0.1
    merged = merge_lora(model)
    assert type(merged) is NoseViTForImageClassification
    assert list(merged.state_dict()) == list(tiny.model(layers, compensated).state_dict())
    assert all(parameter.requires_grad for parameter in merged.parameters())
    merged.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = NoseViTForImageClassification.from_pretrained(tmp_path)
    for found in (merged, loaded):
        assert torch.allclose(logits(found), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("compensated", [True, False])
def test_merged_at_zero_and_folded_it_is_plain(compensated):
    model = adapted((1, 3), compensated)
    nose_vit(model).set_mask(0.0)
    before = logits(model)
    folded = fold(merge_lora(model))
    assert not folded.config.diluted_attention_layers and folded.config.removed_attention_layers == [1, 3]
    assert torch.allclose(logits(folded), before, rtol=0, atol=1e-5)


def test_a_merge_of_nan_is_refused():
    model = adapted()
    with torch.no_grad():
        model.base_model.model.vit.layers[1].mlp.fc1.lora_B["default"].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        merge_lora(model)


# An adapter carries the diluted layers and M


@pytest.mark.parametrize("mask", [0.37, [0.2, 0.9], 0.0, 1.0])
@pytest.mark.parametrize("compensated", [True, False])
@pytest.mark.parametrize("is_diluted_before", [True, False])
def test_a_reloaded_adapter_is_the_same_function(tmp_path, mask, compensated, is_diluted_before):
    model = adapted((1, 3), compensated)
    nose_vit(model).set_mask(mask)
    model.save_pretrained(str(tmp_path))
    base = tiny.model((1, 3), compensated) if is_diluted_before else tiny.model()
    loaded = NosePeftModel.from_pretrained(base, str(tmp_path))
    assert nose_vit(loaded).mask_values() == nose_vit(model).mask_values()
    assert nose_vit(loaded).config.compensated_attention_layers == ([1, 3] if compensated else [])
    assert torch.equal(logits(loaded), logits(model))


def test_layers_with_and_without_compensation_in_one_adapter(tmp_path):
    base = tiny.model((1,), True)
    base.dilute([2], feature_compensation=False)
    model = add_lora(base, 2, 4, 0.0, TARGETS)
    nose_vit(model).set_mask([0.25, 0.5])
    model.save_pretrained(str(tmp_path))
    loaded = NosePeftModel.from_pretrained(tiny.model(), str(tmp_path))
    config = nose_vit(loaded).config
    assert (config.diluted_attention_layers, config.compensated_attention_layers) == ([1, 2], [1])
    assert torch.equal(logits(loaded), logits(model))


def test_peft_alone_would_lose_them(tmp_path):
    """The reason for a class of our own."""
    model = adapted((1, 3))
    nose_vit(model).set_mask(0.37)
    model.save_pretrained(str(tmp_path))
    assert (logits(PeftModel.from_pretrained(tiny.model(), str(tmp_path))) - logits(model)).abs().max() > 0.01


def test_an_adapter_of_other_layers_is_refused(tmp_path):
    adapted((1, 3)).save_pretrained(str(tmp_path))
    for other in (tiny.model((1, 2)), tiny.model((1, 3), compensated=False)):
        with pytest.raises(ValueError, match=r"belongs to a model with {'diluted': \[1, 3\]"):
            NosePeftModel.from_pretrained(other, str(tmp_path))


def test_an_adapter_that_plain_peft_wrote_is_refused(tmp_path):
    PeftModel(tiny.model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(str(tmp_path))
    with pytest.raises(OSError, match=STATE):
        NosePeftModel.from_pretrained(tiny.model(), str(tmp_path))


def test_what_is_written_names_no_path(tmp_path):
    base = tmp_path / "dense"
    tiny.model().save_pretrained(base)
    model = add_lora(NoseViTForImageClassification.from_pretrained(base), 2, 4, 0.0, TARGETS)
    model.save_pretrained(str(tmp_path / "adapter"))
    for path in (tmp_path / "adapter").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name


# Training


def trained(folder, steps=8, resume=False, **settings):
    torch.manual_seed(3)
    model = add_lora(tiny.model((1, 3), drop_path_rate=0.1), 2, 4, 0.1, TARGETS)
    args = tiny.arguments(folder, steps=8, lr_scheduler_type="constant", **settings)
    images = tiny.Images()
    callbacks = [DilutionCallback(decay=0.75)]
    if steps < 8:
        callbacks.append(Stop(steps))
    try:
        fit(model, images, images, args, callbacks=callbacks, resume=resume)
    except RuntimeError:
        assert steps < 8
    return model


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_training_moves_lora_and_nothing_frozen(tmp_path, gradient_checkpointing):
    before = tiny.weights(add_lora(tiny.model((1, 3)), 2, 4, 0.1, TARGETS))
    model = trained(tmp_path, gradient_checkpointing=gradient_checkpointing)
    after = tiny.weights(model)
    moved = {name for name in after if not torch.equal(before[name], after[name]) and "lora_A" not in name}
    assert moved >= {name for name in after if "lora_B" in name or "modules_to_save" in name}
    frozen = {name for name in after if not any(part in name for part in ("lora_", "modules_to_save", "mask"))}
    assert len(frozen) > 40 and not moved & frozen
    assert nose_vit(model).is_mask_zero


@pytest.mark.parametrize("stopped", [3, 7])
def test_a_resume_restores_the_adapter_and_m_exactly(tmp_path, stopped):
    whole = tiny.weights(trained(tmp_path / "whole"))
    trained(tmp_path / "parts", steps=stopped)
    checkpoint = tmp_path / "parts" / f"checkpoint-{3 * (stopped // 3)}"
    saved = json.loads((checkpoint / STATE).read_text())
    assert saved["diluted"] == [1, 3]
    base = tiny.model()
    reloaded = NosePeftModel.from_pretrained(base, str(checkpoint))
    assert nose_vit(reloaded).mask_values() == saved["mask"] and 0 <= saved["mask"][0] < 1
    assert tiny.differing(tiny.weights(trained(tmp_path / "parts", resume=True)), whole) == []


# In the main job


@pytest.mark.slow
@pytest.mark.parametrize("compensation", ["true", "false"])
def test_the_main_job_dilutes_with_lora_and_leaves_a_plain_model(tmp_path, capsys, compensation):
    folder = tmp_path / "run"
    run(folder, control="true", lora_rank=2, feature_compensation=compensation, random_controls=0)
    found = record(folder, "dilution")
    # Two matrices of rank 2 beside the six of each of 4 blocks, and the head.
    count = 2 * 4 * (2 * (12 + 24) + 4 * (12 + 12)) + 10 * 12 + 10
    assert found["trainable_parameters"] == count == found["control"]["trainable_parameters"]
    assert f"Trainable parameters: {count:,} of" in capsys.readouterr().out
    assert record(folder, "fold")["bitwise_equal"] is True
    dense, after = (NoseViTForImageClassification.from_pretrained(folder / name) for name in ("dense", "model"))
    assert after.config.removed_attention_layers == sorted(found["layers"])
    assert not any("lora" in name for name in after.state_dict())
    for name in ("diluted", "dense_control"):
        arm = NoseViTForImageClassification.from_pretrained(folder / name).state_dict()
        moved = {key for key, tensor in dense.state_dict().items() if not torch.equal(tensor, arm[key])}
        trained = ("_proj.weight", "fc1.weight", "fc2.weight", "classifier.weight", "classifier.bias")
        assert moved == {key for key in dense.state_dict() if key.endswith(trained)}
    state = json.loads((folder / "training" / "dilution" / "checkpoint-4" / STATE).read_text())
    assert state["diluted"] == sorted(found["layers"])


@pytest.mark.slow
def test_a_main_job_with_lora_that_was_stopped_ends_with_the_same_weights(tmp_path):
    extra = {"lora_rank": 2, "lora_dropout": 0.1, "stages": "prepare,select,dilute,fold", "control": "false"}
    run(tmp_path / "whole", **extra)
    run(tmp_path / "parts", **extra)
    parts = tmp_path / "parts"
    for name in ("model", "diluted", "training/dilution/checkpoint-8"):
        shutil.rmtree(parts / name)
    for name in ("dilution.json", "fold.json"):
        (parts / name).unlink()
    resume(parts)
    assert record(parts, "dilution")["resumed_from"] == "checkpoint-4"
    ends = [NoseViTForImageClassification.from_pretrained(tmp_path / name / "model") for name in ("whole", "parts")]
    assert tiny.differing(*map(tiny.weights, ends)) == []
