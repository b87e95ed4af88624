"""Learning rate by batch size, warm-up, optimizer; and what is refused before anything is trained."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_training import Images, arguments, model, weights
from transformers.trainer_pt_utils import get_parameter_names

from hf_nose.arguments import images_per_step, training_arguments, training_words
from hf_nose.command_line import parse_settings
from hf_nose.dilution import DilutionCallback
from hf_nose.optimization import check_data_size, check_precision, peak_learning_rate
from hf_nose.settings import Settings
from hf_nose.training import NoseTrainer


def trainer(folder, **settings):
    found = model([1])
    made = NoseTrainer(model=found, args=arguments(folder, **settings), train_dataset=Images(), eval_dataset=Images(6))
    made.create_optimizer_and_scheduler(made.args.max_steps)
    return made


def rates(made, steps):
    """The learning rate of every step."""
    found = []
    for _ in range(steps):
        found.append(made.optimizer.param_groups[0]["lr"])
        made.optimizer.step()
        made.lr_scheduler.step()
    return found


# Learning rate


@pytest.mark.parametrize("batch, accumulation, expected", [(512, 1, 5e-4), (128, 1, 1.25e-4), (128, 8, 1e-3)])
def test_a_base_learning_rate_grows_with_the_global_batch(tmp_path, batch, accumulation, expected):
    sizes = {"batch_size": batch, "gradient_accumulation_steps": accumulation}
    args = arguments(tmp_path, base_learning_rate=5e-4, **sizes)
    assert images_per_step(args) == batch * accumulation
    assert args.learning_rate == pytest.approx(expected)
    plain = arguments(tmp_path, learning_rate=0.1, **sizes)
    assert plain.learning_rate == 0.1


def test_a_base_learning_rate_grows_with_the_processes():
    """The paper's 8 GPUs of 128 images, and the authors' scripts' 8 of 256."""
    assert peak_learning_rate(9.9, 5e-4, 1e-5, 8 * 128) == pytest.approx(1e-3)
    assert peak_learning_rate(9.9, 5e-4, 1e-5, 8 * 256) == pytest.approx(2e-3)


def test_scaling_is_said_in_words(tmp_path):
    settings = Settings(base_learning_rate=5e-4, batch_size=128, gradient_accumulation_steps=2, max_grad_norm=0)
    words = training_words(settings, training_arguments(settings, tmp_path, 10, None, on_cpu=True))
    assert "learning rate 0.00025 = 0.0005 x 256 images a step / 512" in words and "no clipping" in words
    settings = Settings(learning_rate=0.1, optimizer="sgd", warmup=3, warmup_unit="step", min_learning_rate=0)
    words = training_words(settings, training_arguments(settings, tmp_path, 10, None, on_cpu=True))
    assert words == (
        "sgd, learning rate 0.1 as given, not scaled by the 64 images a step; warm-up 3 (steps), then a cosine to 0; "
        "gradients cut at norm 1"
    )


def test_a_floor_above_the_peak_is_refused(tmp_path):
    with pytest.raises(ValueError, match="min_learning_rate 0.001 is above the peak: learning rate 0.0001 as given"):
        arguments(tmp_path, learning_rate=1e-4, min_learning_rate=1e-3)
    with pytest.raises(ValueError, match="above the peak: learning rate 1e-05 = 0.00128 x 4 images a step / 512"):
        arguments(tmp_path, base_learning_rate=1.28e-3, min_learning_rate=1e-3)


def test_one_learning_rate_is_given():
    with pytest.raises(ValueError, match="Give one of learning_rate and base_learning_rate"):
        Settings(learning_rate=0.5, base_learning_rate=5e-4)


def test_a_learning_rate_typed_takes_the_place_of_the_recipes_base():
    settings = parse_settings(["--recipe", "deit-t-nose25", "--learning_rate", "1e-4"])
    assert (settings.learning_rate, settings.base_learning_rate) == (1e-4, None)
    settings = parse_settings(["--recipe", "cifar", "--base_learning_rate", "1e-3"])
    assert (settings.learning_rate, settings.base_learning_rate) == (Settings.learning_rate, 1e-3)


# Schedule


