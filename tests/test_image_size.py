"""Another image size: positions interpolated, the processor in step."""

import pytest
import tiny_training as tiny
import torch
from transformers import ViTImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil

from hf_nose.image_size import processor_with_size, with_image_size
from hf_nose.modeling_nose_vit import NoseViTForImageClassification, nose_vit
from hf_nose.surgery import fold


def changed(kind):
    model = tiny.model() if kind == "dense" else tiny.model(diluted=[1, 3])
    if kind == "diluted":
        model.set_mask([0.37, 0.5])
    if kind == "folded":
        model.set_mask(0.0)
        model = fold(model)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dense", "diluted", "folded"])
@pytest.mark.parametrize("size", [4, 16, 20])
def test_the_saved_model_needs_no_flag(tmp_path, kind, size):
    model = changed(kind)
    model.config.id2label = {0: "ant", 1: "bee", 2: "cat"}
    before = tiny.weights(model)
    with_image_size(model, size).save_pretrained(tmp_path)
    loaded = NoseViTForImageClassification.from_pretrained(tmp_path).eval()
    pixel_values = torch.randn(3, 3, size, size)
    expected = model(pixel_values, interpolate_pos_encoding=True).logits
    assert torch.equal(loaded(pixel_values).logits, expected)
    assert loaded.config.image_size == size and loaded.config.id2label == model.config.id2label
    assert nose_vit(loaded).mask_values() == nose_vit(model).mask_values()
    assert loaded.config.removed_attention_layers == model.config.removed_attention_layers
    assert tiny.differing(tiny.weights(model), before) == [] and model.config.image_size == 8


def test_the_same_size_is_the_same_model():
    model = tiny.model()
    assert with_image_size(model, 8) is model


def test_mode_and_dtype_stay():
    model = with_image_size(tiny.model().to(torch.bfloat16).train(), 16)
    assert model.training and model.dtype == torch.bfloat16
    assert not with_image_size(tiny.model().eval(), 16).training


@pytest.mark.parametrize("size", [7, 10, 2, 0])
def test_sizes_that_do_not_fit_are_refused(size):
    with pytest.raises(ValueError, match=f"multiple of the patch size 4.* got {size} for one of 8x8"):
        with_image_size(tiny.model(), size)


def test_images_that_are_not_square_are_refused():
    model = with_image_size(tiny.model(), 16)
    config = type(model.config).from_vit(model.config, image_size=[8, 16])
    with pytest.raises(ValueError, match="for one of 8x16"):
        with_image_size(NoseViTForImageClassification(config), 16)


IMAGE = torch.randint(0, 255, (3, 50, 70), dtype=torch.uint8).numpy()


def test_a_processor_that_resizes(tmp_path):
    before = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.1] * 3, resample=3)
    processor_with_size(before, 12).save_pretrained(tmp_path)
    after = ViTImageProcessorPil.from_pretrained(tmp_path)
    assert after([IMAGE], return_tensors="pt").pixel_values.shape == (1, 3, 12, 12)
    assert after.to_dict() == {**before.to_dict(), "size": {"height": 12, "width": 12}}
    assert before.size["height"] == 8


def test_a_processor_that_did_not_resize_does_now():
    processor = processor_with_size(ViTImageProcessorPil(size={"height": 8, "width": 8}, do_resize=False), 12)
    assert processor([IMAGE], return_tensors="pt").pixel_values.shape == (1, 3, 12, 12)


@pytest.mark.parametrize("size", [{"height": 256, "width": 256}, {"shortest_edge": 256}])
def test_a_processor_that_crops_keeps_its_proportions(size):
    before = DeiTImageProcessorPil(size=size, crop_size={"height": 224, "width": 224}, do_center_crop=True)
    after = processor_with_size(before, 112)
    assert after([IMAGE], return_tensors="pt").pixel_values.shape == (1, 3, 112, 112)
    assert after.to_dict()["size"] == dict.fromkeys(size, 128)
