"""The models of a benchmark: the same weights in every role, named apart, grouped by shape."""

import pytest
import torch
from transformers import DeiTConfig, ViTConfig, ViTForImageClassification

from hf_nose import NoseViTForImageClassification
from hf_nose.contenders import Contender, contenders, source_config, stock_config, stock_model
from hf_nose.profiling import count_parameters


CPU = torch.device("cpu")
FIELDS = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 8,
    "patch_size": 2,
    "num_labels": 5,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense ViT."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("contenders") / "tiny-vit"
    ViTForImageClassification(ViTConfig(**FIELDS)).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def compressed(folder, tmp_path_factory):
    """A NoseViT that lost two attention layers."""
    path = tmp_path_factory.mktemp("compressed") / "tiny-nose"
    NoseViTForImageClassification.from_vit(folder, removed_attention_layers=[0, 2]).save_pretrained(path)
    return str(path)


def logits(contender, dtype=torch.float32, attention="sdpa"):
    model = contender.build(CPU, dtype, attention)
    assert not model.training and model.dtype == dtype
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return model(torch.randn(3, 3, 8, 8, generator=generator).to(dtype)).logits


def test_every_role_has_the_same_weights(folder):
    stock, dense, sliced, folded, _ = contenders([folder], ["0,2"], 5, 2)["tiny-vit"]
    assert [type(item.build(CPU, torch.float32, "sdpa")) for item in (stock, dense)] == [
        ViTForImageClassification,
        NoseViTForImageClassification,
    ]
    for other in (dense, sliced):
        torch.testing.assert_close(logits(other), logits(stock), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits(other, attention="eager"), logits(stock), rtol=1e-4, atol=1e-5)
    model = folded.build(CPU, torch.bfloat16, "eager")
    assert model.config.folded_attention_layers == model.config.removed_attention_layers == [0, 2]
    assert model.config._attn_implementation == "eager" and model.dtype == torch.bfloat16
    assert sliced.build(CPU, torch.float32, "sdpa").config.chunk_size_feed_forward == 5


def test_one_product_of_q_k_and_v(folder):
    stock, _, fused, _, folded = contenders([folder], ["0,2"], fuse_qkv=True)["tiny-vit"]
    assert (fused.name, fused.variant_of) == ("tiny-vit dense fused", "tiny-vit dense")
    assert fused.build(CPU, torch.float32, "sdpa").vit.layers[0].attention.qkv_weight is not None
    torch.testing.assert_close(logits(fused), logits(stock), rtol=1e-4, atol=1e-5)
    assert folded.fuse_qkv and folded.removed == (0, 2)
    assert fused.costs() == Contender("plain", folder, "nose").costs()


def test_names_groups_and_slices(folder, compressed):
    found = contenders(["deit-tiny", folder, compressed], ["25%", "50%"], 788, 4)
    assert list(found) == ["deit-tiny", "tiny-vit"]
    assert [item.name for item in found["deit-tiny"]] == [
        "deit-tiny stock",
        "deit-tiny dense",
        "deit-tiny dense chunked",
        "deit-tiny 25%",
        "deit-tiny 25% chunked",
        "deit-tiny 50%",
        "deit-tiny 50% chunked",
    ]
    names = [item.name for item in found["tiny-vit"] if not item.variant_of]
    assert names == ["tiny-vit stock", "tiny-vit dense", "tiny-vit 25%", "tiny-vit 50%", "tiny-nose"]
    assert found["deit-tiny"][3].removed == (0, 2, 4) and found["tiny-vit"][3].removed == (0,)
    chunks = {
        (item.chunk_size_feed_forward, item.chunk_size_attention) for item in found["deit-tiny"] if item.variant_of
    }
    assert chunks == {(788, 4)} and found["deit-tiny"][0].variant_of is None


def test_a_compressed_model_meets_a_dense_one_of_its_shape(compressed):
    (group,) = contenders([compressed]).values()
    assert [(item.name, item.kind) for item in group] == [
        ("tiny-nose stock", "stock"),
        ("tiny-nose dense", "nose"),
        ("tiny-nose", "checkpoint"),
    ]
    stock, dense, own = (item.build(CPU, torch.float32, "sdpa") for item in group)
    assert stock.config.model_type == "vit" and own.config.removed_attention_layers == [0, 2]
    assert count_parameters(stock) == count_parameters(dense) > count_parameters(own)
    assert [item.num_parameters() for item in group] == [count_parameters(model) for model in (stock, dense, own)]


def test_layers_are_taken_from_a_dense_nose_vit_too(folder, compressed, tmp_path):
    path = tmp_path / "dense-nose"
    NoseViTForImageClassification.from_vit(folder).save_pretrained(path)
    (group,) = contenders([str(path), compressed], ["0,2"]).values()
    assert [(item.name, item.removed) for item in group] == [
        ("dense-nose stock", ()),
        ("dense-nose dense", ()),
        ("dense-nose", ()),
        ("dense-nose 0,2", (0, 2)),
        # What has lost layers stays as it is.
        ("tiny-nose", ()),
    ]
    assert group[3].build(CPU, torch.float32, "sdpa").config.removed_attention_layers == [0, 2]


def test_layers_that_nobody_has_to_give(compressed):
    with pytest.raises(ValueError, match="removed 40%: none of tiny-nose is dense. Leave it out"):
        contenders([compressed], ["40%"])


def test_random_weights_are_the_same_every_time():
    state = torch.get_rng_state()
    first, second = (stock_model("deit-tiny").vit.layers[3].mlp.fc1.weight for _ in range(2))
    assert torch.equal(first, second) and first.std() > 0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("removed", [(), (1, 3)])
def test_costs_need_no_model(folder, removed):
    contender = Contender("x", folder, "nose", removed)
    model, costs = contender.build(CPU, torch.float32, "sdpa"), contender.costs()
    assert costs["parameters"] == contender.num_parameters() == count_parameters(model)
    # The tail: with 17 tokens nearly the whole last MLP.
    assert costs["macs_computed"] < 0.9 * costs["macs"]
    assert contender.weights_bytes(torch.bfloat16) == 2 * count_parameters(model)
    stock = Contender("s", folder, "stock").costs()
    assert stock["macs_computed"] == stock["macs"]
    assert (stock["macs"] == costs["macs"]) is (not removed)


def test_plain_values_are_enough_for_another_process(folder):
    contender = contenders([folder], ["0,2"], 5, 2)["tiny-vit"][4]
    assert Contender(**contender.to_dict()) == contender


def test_the_stock_shape_of_a_compressed_model(compressed, folder):
    dense, stock = source_config(folder), stock_config(source_config(compressed))
    assert type(stock) is ViTConfig
    for field in FIELDS:
        assert getattr(stock, field) == getattr(dense, field)


def test_what_is_refused(folder, tmp_path):
    for sources in ([], [folder, folder]):
        with pytest.raises(ValueError, match="model must name at least one model, none twice"):
            contenders(sources)
    with pytest.raises(ValueError, match="Two models would have one name"):
        contenders([folder], ["0,2", "0,2"])
    with pytest.raises(ValueError, match="removed must take at least one and at most 3 of the layers 0 to 3, got '4'"):
        contenders([folder], ["4"])
    with pytest.raises(ValueError, match=r"chunk_size_attention must be 0 \(off\) or positive, got -1"):
        contenders([folder], chunk_size_attention=-1)
    DeiTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type is 'deit'; supported are"):
        contenders([str(tmp_path)])
