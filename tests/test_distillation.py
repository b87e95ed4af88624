"""Distillation: what the losses are, when they are nothing, and who may teach whom."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import NUM_BLOCKS, Images, arguments, differing, model, weights
from transformers import TrainerCallback

from hf_nose.augmentation import BatchAugmentation
from hf_nose.configuration_nose_vit import NoseViTConfig
from hf_nose.dilution import DilutionCallback
from hf_nose.distillation import Distiller, describe, feature_loss, soft_logit_loss
from hf_nose.modeling_nose_vit import NoseViTForImageClassification, nose_vit
from hf_nose.surgery import fold
from hf_nose.training import NoseTrainer, fit


EVERYTHING = {"weight": 0.5, "features": "both", "blocks": range(NUM_BLOCKS)}


def added(distiller, student, pixel_values=None):
    """What the distiller adds to the loss of each image."""
    pixel_values = Images(6, student.dtype).pixel_values if pixel_values is None else pixel_values
    return distiller(nose_vit(student), student(pixel_values, **distiller.forward_options), pixel_values)


def trainer(folder, student, distiller, **settings):
    return NoseTrainer(
        model=student,
        args=arguments(folder, **settings),
        distiller=distiller,
        train_dataset=Images(),
        eval_dataset=Images(6),
    )


# --- the losses ------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 99), temperature=st.floats(0.25, 16), classes=st.integers(2, 7), scale=st.floats(1e-3, 30))
def test_soft_logits_are_hintons(seed, temperature, classes, scale):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, 5, classes, generator=generator, dtype=torch.float64)
    given_, learned = (F.softmax(logits / temperature, dim=-1) for logits in (teacher, student))
    expected = temperature**2 * (given_ * (given_.log() - learned.log())).sum(-1)
    found = soft_logit_loss(student, teacher, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert (found >= -1e-9).all()
    assert torch.equal(soft_logit_loss(teacher, teacher, temperature), torch.zeros(5, dtype=torch.float64))
    # The teacher's constant is of no consequence.
    torch.testing.assert_close(soft_logit_loss(student, teacher + 3, temperature), found, rtol=1e-6, atol=1e-9)


def test_the_square_of_the_temperature_keeps_the_gradient():
    """At high temperatures the gradient is that of half the squared distance of centred logits, over the classes."""
    student, teacher = torch.randn(2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    student.requires_grad_()
    soft_logit_loss(student, teacher, 1e4).sum().backward()
    difference = student.detach() - teacher
    torch.testing.assert_close(
        student.grad, (difference - difference.mean(-1, keepdim=True)) / 5, rtol=1e-3, atol=1e-5
    )


def test_features_have_no_unit():
    teacher = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    student = teacher + torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
    found = feature_loss(student, teacher)
    by_hand = [
        sum(
            float(((student[image, token] - teacher[image, token]) ** 2).sum() / (teacher[image, token] ** 2).sum())
            for token in range(4)
        )
        / 4
        for image in range(3)
    ]
    assert found.tolist() == pytest.approx(by_hand, rel=1e-5)
    assert torch.equal(feature_loss(8 * student, 8 * teacher), found)
    assert feature_loss(teacher, teacher).tolist() == [0.0] * 3
    # A student that has learnt nothing and gives nothing.
    assert feature_loss(torch.zeros_like(teacher), teacher).tolist() == [1.0] * 3


@pytest.mark.parametrize("loss", [lambda a, b: soft_logit_loss(a, b, 2.0), feature_loss])
def test_losses_of_half_precision_are_taken_in_float32(loss):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 50, generator=generator).bfloat16()
    found = loss(student, teacher)
    assert found.dtype == torch.float32
    assert torch.equal(found, loss(student.float(), teacher.float()))


def test_weights_mix_the_parts():
    student, teacher = model([1], seed=0), model(seed=1)
    student.set_mask(0.5)

    def of(**options):
        return added(Distiller(copy.deepcopy(teacher), **options), student)

    soft = of(weight=1.0, temperature=3.0)
    pixel_values = Images(6).pixel_values
    torch.testing.assert_close(soft, soft_logit_loss(student(pixel_values).logits, teacher(pixel_values).logits, 3.0))
    parts = {
        (kind, block): of(weight=0.0, features=kind, blocks=[block])
        for kind in ("class_token", "patches")
        for block in (0, 2)
    }
    assert len({tuple(part.tolist()) for part in parts.values()}) == 4
    mean = sum(parts.values()) / 4
    found = of(weight=0.25, temperature=3.0, features="both", blocks=[2, 0], feature_weight=10.0)
    torch.testing.assert_close(found, 0.25 * soft + 10.0 * mean)


def test_features_are_those_behind_the_block():
    student, teacher = model(seed=0), model(seed=1)
    pixel_values = Images(6).pixel_values
    seen = []
    for found in (student, teacher):
        found.vit.layers[2].register_forward_hook(lambda module, inputs, output: seen.append(output.detach().clone()))
    one = added(Distiller(teacher, weight=0.0, features="class_token", blocks=[2]), student)
    torch.testing.assert_close(one, feature_loss(seen[0][:, :1], seen[1][:, :1]))
    both = added(Distiller(teacher, weight=0.0, features="patches", blocks=[2]), student)
    torch.testing.assert_close(both, feature_loss(seen[0][:, 1:], seen[1][:, 1:]))
    # No state but the chosen one is kept.
    options = Distiller(teacher, features="patches", blocks=[2]).forward_options
    assert [state is None for state in student(pixel_values, **options).hidden_states] == [True] * 3 + [False, True]
    assert Distiller(teacher).forward_options == {}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_feature_teaches_what_is_below_it(checkpointing):
    student, teacher = model([1, 2]), model(seed=1)
    student.set_mask(0.5)
    if checkpointing:
        student.activation_checkpointing_enable()
    added(Distiller(teacher, weight=0.0, features="patches", blocks=[1]), student.train()).sum().backward()
    taught = {name for name, parameter in student.named_parameters() if parameter.grad.count_nonzero()}
    below = ("vit.embeddings.", "vit.layers.0.", "vit.layers.1.")
    assert taught == {name for name, _ in student.named_parameters() if name.startswith(below)}
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_no_gradient_goes_through_the_teacher():
    student, distiller = model(), Distiller(model(seed=1), **EVERYTHING)
    pixel_values = Images(6).pixel_values
    output = student(pixel_values, **distiller.forward_options)
    asking = pixel_values.clone().requires_grad_()
    distiller(nose_vit(student), output, asking).sum().backward()
    assert asking.grad is None


# --- a teacher equal to the student ----------------------------------------------------------------------------------


def zero(distiller, student, **options):
    return torch.equal(added(distiller, student, **options), torch.zeros(6, dtype=student.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_teacher_that_is_the_dense_student_teaches_nothing(dtype):
    student = model().to(dtype)
    assert zero(Distiller(copy.deepcopy(student), **EVERYTHING), student)


@pytest.mark.parametrize("compensated", [False, True])
def test_a_student_at_the_start_of_its_dilution_is_its_dense_teacher(compensated):
    student = model([0, 2], compensated)
    assert student.vit.mask_values() == [1.0, 1.0]
    assert zero(Distiller(model(), **EVERYTHING), student)
    student.set_mask(0.9)
    assert (added(Distiller(model(), **EVERYTHING), student) > 0).all()


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("mask", [0.5, [0.3, 0.8], [0.0, 0.7], 0.0])
def test_half_diluted_a_student_is_its_own_copy(compensated, mask):
    student = model([0, 2], compensated)
    student.set_mask(mask)
    assert zero(Distiller(copy.deepcopy(student), **EVERYTHING), student.train())


def test_a_folded_teacher_is_the_unfolded_student():
    """Logits and streams of the two are equal bit for bit, and so is what the streams are divided by."""
    student = model([0, 2])
    student.set_mask(0.0)
    assert zero(Distiller(fold(student), **EVERYTHING), student)
    assert zero(Distiller(copy.deepcopy(student), **EVERYTHING), fold(student))


def plain_twin(student):
    """A dense ViT without compensation and attention where `student` has grown, all later branches made smaller."""
    vit = nose_vit(student)
    masks = dict(zip(vit.config.diluted_attention_layers, vit.mask_values(), strict=True))
    twin, growth = model().to(student.dtype), 1.0
    twin.load_state_dict({name: tensor for name, tensor in student.state_dict().items() if "mask" not in name})
    with torch.no_grad():
        for layer, block in enumerate(twin.vit.layers):
            if layer in masks:
                block.attention.o_proj.weight.zero_()
                block.attention.o_proj.bias.zero_()
                growth *= 2 - masks[layer]
            for linear in (block.attention.o_proj, block.mlp.fc2):
                linear.weight.div_(growth)
                linear.bias.div_(growth)
    return twin


@pytest.mark.parametrize("mask", [0.0, 1.0, 0.5, [0.25, 0.75]])
def test_a_stream_is_compared_without_what_compensation_made_it_grow_by(mask):
    """Where the masked attention gives nothing, a compensated stream is the plain one times the product of 2 - M."""
    torch.manual_seed(0)
    student = model([0, 2]).double()
    student.set_mask(mask)
    for module in student.modules():
        if isinstance(module, torch.nn.LayerNorm):
            # Any eps would be another one in a stream of another scale.
            module.eps = 0.0
    for layer in (0, 2):
        torch.nn.init.zeros_(student.vit.layers[layer].attention.o_proj.weight)
        torch.nn.init.zeros_(student.vit.layers[layer].attention.o_proj.bias)
    teacher = plain_twin(student)
    for module in teacher.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 0.0
    pixel_values = Images(6, torch.float64).pixel_values
    grown = student(pixel_values, output_hidden_states=True).hidden_states
    plain = teacher(pixel_values, output_hidden_states=True).hidden_states
    first, second = student.vit.mask_values()
    for block, factor in enumerate([2 - first, 2 - first, (2 - first) * (2 - second), (2 - first) * (2 - second)]):
        torch.testing.assert_close(grown[block + 1], factor * plain[block + 1])
    assert added(Distiller(teacher, **EVERYTHING), student).max() < 1e-12
    # The growth of a teacher is divided out as well.
    assert added(Distiller(student, **EVERYTHING), teacher).max() < 1e-12


@pytest.mark.parametrize("bf16", [False, True])
def test_in_training_a_teacher_equal_to_the_student_adds_exactly_nothing(tmp_path, bf16):
    """In bfloat16 too: the teacher computes in the precision that the student trains in."""
    losses, options = [], {"steps": 1, "bf16": bf16, "label_smoothing": 0.0}
    distiller = Distiller(model(), **{**EVERYTHING, "weight": 0.25})
    # At M = 1.
    run, alone = (
        trainer(tmp_path / name, model([1]), teacher, **options)
        for name, teacher in (("distilled", Spy(losses, distiller)), ("alone", None))
    )
    run.train()
    assert len(losses) == 1 and torch.equal(losses[0], torch.zeros(4))
    alone.train()
    found, expected = (each.state.log_history[0]["loss"] for each in (run, alone))
    assert found == pytest.approx(0.75 * expected, rel=1e-6)


class Spy:
    """A distiller whose losses are kept."""

    def __init__(self, losses, distiller):
        self.losses, self.distiller = losses, distiller

    def __call__(self, *args):
        loss = self.distiller(*args)
        self.losses.append(loss.detach())
        return loss

    def __getattr__(self, name):
        return getattr(self.distiller, name)


# --- in training -----------------------------------------------------------------------------------------------------


def teach(folder, student, distiller, steps=8, resume=False, callbacks=(), augmentation=None, **settings):
    diluted = nose_vit(student).config.diluted_attention_layers
    callbacks = [*([DilutionCallback()] if diluted else []), *callbacks]
    images, evaluation = (Images(count, student.dtype) for count in (22, 6))
    args = arguments(folder, steps, **settings)
    return fit(
        student,
        images,
        evaluation,
        args,
        augmentation=augmentation,
        callbacks=callbacks,
        resume=resume,
        distiller=distiller,
    )


def test_the_teacher_is_left_as_it_is_and_is_in_no_checkpoint(tmp_path):
    teacher, student = model(seed=1, drop_path_rate=0.5).train(), model([1])
    before = weights(teacher)
    distiller = Distiller(teacher, **EVERYTHING)
    assert not teacher.training
    run = trainer(tmp_path, student, distiller, steps=4)
    run.add_callback(DilutionCallback())
    run.train()
    assert not teacher.training and not any(parameter.requires_grad for parameter in teacher.parameters())
    assert differing(weights(teacher), before) == []
    held = {id(parameter) for group in run.optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in student.parameters()}
    saved = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    trainer(tmp_path / "alone", model(), None, steps=4).train()
    assert saved == {path.name for path in (tmp_path / "alone" / "checkpoint-4").iterdir()}


def test_a_distilled_student_comes_near_its_teacher(tmp_path):
    teacher, student = model(seed=1), model(seed=2)
    measure = Distiller(copy.deepcopy(teacher), 1.0)
    before = float(added(measure, student).detach().mean())
    options = {"steps": 60, "learning_rate": 1e-2, "save_steps": 60, "eval_steps": 60, "label_smoothing": 0.0}
    teach(tmp_path, student, Distiller(teacher, 1.0), **options)
    assert float(added(measure, student.eval()).detach().mean()) < 0.1 * before


def test_only_the_training_loss_is_distilled(tmp_path):
    student, distiller = model(seed=2), Distiller(model(seed=1), **EVERYTHING)
    run = trainer(tmp_path, student, distiller)
    images = Images(6)
    with torch.no_grad():
        expected = F.cross_entropy(
            student(images.pixel_values).logits, torch.tensor(images.labels), label_smoothing=0.1
        )
    assert run.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("number", [None, 6, torch.tensor(6)])
def test_the_loss_is_that_of_the_docstring(tmp_path, label_smoothing, number):
    student, teacher, images = model([1], seed=2).double(), model(seed=1).double(), Images(6, torch.float64)
    student.set_mask(0.5)
    options = {"temperature": 3.0, "features": "both", "blocks": [1, 3], "feature_weight": 4.0}
    run = trainer(tmp_path, student.train(), Distiller(teacher, 0.25, **options), label_smoothing=label_smoothing)
    inputs = {"pixel_values": images.pixel_values, "labels": torch.tensor(images.labels)}
    outputs, given_ = (each(images.pixel_values, output_hidden_states=True) for each in (student, teacher))
    hard = F.cross_entropy(outputs.logits, inputs["labels"], label_smoothing=label_smoothing)
    soft = soft_logit_loss(outputs.logits, given_.logits, 3.0).mean()
    distances = [
        feature_loss(outputs.hidden_states[block + 1][:, tokens] / 1.5, given_.hidden_states[block + 1][:, tokens])
        for block in (1, 3)
        for tokens in (slice(1), slice(1, None))
    ]
    expected = 0.75 * hard + 0.25 * soft + 4.0 * sum(distances).mean() / 4
    loss, found = run.compute_loss(student, dict(inputs), return_outputs=True, num_items_in_batch=number)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert torch.equal(found.logits, outputs.logits)
    assert torch.equal(run.compute_loss(student, dict(inputs), num_items_in_batch=number), loss)


def test_loss_and_weights_do_not_depend_on_gradient_accumulation(tmp_path):
    def run(batch_size, accumulation):
        student = model([1], seed=2).double()
        options = {"optim": "sgd", "learning_rate": 0.1, "batch_size": batch_size}
        folder = tmp_path / str(accumulation)
        distiller = Distiller(model(seed=1).double(), **EVERYTHING)
        # 22 images: the last step of an epoch has six.
        record = teach(folder, student, distiller, gradient_accumulation_steps=accumulation, **options)
        return [line["loss"] for line in record["log"] if "loss" in line], weights(student)

    (one, expected), *others = (run(*sizes) for sizes in ((8, 1), (4, 2), (2, 4)))
    for losses, found in others:
        assert losses == pytest.approx(one, rel=1e-6)
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-12, msg=name)


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    """The distiller holds no state, so a new one goes on where the old one was killed."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    def run(folder, **options):
        student = model([1, 2], drop_path_rate=0.2, seed=2)
        augmentation = BatchAugmentation(seed=3, shift=1, flip=True)
        options |= {"gradient_accumulation_steps": 2, "learning_rate": 1e-2, "augmentation": augmentation}
        record = teach(folder, student, Distiller(model(seed=1), **EVERYTHING), **options)
        return weights(student), [line["loss"] for line in record["log"] if "loss" in line]

    expected, losses = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", callbacks=[Stop()])
    found, again = run(tmp_path / "killed", resume=True)
    assert differing(found, expected) == [] and again == losses


