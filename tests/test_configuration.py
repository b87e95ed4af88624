"""What a configuration takes, refuses and keeps through a file."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given
from hypothesis import strategies as st
from reference_vit import vit_config

from hf_nose.configuration_nose_vit import FORMAT_VERSION, NoseViTConfig, __version__
from hf_nose.guards_nose_vit import MAX_LABELS
from hf_nose.modeling_nose_vit import NoseViTForImageClassification


SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
}
LISTS = ["removed_attention_layers", "diluted_attention_layers"]


def config(**fields) -> NoseViTConfig:
    return NoseViTConfig(**{**SIZES, **fields})


@st.composite
def layer_lists(draw):
    """Any legal four lists for six blocks, unsorted."""
    order = draw(st.permutations(range(6)))
    cut = draw(st.integers(0, 5))
    gone = order[:cut]
    removed = [layer for layer in gone if draw(st.booleans())]
    diluted = [layer for layer in gone if layer not in removed]
    compensated = [layer for layer in gone if draw(st.booleans())]
    folded = [layer for layer in removed if layer not in compensated and draw(st.booleans())]
    return {
        "removed_attention_layers": removed,
        "diluted_attention_layers": diluted,
        "compensated_attention_layers": compensated,
        "folded_attention_layers": folded,
    }


def test_defaults_are_a_dense_vit_of_this_version():
    empty = config()
    assert [getattr(empty, name) for name in layer_names()] == [[], [], [], []]
    assert (empty.format_version, empty.hf_nose_version) == (FORMAT_VERSION, __version__)
    assert (empty.drop_path_rate, empty.use_pooler, empty.token_reduction) == (0.0, False, None)
    assert (empty.chunk_size_feed_forward, empty.chunk_size_attention) == (0, 0)


def layer_names() -> list[str]:
    return [f"{state}_attention_layers" for state in ("removed", "diluted", "compensated", "folded")]


@given(lists=layer_lists(), rate=st.floats(0, 0.9), schedule=st.sampled_from(["linear", "constant"]))
def test_round_trip_through_to_dict(lists, rate, schedule):
    before = config(**lists, drop_path_rate=rate, drop_path_schedule=schedule)
    after = NoseViTConfig.from_dict(json.loads(json.dumps(before.to_dict())))
    assert after.to_dict() == before.to_dict()
    for name, value in lists.items():
        assert getattr(after, name) == sorted(value)
    assert (after.drop_path_rate, after.drop_path_schedule) == (rate, schedule)


@given(lists=layer_lists(), chunks=st.integers(0, 100))
def test_round_trip_through_a_folder(tmp_path_factory, lists, chunks):
    folder = tmp_path_factory.mktemp("config")
    before = config(**lists, chunk_size_attention=chunks, out_features=["stem", "stage2"], num_labels=7)
    before.save_pretrained(folder)
    after = NoseViTConfig.from_pretrained(folder)
    assert {**after.to_dict(), "architectures": None} == {**before.to_dict(), "architectures": None}
    assert (after.out_features, after.num_labels) == (["stem", "stage2"], 7)


@given(lists=layer_lists())
def test_stream_scale_doubles_at_each_folded_layer(lists):
    made = config(**lists)
    assert made.stream_scale(-1) == 1.0
    for layer in range(6):
        doubled = layer in lists["folded_attention_layers"]
        assert made.stream_scale(layer) == made.stream_scale(layer - 1) * (2 if doubled else 1)


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("layers", [[6], [-1], [0, 17]])
def test_index_out_of_range(name, layers):
    with pytest.raises(StrictDataclassError, match=rf"{name} must hold block indices in \[0, 5\], got"):
        config(**{name: layers})


@pytest.mark.parametrize("name", LISTS)
def test_doubled_index(name):
    with pytest.raises(StrictDataclassError, match=f"{name} holds an index twice"):
        config(**{name: [2, 1, 2]})


@pytest.mark.parametrize("name", LISTS)
def test_bool_is_no_index(name):
    with pytest.raises(StrictDataclassError, match=name):
        config(**{name: [True]})


def test_both_diluted_and_removed():
    with pytest.raises(StrictDataclassError, match=r"Layers \[1\] are both removed and diluted"):
        config(removed_attention_layers=[0, 1], diluted_attention_layers=[1, 2])


@pytest.mark.parametrize("removed, diluted", [(range(6), []), ([], range(6)), (range(3), range(3, 6))])
def test_all_layers_are_refused_with_the_reason(removed, diluted):
    with pytest.raises(StrictDataclassError, match="at most 5 may be: .*class token sees no patch"):
        config(removed_attention_layers=list(removed), diluted_attention_layers=list(diluted))
    config(removed_attention_layers=list(removed)[:5], diluted_attention_layers=list(diluted)[:2])


def test_compensated_must_be_removed_or_diluted():
    with pytest.raises(StrictDataclassError, match=r"\[4\] are neither"):
        config(removed_attention_layers=[1], diluted_attention_layers=[2], compensated_attention_layers=[1, 2, 4])


def test_folded_must_be_removed():
    with pytest.raises(StrictDataclassError, match=r"folded_attention_layers must be removed, but \[2\] are not"):
        config(removed_attention_layers=[1], diluted_attention_layers=[2], folded_attention_layers=[1, 2])


def test_folded_cannot_be_compensated():
    with pytest.raises(StrictDataclassError, match=r"\[1\] are both folded and compensated"):
        config(removed_attention_layers=[1], compensated_attention_layers=[1], folded_attention_layers=[1])


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 99, 0, -1])
def test_unknown_format_version_says_what_to_install(version):
    with pytest.raises(StrictDataclassError, match=f"format_version is {version}\\b.*written by hf_nose 9.9"):
        config(format_version=version, hf_nose_version="9.9")


def test_newer_format_is_refused_from_a_folder(tmp_path):
    config().save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    record |= {"format_version": FORMAT_VERSION + 1, "something_new": 3}
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(StrictDataclassError, match="format_version"):
        NoseViTConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [{}, {"kind": "tome", "r": 8}])
def test_token_reduction_is_reserved(value):
    with pytest.raises(StrictDataclassError, match="token_reduction is reserved"):
        config(token_reduction=value)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 0},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 1_001},
        {"num_hidden_layers": 10**15},
        {"hidden_size": 0},
        {"hidden_size": -24},
        {"hidden_size": 10**12},
        {"intermediate_size": 0},
        {"intermediate_size": 10**12},
        {"num_attention_heads": 0},
        {"num_attention_heads": -3},
        {"num_attention_heads": 5},
        {"num_channels": 0},
        {"image_size": 0},
        {"image_size": 3},
        {"image_size": 10**9},
        {"image_size": [16, 3]},
        {"image_size": [16, 16, 16]},
        {"patch_size": 0},
        {"patch_size": -4},
        {"patch_size": [4, 0]},
        {"chunk_size_feed_forward": -1},
        {"chunk_size_attention": -1},
        {"drop_path_rate": -0.1},
        {"drop_path_rate": 1.0},
        {"drop_path_rate": float("nan")},
        {"drop_path_schedule": "cosine"},
    ],
    ids=str,
)
def test_hostile_sizes(fields):
    with pytest.raises(StrictDataclassError, match="ValueError"):
        config(**fields)


@pytest.mark.parametrize("num_labels", [-1, MAX_LABELS + 1, 10**15])
def test_hostile_number_of_labels_is_refused_before_names_are_made(num_labels):
    with pytest.raises(ValueError, match="num_labels must be in"):
        config(num_labels=num_labels)


def test_oblong_images_are_fine():
    assert config(image_size=[16, 8], patch_size=(4, 2)).image_size == [16, 8]


@pytest.mark.parametrize(
    "fields",
    [
        {"removed_attention_layers": "12"},
        {"removed_attention_layers": 3},
        {"removed_attention_layers": [1.0]},
        {"diluted_attention_layers": ["1"]},
        {"compensated_attention_layers": {1: 2}},
        {"num_hidden_layers": "6"},
        {"num_hidden_layers": None},
        {"drop_path_rate": "0.1"},
        {"drop_path_schedule": 1},
        {"chunk_size_attention": True},
        {"use_pooler": "yes"},
        {"format_version": "1"},
        {"token_reduction": 8},
    ],
    ids=str,
)
def test_wrong_types_name_the_field(fields):
    with pytest.raises(StrictDataclassError, match=next(iter(fields))):
        config(**fields)


def test_arguments_of_from_pretrained_are_validated_by_the_model(tmp_path):
    """They are applied after the config's own validation: unsorted and out of range must not slip through."""
    config().save_pretrained(tmp_path)
    for layers, message in (([3, 1], "sorted list"), ([9], "block indices"), ([2, 2], "twice")):
        late = NoseViTConfig.from_pretrained(tmp_path, removed_attention_layers=layers)
        with pytest.raises(StrictDataclassError, match=message):
            NoseViTForImageClassification(late)


