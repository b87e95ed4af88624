"""float16: a compensated stream that grows past its largest number, and the folded one that does not grow."""

import copy

import pytest
import torch
from reference_vit import images, logits, stock_vit
from torch import nn
from transformers import ViTForImageClassification

from hf_nose import NoseViTForImageClassification
from hf_nose.surgery import fold


LARGEST = torch.finfo(torch.float16).max


@torch.no_grad()
def scaled(stock: ViTForImageClassification, factor: float) -> ViTForImageClassification:
    """The same function with a stream `factor` times as large: exact, where that is a power of two."""
    stock = copy.deepcopy(stock)
    stock.config.layer_norm_eps *= factor**2
    embeddings = stock.vit.embeddings
    modules = [embeddings.patch_embeddings.projection]
    for block in stock.vit.layers:
        modules += [block.attention.o_proj, block.mlp.fc2]
    for parameter in (embeddings.cls_token, embeddings.position_embeddings):
        parameter *= factor
    for module in modules:
        module.weight *= factor
        module.bias *= factor
    for module in stock.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps *= factor**2
    return stock


def largest(model, pixel_values) -> float:
    """The largest number that a block hands on."""
    seen = []
    hooks = [
        block.register_forward_hook(lambda *args: seen.append(float(args[2].abs().max())))
        for block in model.vit.layers
    ]
    with model.all_tokens():
        logits(model, pixel_values)
    for hook in hooks:
        hook.remove()
    return max(seen)


def unfolded_and_folded(stock, layers):
    model = NoseViTForImageClassification.from_vit(stock, layers, feature_compensation=True, force=True)
    return model, fold(model)


def assert_only_folding_saves_it(stock, layers, pixel_values) -> None:
    unfolded, folded = unfolded_and_folded(stock, layers)
    expected = logits(unfolded, pixel_values)
    assert torch.equal(logits(folded, pixel_values), expected) and expected.isfinite().all()
    assert largest(unfolded, pixel_values) > LARGEST > 5 * largest(folded, pixel_values)
    for tail in (True, False):
        lost, kept = (copy.deepcopy(model).half() for model in (unfolded, folded))
        lost.config.class_token_tail = kept.config.class_token_tail = tail
        assert not logits(lost, pixel_values.half()).isfinite().all(1).any()
        made = logits(kept, pixel_values.half()).float()
        assert (made - expected).norm() < 2e-3 * expected.norm()
        assert torch.equal(made.argmax(1), expected.argmax(1))
    # bfloat16 has float32's range.
    assert logits(copy.deepcopy(unfolded).bfloat16(), pixel_values.bfloat16()).isfinite().all()


LAYERS, FACTOR = [0, 1, 3, 4], 2.0**11


def test_a_folded_model_does_not_overflow_where_the_unfolded_one_does():
    stock = scaled(stock_vit(), FACTOR)
    assert torch.equal(logits(stock, images(8)), logits(stock_vit(), images(8)))
    assert_only_folding_saves_it(stock, LAYERS, images(8))


def test_where_nothing_overflows_both_agree_in_float16():
    for model in unfolded_and_folded(stock_vit(), LAYERS):
        expected = logits(model, images(8))
        assert largest(model, images(8)) < LARGEST
        made = logits(copy.deepcopy(model).half(), images(8).half()).float()
        assert (made - expected).norm() < 2e-3 * expected.norm()


# Real weights


@pytest.fixture(scope="module")
def deit(deit_tiny) -> ViTForImageClassification:
    return ViTForImageClassification.from_pretrained(deit_tiny).eval()


def test_deit_tiny_with_its_stream_times_32(deit, imagenet_pixels):
    stock = scaled(deit, 32.0)
    assert torch.equal(logits(stock, imagenet_pixels), logits(deit, imagenet_pixels))
    assert_only_folding_saves_it(stock, [0, 1, 3, 4, 6, 7, 8, 9], imagenet_pixels)


def test_deit_tiny_as_it_is_does_not_overflow_even_with_twelve(deit, imagenet_pixels):
    """No folding is needed for its range: twelve doublings bring the largest number to 53,855."""
    model = NoseViTForImageClassification.from_vit(deit)
    with model.masked_attention(range(12), "double"):
        assert largest(model, imagenet_pixels) == pytest.approx(53_855, abs=1) and LARGEST > 53_855
        assert logits(copy.deepcopy(model).half(), imagenet_pixels.half()).isfinite().all()