# --- who may teach whom ----------------------------------------------------------------------------------------------


def other(**fields):
    config = copy.deepcopy(model().config)
    for name, value in fields.items():
        setattr(config, name, value)
    return NoseViTForImageClassification(NoseViTConfig.from_dict(config.to_dict()))


def names(*words):
    return {"id2label": dict(enumerate(words)), "label2id": {word: number for number, word in enumerate(words)}}


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({"num_labels": 5}, {}, "the same classes: the teacher has 5, the student 3. Train the teacher"),
        ({"image_size": 16}, {}, "the same image_size to be distilled from, got 16 and 8"),
        ({"hidden_size": 24}, EVERYTHING, "the same hidden_size to be compared by features 'both', got 24 and 12"),
        ({"patch_size": 2}, EVERYTHING, "the same patch_size to be compared by features 'both', got 2 and 4"),
        ({"num_hidden_layers": 5}, EVERYTHING, "the same num_hidden_layers to be compared .*, got 5 and 4"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(tmp_path, fields, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, model(), Distiller(other(**fields), **options))


@pytest.mark.parametrize("fields", [{"hidden_size": 24}, {"patch_size": 2}, {"num_hidden_layers": 5}])
def test_a_teacher_of_logits_alone_may_be_of_another_size(tmp_path, fields):
    trainer(tmp_path, model([1]), Distiller(other(**fields)))


def test_classes_are_compared_by_name_where_they_have_names(tmp_path):
    student, teacher = other(**names("cat", "dog", "owl")), other(**names("cat", "owl", "dog"))
    with pytest.raises(ValueError, match="class 1 is 'owl' to the teacher and 'dog' to the student"):
        trainer(tmp_path, student, Distiller(teacher))
    trainer(tmp_path, student, Distiller(other(**names("cat", "dog", "owl"))))
    # LABEL_0 names nothing.
    for pair in ((student, model()), (model(), teacher)):
        trainer(tmp_path, pair[0], Distiller(pair[1]))


def test_a_student_is_not_its_own_teacher(tmp_path):
    student = model()
    with pytest.raises(ValueError, match="share parameters, which would be frozen. Give a copy as the teacher"):
        trainer(tmp_path, student, Distiller(student))


def test_several_gpus_in_one_process_are_refused(tmp_path):
    args = arguments(tmp_path)
    assert args.device.type == "cpu"
    args._n_gpu = 2
    with pytest.raises(ValueError, match="a process for each of the 2 GPUs: start by `accelerate launch --num_proc"):
        NoseTrainer(model=model(), args=args, distiller=Distiller(model(seed=1)), train_dataset=Images())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -0.1}, r"distillation_weight must be in \[0, 1\], got -0.1"),
        ({"weight": 1.1}, r"distillation_weight must be in \[0, 1\], got 1.1"),
        ({"weight": math.nan}, r"distillation_weight must be in \[0, 1\], got nan"),
        ({"temperature": 0.0}, "distillation_temperature must be positive, got 0.0"),
        ({"temperature": math.inf}, "distillation_temperature must be positive, got inf"),
        ({"feature_weight": -1.0}, "distillation_feature_weight must be positive, got -1.0"),
        ({"features": "all"}, "distillation_features must be one of .*'class_token', 'patches', 'both'.*, got 'all'"),
        ({"weight": 0.0}, "Nothing to distil: distillation_weight is 0 and distillation_features is 'none'"),
        (
            {"features": "patches"},
            r"distillation_blocks must be distinct blocks in \[0, 3\], at least one .* got \[\]",
        ),
        ({"features": "both", "blocks": [4]}, r"distinct blocks in \[0, 3\].*, got \[4\]"),
        ({"features": "both", "blocks": [-1]}, r"distinct blocks in \[0, 3\].*, got \[-1\]"),
        ({"features": "both", "blocks": [1, 1]}, r"distinct blocks in \[0, 3\].*, got \[1, 1\]"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Distiller(model(), **options)


def test_record_and_words():
    distiller = Distiller(model(), 0.7, 4.0, "both", [3, 1], 2.5)
    assert distiller.to_record() == {
        "weight": 0.7,
        "temperature": 4.0,
        "features": "both",
        "blocks": [1, 3],
        "feature_weight": 2.5,
    }
    words = describe(distiller.to_record())
    assert words == "logits at temperature 4, weight 0.7; class token and patches behind blocks 1, 3, weight 2.5"
    assert describe(Distiller(model(), 0.7).to_record()) == "logits at temperature 2, weight 0.7"
    only = Distiller(model(), 0.0, features="class_token", blocks=[2]).to_record()
    assert describe(only) == "class token behind blocks 2, weight 1"
