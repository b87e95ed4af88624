"""A made-up file in the layout of the authors' releases, held against a forward written out here."""

import argparse
import json
import pickle
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention
from transformers import AutoModelForImageClassification, ViTConfig, ViTImageProcessorPil

from hf_nose.card_text import is_own
from hf_nose.cli import BAD_INPUT, OK, main
from hf_nose.command_line import recipe_path
from hf_nose.convert import ascending, convert_checkpoint, named
from hf_nose.export import export_folder
from hf_nose.inspection import inspect_checkpoint
from hf_nose.manifests import sha256


ROOT = Path(__file__).resolve().parents[1]
HIDDEN, HEADS, BLOCKS, PATCH, SIDE, CLASSES = 192, 3, 12, 16, 3, 4
LABELS = {0: "tench", 1: "goldfish", 2: "`shark` {{ 7 * 7 }}", 3: "tench"}
REMOVED = [0, 2, 4]


def released_state() -> dict[str, torch.Tensor]:
    """timm's names and shapes, every number far from what a fresh model has; removed layers' attention included."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, scale=0.05):
        return scale * torch.randn(*shape, generator=generator)

    def norm(name):
        return {f"{name}.weight": 1 + draw(HIDDEN), f"{name}.bias": draw(HIDDEN)}

    def dense(name, out, inner):
        return {f"{name}.weight": draw(out, inner), f"{name}.bias": draw(out)}

    state = {
        "cls_token": draw(1, 1, HIDDEN),
        "pos_embed": draw(1, 1 + SIDE**2, HIDDEN),
        "patch_embed.proj.weight": draw(HIDDEN, 3, PATCH, PATCH),
        "patch_embed.proj.bias": draw(HIDDEN),
        **norm("norm"),
        **dense("head", CLASSES, HIDDEN),
    }
    for layer in range(BLOCKS):
        name = f"blocks.{layer}"
        state |= {**norm(f"{name}.norm1"), **norm(f"{name}.norm2")}
        state |= {**dense(f"{name}.attn.qkv", 3 * HIDDEN, HIDDEN), **dense(f"{name}.attn.proj", HIDDEN, HIDDEN)}
        state |= {**dense(f"{name}.mlp.fc1", 4 * HIDDEN, HIDDEN), **dense(f"{name}.mlp.fc2", HIDDEN, 4 * HIDDEN)}
    return state


STATE = released_state()


def authors_forward(pixel_values: torch.Tensor) -> torch.Tensor:
    """What the file's model computes: timm's ViT with eps 1e-6, where a removed layer's `f` is 2x."""

    def norm(x, name):
        return layer_norm(x, (HIDDEN,), STATE[f"{name}.weight"], STATE[f"{name}.bias"], 1e-6)

    def dense(x, name):
        return linear(x, STATE[f"{name}.weight"], STATE[f"{name}.bias"])

    patches = torch.nn.functional.conv2d(
        pixel_values, STATE["patch_embed.proj.weight"], STATE["patch_embed.proj.bias"], stride=PATCH
    )
    tokens = patches.flatten(2).transpose(1, 2)
    x = torch.cat([STATE["cls_token"].expand(len(tokens), -1, -1), tokens], 1) + STATE["pos_embed"]
    for layer in range(BLOCKS):
        name = f"blocks.{layer}"
        if layer in REMOVED:
            x = 2 * x
        else:
            qkv = dense(norm(x, f"{name}.norm1"), f"{name}.attn.qkv")
            q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
            mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + dense(mixed, f"{name}.attn.proj")
        x = x + dense(gelu(dense(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
    return dense(norm(x, "norm")[:, 0], "head")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """What names the classes and processes the images."""
    folder = tmp_path_factory.mktemp("base")
    label2id = {name: index for index, name in LABELS.items()}
    ViTConfig(id2label=LABELS, label2id=label2id).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 48, "width": 48}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(folder)
    return str(folder)


def released(folder, content=None, name="tiny_024.pth"):
    folder.mkdir(exist_ok=True)
    torch.save({"model": STATE} if content is None else content, folder / name)
    return folder / name


@pytest.fixture(scope="module")
def converted(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert")
    arguments = argparse.Namespace(lr=1e-3, output_dir="x")
    file = released(folder, {"model": STATE, "optimizer": {"step": 3}, "epoch": 399, "args": arguments})
    return file, convert_checkpoint(file, folder / "deit-t-nose25", base_model=base)


def test_logits_are_the_authors(converted):
    _, folder = converted
    model = AutoModelForImageClassification.from_pretrained(folder)
    pixel_values = torch.randn(5, 3, SIDE * PATCH, SIDE * PATCH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, ours = authors_forward(pixel_values), model(pixel_values).logits
    assert expected.std() > 0.1
    assert torch.allclose(ours, expected, atol=1e-4, rtol=1e-4)


def test_it_is_folded_and_owns_no_removed_attention(converted):
    _, folder = converted
    record = inspect_checkpoint(str(folder))
    assert record["layers"]["removed"] == record["layers"]["folded"] == REMOVED
    assert record["state"].startswith("folded") and record["num_attention_heads"] == HEADS
    config = json.loads((folder / "config.json").read_text())
    assert config["layer_norm_eps"] == 1e-6 and config["id2label"]["1"] == "goldfish"
    assert json.loads((folder / "preprocessor_config.json").read_text())["image_mean"] == [0.1, 0.2, 0.3]


def test_the_card_says_who_trained_it(converted):
    file, folder = converted
    card = ModelCard((folder / "README.md").read_text())
    assert "**Weights not trained by us.** The paper's authors trained them" in card.text
    assert sha256(file) in card.text and "`tiny_024.pth`" in card.text
    assert card.data.base_model == "facebook/deit-tiny-patch16-224" and card.data.eval_results is None
    assert card.data.license is None and "licence this card does not know" in card.text
    assert "| top-1 % | 72.2 | not measured | 72.5 | not measured |" in card.text
    assert "Accuracy and speed of these weights by us" in card.text
    record = json.loads((folder / "conversion.json").read_text())
    assert record["ignored_tensors"] == 18 and record["sha256"] == sha256(file)
    everything = "".join(path.read_text() for path in folder.iterdir() if path.suffix in (".json", ".md"))
    assert str(folder.parent) not in everything


@pytest.mark.parametrize(
    "stem, layers",
    [
        ("base_01346", [0, 1, 3, 4, 6]),
        ("base_013469", [0, 1, 3, 4, 6, 9]),
        ("small_024", [0, 2, 4]),
        ("small_0246", [0, 2, 4, 6]),
        ("tiny_024", [0, 2, 4]),
        ("base_0134610", [0, 1, 3, 4, 6, 10]),
        ("base_1011", [10, 11]),
    ],
)
def test_names_tell_size_and_layers(stem, layers):
    assert named(stem) == (stem.split("_")[0], layers)


def test_digits_that_can_be_read_twice():
    assert ascending("110") == [[1, 10]] and ascending("10") == [[10]] and ascending("210") == [[2, 10]]
    assert ascending("12") == [[1, 2]] and ascending("12", last=12) == [[1, 2], [12]]
    assert ascending("00") == [] and ascending("43") == []


@pytest.mark.parametrize("stem", ["base", "base_", "base_10_4", "base_43", "base_x", "base_best"])
def test_names_that_tell_no_layers(stem):
    with pytest.raises(ValueError, match="give them, such as --layers"):
        named(stem)


def test_the_verb_takes_layers_and_the_default_name(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = released(tmp_path, STATE, "tiny_best.pth")
    assert main(["convert", str(file), "--layers", "4,0,2", "--base_model", base]) == OK
    assert capsys.readouterr().out == "Written to deit-t-nose25\n"
    assert inspect_checkpoint("deit-t-nose25")["layers"]["folded"] == REMOVED
    assert main(["convert", str(file), "--layers", "4,0,2", "--base_model", base]) == BAD_INPUT
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "stem, hidden, name",
    [
        ("base_01346", 768, "deit-b-nose40"),
        ("base_013469", 768, "deit-b-nose50"),
        ("small_024", 384, "deit-s-nose25"),
        ("small_0246", 384, "deit-s-nose30"),
        ("tiny_024", 192, "deit-t-nose25"),
    ],
)
def test_a_released_file_and_the_string_that_everything_shares(stem, hidden, name, tmp_path, monkeypatch, capsys):
    """Folder, card, recipe and repository are called alike; the sizes are the real ones but for the MLP's."""
    monkeypatch.chdir(tmp_path)
    # In the place of the Hub's, which is taken where no --base_model is given.
    size = {768: "base", 384: "small", 192: "tiny"}[hidden]
    base = tmp_path / "facebook" / f"deit-{size}-patch16-224"
    ViTConfig(num_labels=CLASSES).save_pretrained(base)
    ViTImageProcessorPil(size={"height": 48, "width": 48}).save_pretrained(base)
    # One number a tensor, seen as many.
    sizes = {HIDDEN: hidden, 3 * HIDDEN: 3 * hidden, 4 * HIDDEN: 8}
    state = {
        key: torch.tensor(0.01).expand([sizes.get(length, length) for length in tensor.shape])
        for key, tensor in STATE.items()
    }
    file = released(tmp_path, {"model": state}, f"{stem}.pth")
    assert main(["convert", str(file), "--json"]) == OK
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["output_dir"] == name and {"README.md", "model.safetensors", "conversion.json"} <= set(said["files"])
    assert "modeling_nose_vit.py" in said["files"]
    assert said["files"] == {path.name: path.stat().st_size for path in (tmp_path / name).iterdir()}
    record = inspect_checkpoint(name)
    assert record["layers"]["removed"] == record["layers"]["folded"] == named(stem)[1]
    assert record["hidden_size"] == hidden and record["num_attention_heads"] == hidden // 64
    card = (tmp_path / name / "README.md").read_text()
    assert f"\n# {name}\n" in card and f'"YOUR_NAME/{name}"' in card and not is_own(card)
    assert (ROOT / "model_cards" / f"{name}.md").is_file() and recipe_path(name).is_file()
    assert main(["push", name, "--dry_run", "--json"]) == OK
    assert json.loads(capsys.readouterr().out)["repo_id"] == name


def test_an_export_of_what_was_converted_says_who_trained_it(converted, tmp_path):
    _, folder = converted
    out = export_folder(folder, tmp_path / "out")
    assert (out / "README.md").read_bytes() == (folder / "README.md").read_bytes()
    assert (out / "modeling_nose_vit.py").is_file()


class Attack:
    """A pickle that would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_a_pickle_that_would_run_something_is_refused(base, tmp_path, protocol):
    file, trace = tmp_path / "tiny_024.pth", tmp_path / "trace"
    content = {"model": STATE, "args": Attack(trace)}
    torch.save(content, file) if protocol == "torch" else file.write_bytes(pickle.dumps(content, 2))
    with pytest.raises(ValueError, match="nothing in it was run"):
        convert_checkpoint(file, tmp_path / "out", base_model=base)
    assert not trace.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ([1, 2], "must hold tensors by name"),
        ({"model": {"a": 3}}, "must hold tensors by name"),
        ({"model": {}}, "is not in timm's layout"),
        ({name: tensor for name, tensor in STATE.items() if name != "pos_embed"}, r"lacks \['pos_embed'\]"),
        ({name: tensor for name, tensor in STATE.items() if "blocks" not in name}, r"lacks \['blocks.0'\]"),
        ({name: tensor for name, tensor in STATE.items() if name != "blocks.3.norm2.bias"}, "1 tensors are missing"),
        ({name: tensor for name, tensor in STATE.items() if name != "blocks.3.norm1.bias"}, "1 tensors are missing"),
        ({**STATE, "blocks.3.more.weight": torch.ones(2)}, "1 tensors are missing, unknown"),
        ({**STATE, "norm.bias": torch.ones(7)}, "another shape: .*layernorm.bias"),
        ({**STATE, "head.weight": torch.ones(9, HIDDEN)}, "base_model must name 9 classes, got 4"),
        ({**STATE, "head.weight": torch.ones(CLASSES, 384)}, "of width 192; its tensors 384"),
    ],
)
def test_other_files_are_refused_and_nothing_is_written(base, tmp_path, content, message):
    file = released(tmp_path / "in", content)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(file, tmp_path / "out", base_model=base)
    assert not (tmp_path / "out").exists()


def test_a_cut_file_is_refused(base, tmp_path):
    file = released(tmp_path)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="or damaged"):
        convert_checkpoint(file, tmp_path / "out", base_model=base)


def test_removed_attention_may_be_absent(base, tmp_path):
    gone = tuple(f"blocks.{layer}.{part}" for layer in REMOVED for part in ("attn", "norm1"))
    file = released(tmp_path, {name: tensor for name, tensor in STATE.items() if not name.startswith(gone)})
    folder = convert_checkpoint(file, tmp_path / "out", base_model=base)
    assert json.loads((folder / "conversion.json").read_text())["ignored_tensors"] == 0