def test_cosine_falls_to_the_floor_after_the_warm_up(tmp_path):
    made = trainer(tmp_path, steps=100, warmup=10, warmup_unit="step", learning_rate=1e-2, min_learning_rate=1e-4)
    found = rates(made, 101)
    assert found[:11] == pytest.approx([1e-3 * step for step in range(11)])
    expected = [1e-4 + (1e-2 - 1e-4) * 0.5 * (1 + math.cos(math.pi * step / 90)) for step in range(91)]
    assert found[10:] == pytest.approx(expected)


@pytest.mark.parametrize(
    "settings, steps", [({"warmup": 0.2}, 10), ({"warmup": 7, "warmup_unit": "step"}, 7), ({"warmup": 0}, 0)]
)
def test_warm_up_in_steps_and_as_a_share(tmp_path, settings, steps):
    assert arguments(tmp_path, steps=50, **settings).get_warmup_steps(50) == steps


def test_warm_up_in_epochs_is_their_share_of_the_steps(tmp_path):
    settings = Settings(epochs=400.0, warmup=5, warmup_unit="epoch", unit="epoch", decay=300)
    args = training_arguments(settings, tmp_path, 0, settings.epochs, on_cpu=True)
    assert args.get_warmup_steps(400 * 1251) == pytest.approx(5 * 1251, abs=1)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"warmup": 5}, r"warmup must be in \[0, 1\), a share of the steps, got 5"),
        ({"warmup": -0.1}, r"warmup must be in \[0, 1\)"),
        ({"warmup": 2.5, "warmup_unit": "step"}, "warmup must be a whole number of steps, 0 or more, got 2.5"),
        ({"warmup": -1, "warmup_unit": "step"}, "whole number of steps"),
        ({"warmup": 5, "warmup_unit": "epoch", "steps": 50}, "warmup_unit=epoch needs the length .* in epochs"),
        ({"warmup": 5, "warmup_unit": "epoch", "epochs": 9.0, "dense_steps": 5}, "warmup_unit=epoch needs"),
        ({"warmup": 5, "warmup_unit": "epoch", "epochs": 5.0}, r"warmup must be in \[0, 5\), the epochs of training"),
        ({"rand_augment": 30}, r"rand_augment must be in \[0, 10\], got 30"),
        ({"random_erasing": -0.1}, r"random_erasing must be in \[0, 1\], got -0.1"),
        ({"color_jitter": 2}, r"color_jitter must be in \[0, 1\], got 2"),
        ({"mixup": -1}, "mixup must be 0 or more, got -1"),
        ({"cutmix": math.inf}, "cutmix must be 0 or more, got inf"),
        ({"max_grad_norm": math.nan}, "max_grad_norm must be 0 or more, got nan"),
        ({"base_learning_rate": -1}, "base_learning_rate must be 0 or more, got -1"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate must be in \[0, 0.99\], got 1.0"),
    ],
)
def test_settings_of_training_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**settings)


# Optimizer


