"""torch.compile: the whole forward in one graph, and how many of them a dilution and changing batches make."""

import copy
from contextlib import contextmanager

import pytest
import torch
import torch._dynamo
from reference_vit import images, logits, stock_vit
from torch._dynamo.testing import CompileCounter

from hf_nose import NoseViTForImageClassification
from hf_nose.surgery import fold


MASKS = (1.0, 0.8, 0.37, 0.1, 0.01)
SIZES = (2, 3, 5)


def model_in(state: str) -> NoseViTForImageClassification:
    model = NoseViTForImageClassification.from_vit(stock_vit(blocks=3))
    if state != "dense":
        model.dilute([0, 2])
        model.set_mask(0.4 if state == "diluted" else 0.0)
    return fold(model) if state == "folded" else model


@contextmanager
def compiled(model):
    """The model compiled whole, and the counter of its graphs; they run as they are, which is quick to make."""
    torch._dynamo.reset()
    counter = CompileCounter()
    try:
        yield torch.compile(model, backend=counter, fullgraph=True), counter
    finally:
        torch._dynamo.reset()


def run(made, model, masks=(), sizes=SIZES, is_dynamic=False) -> None:
    """One forward for every mask and batch size; each is held against the model as it is."""
    for mask in masks or (None,):
        if mask is not None:
            model.set_mask(mask)
        for size in sizes:
            pixel_values = images(size)
            if is_dynamic:
                torch._dynamo.mark_dynamic(pixel_values, 0, min=2, max=64)
            assert torch.allclose(logits(made, pixel_values), logits(model, pixel_values), atol=1e-6)


@pytest.mark.parametrize("is_dynamic, most", [(False, 2), (True, 1)], ids=["as it comes", "marked dynamic"])
def test_one_graph_for_every_mask_and_one_more_for_zero(is_dynamic, most):
    """As it comes, the first batch makes a graph for its own size and the second one for all."""
    for masks in (MASKS, (0.0,)):
        model = model_in("diluted")
        with compiled(model) as (made, counter):
            run(made, model, masks, is_dynamic=is_dynamic)
            assert 1 <= counter.frame_count <= most
            if is_dynamic and masks == MASKS:
                # And back, as in an evaluation of what was being diluted.
                run(made, model, (0.0, 0.5), is_dynamic=True)
                assert counter.frame_count == 2


@pytest.mark.parametrize("state", ["dense", "folded"])
def test_the_whole_forward_is_one_graph(state):
    model = model_in(state)
    with compiled(model) as (made, counter):
        run(made, model, sizes=(3,))
        assert counter.frame_count == 1


def test_slices_fused_projections_and_all_tokens_compile_whole():
    model = model_in("diluted")
    model.config.chunk_size_feed_forward, model.config.chunk_size_attention = 20, 2
    with compiled(model) as (made, counter):
        run(made, model, sizes=(3,))
        assert counter.frame_count == 1
    model = model_in("diluted")
    model.fuse_qkv_projections()
    with compiled(model) as (made, counter), model.all_tokens():
        run(made, model, sizes=(3,))
        assert counter.frame_count == 1


def test_gradients_of_a_compiled_model():
    model = model_in("diluted").double().train()
    other, labels = copy.deepcopy(model), torch.tensor([0, 1, 2])
    with compiled(model) as (made, counter):
        made(images(dtype=torch.float64), labels=labels).loss.backward()
        assert counter.frame_count == 1
    other(images(dtype=torch.float64), labels=labels).loss.backward()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-10, atol=1e-14)
