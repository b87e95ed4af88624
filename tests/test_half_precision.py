"""float16: a compensated stream that grows past its largest number, and the folded one that does not grow."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from reference_vit import images, logits, stock_vit
from tiny_run import finished_run
from transformers import ViTForImageClassification

from hf_nose import NoseViTForImageClassification
from hf_nose.surgery import fold


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from half_precision import LARGEST, largest, main, scaled  # noqa: E402


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


@pytest.mark.slow
def test_the_script_says_what_overflows(tmp_path_factory):
    output = tmp_path_factory.mktemp("half") / "half.json"
    words = [f"--model={finished_run(tmp_path_factory) / 'dense'}", "--dataset=digits", "--max_eval_samples=16"]
    assert main([*words, "--layers", "0", "1", "--factor", str(2.0**14), f"--output={output}"]) == 0
    record = json.loads(output.read_text())
    peaks, unfolded, folded = (
        record["largest_by_doublings"],
        record["scaled"]["unfolded"],
        record["scaled"]["folded"],
    )
    assert len(peaks) == 5 and peaks[0] < peaks[-1] < record["largest_float16"] == LARGEST == 65_504
    assert unfolded["largest"] > LARGEST > folded["largest"]
    assert unfolded["finite_rows"] < folded["finite_rows"] == folded["same_argmax"] == 16
    assert 0 < folded["relative_error"] < 5e-3


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
