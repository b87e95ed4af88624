"""Memory: slices of attention and MLP, what is alive at a time, and weights that are gone after folding."""

import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference_vit import images, logits, nose, stock_vit, vit_config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import ViTForImageClassification

from hf_nose import NoseViTConfig, NoseViTForImageClassification
from hf_nose.surgery import fold


# The same function


def state(name: str, **options) -> NoseViTForImageClassification:
    """Removed attention of either gain, diluted attention, and the tail of the class token."""
    model = nose([0, 5], class_token_tail=True, dtype=torch.float64, **options)
    model.dilute([2, 3])
    model.set_mask(0.4 if name == "diluted" else 0.0)
    return fold(model) if name == "folded" else model


@pytest.mark.parametrize("autograd", [True, False], ids=["autograd", "no autograd"])
@pytest.mark.parametrize("tail", [True, False], ids=["tail", "all tokens"])
@pytest.mark.parametrize("name", ["diluted", "at zero", "folded"])
@given(tokens=st.integers(1, 60), size=st.integers(1, 4))
def test_slices_of_any_size_give_the_same_outputs(name, tail, autograd, tokens, size):
    """Three images of 17 tokens: most sizes leave a last slice that is smaller, some are larger than the whole."""
    whole, sliced = state(name), state(name, chunk_size_feed_forward=tokens, chunk_size_attention=size)
    whole.config.class_token_tail = sliced.config.class_token_tail = tail
    pixel_values = images(dtype=torch.float64)
    with torch.set_grad_enabled(autograd):
        made, expected = sliced(pixel_values), whole(pixel_values)
        assert torch.allclose(made.logits, expected.logits, rtol=1e-12, atol=1e-14)
        if not tail:
            states = (each(pixel_values, output_hidden_states=True).hidden_states for each in (sliced, whole))
            assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(*states, strict=True))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradients_through_slices(training):
    gradients = []
    for options in ({}, {"chunk_size_feed_forward": 7, "chunk_size_attention": 2}):
        model = state("diluted", drop_path_rate=0.2, **options).train(training)
        torch.manual_seed(0)
        model(images(dtype=torch.float64), labels=torch.tensor([0, 1, 2])).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in gradients[0].items():
        if grad is None:
            assert gradients[1][name] is None
        else:
            assert torch.allclose(gradients[1][name], grad, rtol=1e-10, atol=1e-13), name


def test_the_input_of_a_block_is_left_alone():
    model = nose([1], chunk_size_feed_forward=5, chunk_size_attention=1)
    with torch.no_grad():
        for block in model.vit.layers[:2]:
            hidden_states = torch.randn(3, 17, 24)
            before = hidden_states.clone()
            output = block(hidden_states)
            assert torch.equal(hidden_states, before) and output.data_ptr() != hidden_states.data_ptr()


def test_slices_under_autocast():
    made = []
    for options in ({}, {"chunk_size_feed_forward": 7, "chunk_size_attention": 2}):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model = nose([1], **options)
            hidden = model.vit(images()).last_hidden_state
            assert hidden.dtype == torch.float32
            made.append(hidden)
    assert (made[0] - made[1]).norm() < 0.02 * made[0].norm()


# What is alive


class Alive(TorchDispatchMode):
    """
    The most bytes that the tensors made within the context held at one time, those of a storage once; `given` and what
    looks at it are not counted.
    """

    def __init__(self, given: torch.Tensor):
        super().__init__()
        self.peak = 0
        self.given = given.untyped_storage().data_ptr()
        self.references: list[weakref.ref] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self.references.append(weakref.ref(tensor))
        self.peak = max(self.peak, self.now())
        return output

    def now(self) -> int:
        self.references = [reference for reference in self.references if reference() is not None]
        storages = [reference().untyped_storage() for reference in self.references]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        return sum(size for pointer, size in sizes.items() if pointer != self.given)


def peak_in_streams(model, count: int = 40) -> float:
    """Peak of a forward, in tensors of the stream's size (images x tokens x hidden); input and weights not counted."""
    pixel_values = images(count).to(model.dtype)
    stream = count * 17 * model.config.hidden_size * pixel_values.element_size()
    logits(model, pixel_values[:1])
    with Alive(pixel_values) as alive, torch.inference_mode():
        output = model(pixel_values).logits
        assert alive.now() <= 2 * output.nbytes + 64
    return alive.peak / stream


WIDE = {"hidden_size": 48, "intermediate_size": 192, "initializer_range": 0.02}


def test_the_measure_sees_what_a_stock_vit_holds():
    """f, LN2(f), 4 and 4 in the MLP, and the input of the block."""
    stock = ViTForImageClassification(vit_config(**WIDE)).eval()
    assert 10.5 < peak_in_streams(stock) < 12.5


@pytest.mark.parametrize("tail", [True, False], ids=["tail", "all tokens"])
@pytest.mark.parametrize("name", ["dense", "diluted", "at zero", "removed", "folded"])
def test_two_streams_are_alive_with_slices_of_both(name, tail):
    """HF_NOTES: 2.1 instead of 12 tensors, here with slices of a fortieth."""
    removed = [0, 5] if name == "removed" else []
    config = NoseViTConfig.from_vit(
        vit_config(**WIDE),
        chunk_size_feed_forward=17,
        chunk_size_attention=1,
        class_token_tail=tail,
        removed_attention_layers=removed,
        compensated_attention_layers=removed[:1],
    )
    model = NoseViTForImageClassification(config).eval()
    if name in ("diluted", "at zero", "folded"):
        model.dilute([1, 5])
        model.set_mask(0.4 if name == "diluted" else 0.0)
    model = fold(model) if name == "folded" else model
    assert 2.0 <= peak_in_streams(model) < 2.4


def test_pixels_in_another_dtype_are_not_kept_beside_the_stream():
    config = NoseViTConfig.from_vit(vit_config(**WIDE), chunk_size_feed_forward=17, chunk_size_attention=1)
    model = NoseViTForImageClassification(config).double().eval()
    pixel_values = images(40)
    stream = 40 * 17 * 48 * 8
    with Alive(pixel_values) as alive, torch.inference_mode():
        model(pixel_values)
    assert alive.peak < 3.2 * stream
    seen = []
    model.vit.layers[1].register_forward_pre_hook(lambda *_: seen.append(watching.now()))
    with Alive(pixel_values) as watching, torch.inference_mode():
        model(pixel_values)
    # The output of block 0 and the slice that was added last.
    assert seen[0] < 1.2 * stream


# Weights


def test_weights_are_gone_after_folding():
    model = nose()
    model.dilute([1, 4])
    model.set_mask(0.0)
    parameters = {name: weakref.ref(parameter) for name, parameter in model.named_parameters()}
    folded = fold(model)
    assert all(reference() is not None for reference in parameters.values())
    del model
    gc.collect()
    assert [name for name, reference in parameters.items() if reference() is not None] == []
    dead = 2 * (4 * (24 * 24 + 24) + 2 * 24)
    dense = sum(parameter.numel() for parameter in stock_vit().parameters())
    assert sum(parameter.numel() for parameter in folded.parameters()) == dense - dead