def test_adamw_has_the_published_betas(tmp_path):
    optimizer = trainer(tmp_path, weight_decay=0.05).optimizer
    assert isinstance(optimizer.optimizer if hasattr(optimizer, "optimizer") else optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_weight_decay_spares_norms_biases_class_token_and_positions(tmp_path, optimizer):
    made = trainer(tmp_path, weight_decay=0.05, optimizer=optimizer)
    decayed, spared = made.optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    names = {id(parameter): name for name, parameter in made.model.named_parameters()}
    without = {names[id(parameter)] for parameter in spared["params"]}
    norms = set(names.values()) - set(get_parameter_names(made.model, [torch.nn.LayerNorm]))
    biases = {name for name in names.values() if name.endswith("bias")}
    assert norms and without == norms | biases | {
        "vit.embeddings.cls_token",
        "vit.embeddings.position_embeddings",
    }


def test_sgd_has_momentum(tmp_path):
    optimizer = trainer(tmp_path, optimizer="sgd", learning_rate=0.1).optimizer
    assert isinstance(optimizer, torch.optim.SGD)
    assert {group["momentum"] for group in optimizer.param_groups} == {0.9}


@pytest.mark.parametrize("limit, expected", [(0.0, None), (1e-3, 1e-3), (1e3, None)])
def test_gradients_are_cut_to_the_norm_or_not_at_all(tmp_path, limit, expected):
    """One step of SGD without momentum's history or decay moves the weights by rate x gradient."""

    def moved(folder, limit):
        found = model().double()
        options = {"optimizer": "sgd", "learning_rate": 1.0, "min_learning_rate": 0, "warmup": 0, "weight_decay": 0}
        args = arguments(folder, steps=1, max_grad_norm=limit, **options)
        before = weights(found).values()
        NoseTrainer(model=found, args=args, train_dataset=Images(4, torch.float64), eval_dataset=Images(6)).train()
        return math.hypot(*(float((a - b).norm()) for a, b in zip(weights(found).values(), before, strict=True)))

    free = moved(tmp_path / "free", 0.0)
    assert free > 1
    assert moved(tmp_path / "cut", limit) == pytest.approx(free if expected is None else expected, rel=1e-4)


# Stochastic depth


@pytest.mark.parametrize("schedule, rates", [("linear", [0, 0.1, 0.2, 0.3]), ("constant", [0.3] * 4)])
def test_stochastic_depth_of_the_settings_reaches_the_model(tmp_path, schedule, rates):
    from tiny_run import tiny_model

    from hf_nose.plan import dense_model

    settings = Settings(model=str(tiny_model(tmp_path / "model")), dense_steps=1, drop_path_rate=0.3)
    settings.drop_path_schedule = schedule
    found, _ = dense_model(settings, ["a", "b"])
    assert [layer.drop_path.drop_prob for layer in found.vit.layers] == pytest.approx(rates)


# What is refused


def test_half_precision_on_a_cpu(tmp_path):
    cpu = torch.device("cpu")
    check_precision(cpu, bf16=True, fp16=False)
    with pytest.raises(ValueError, match="fp16 trains on a GPU only: on a CPU nothing scales the loss"):
        check_precision(cpu, bf16=False, fp16=True)
    args = arguments(tmp_path)
    args.fp16 = True
    with pytest.raises(ValueError, match="fp16 trains on a GPU only"):
        NoseTrainer(model=model(), args=args, train_dataset=Images(), eval_dataset=Images(6))


def test_bf16_on_a_gpu_that_would_emulate_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    # What torch answers for a GPU before Ampere.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(ValueError, match=r"bf16: this GPU \(Tesla V100\) has no bfloat16"):
        check_precision(torch.device("cuda"), bf16=True, fp16=False)
    check_precision(torch.device("cuda"), bf16=False, fp16=True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    check_precision(torch.device("cuda"), bf16=True, fp16=False)


def test_bf16_trains_on_a_cpu(tmp_path):
    made = trainer(tmp_path, steps=2, bf16=True, learning_rate=1e-3)
    made.train()
    assert all(parameter.dtype == torch.float32 for parameter in made.model.parameters())
    assert all(parameter.isfinite().all() for parameter in made.model.parameters())


@given(images=st.integers(0, 100), batch=st.integers(1, 100))
def test_fewer_images_than_a_step_takes(images, batch):
    if images >= batch:
        check_data_size(images, batch)
    else:
        with pytest.raises(ValueError, match=f"have {images} images, fewer than the {batch} of one step"):
            check_data_size(images, batch)


# torch.compile


def test_compiled_training_gives_the_same_losses_and_plain_checkpoints(tmp_path):
    """With the backend that generates no code: inductor, the default, takes a minute for this toy."""
    assert arguments(tmp_path, torch_compile=True).torch_compile_backend == "inductor"

    def run(folder, **settings):
        found = model([1, 2])
        options = {"callbacks": [DilutionCallback(decay=0.5)], "train_dataset": Images(24), "eval_dataset": Images(8)}
        made = NoseTrainer(model=found, args=arguments(folder, steps=6, **settings), **options)
        made.train()
        return [line["loss"] for line in made.state.log_history if "loss" in line], made

    plain, _ = run(tmp_path / "plain")
    compiled, made = run(tmp_path / "compiled", torch_compile=True, torch_compile_backend="eager")
    assert type(made.model_wrapped).__name__ == "OptimizedModule"
    assert compiled == pytest.approx(plain, rel=1e-5)
    # The mask had fallen to 0 in the compiled model, too.
    saved = load_file(tmp_path / "compiled" / "checkpoint-6" / "model.safetensors")
    assert saved.keys() == weights(model([1, 2])).keys() and saved["vit.dilution_mask"].tolist() == [0.0, 0.0]