@pytest.mark.parametrize(
    "name, value", [("removed_attention_layers", [7]), ("format_version", 5), ("token_reduction", {})]
)
def test_assignments_are_validated_by_the_model(name, value):
    assigned = config()
    setattr(assigned, name, value)
    with pytest.raises(StrictDataclassError):
        NoseViTForImageClassification(assigned)


def test_from_vit_carries_everything_and_sorts():
    dense = vit_config(id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1}, qkv_bias=False, hidden_act="relu")
    made = NoseViTConfig.from_vit(dense, removed_attention_layers=[3, 1], drop_path_rate=0.1)
    assert made.removed_attention_layers == [1, 3]
    assert (made.id2label, made.qkv_bias, made.hidden_act) == ({0: "cat", 1: "dog"}, False, "relu")
    assert made.layer_norm_eps == dense.layer_norm_eps and made.model_type == "nose_vit"
    with pytest.raises(StrictDataclassError):
        NoseViTConfig.from_vit(dense, removed_attention_layers=[9])


def test_from_vit_with_another_number_of_labels_drops_the_old_names(caplog):
    made = NoseViTConfig.from_vit(vit_config(id2label={0: "cat", 1: "dog"}), num_labels=3)
    assert made.num_labels == 3 and made.id2label == {index: f"LABEL_{index}" for index in range(3)}
    assert set(made.label2id) == set(made.id2label.values())
    assert not caplog.records, "transformers warns of names that do not fit"


def test_from_vit_of_a_nose_vit_keeps_its_fields():
    first = config(removed_attention_layers=[1], folded_attention_layers=[1], out_features=["stage3"])
    second = NoseViTConfig.from_vit(first, chunk_size_attention=4)
    assert second.folded_attention_layers == [1] and second.chunk_size_attention == 4
    assert second.out_features == ["stage3"]


def test_stages_and_backbone_names():
    made = config(out_indices=[0, 2])
    assert made.stage_names == ["stem"] + [f"stage{index}" for index in range(1, 7)]
    assert made.out_features == ["stem", "stage2"]


def test_drop_path_schedules():
    linear = config(drop_path_rate=0.5)
    assert [linear.drop_path(layer) for layer in range(6)] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    constant = config(drop_path_rate=0.5, drop_path_schedule="constant")
    assert [constant.drop_path(layer) for layer in range(6)] == [0.5] * 6
    assert config(num_hidden_layers=1, drop_path_rate=0.5).drop_path(0) == 0.5


@pytest.mark.parametrize("fields", [{"out_indices": [1, 2]}, {"out_features": ["stage1", "stage2"]}])
def test_feature_maps_of_a_nose_vit_are_asked_for_by_index_or_by_name(fields):
    """One of the two is enough, whatever the source had."""
    source = NoseViTConfig(**SIZES, out_features=["stage3"])
    config = NoseViTConfig.from_vit(source, **fields)
    assert (list(config.out_indices), config.out_features) == ([1, 2], ["stage1", "stage2"])
    assert NoseViTConfig.from_vit(source).out_features == ["stage3"]
