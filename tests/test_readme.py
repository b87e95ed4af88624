"""README.md says nothing that the committed JSON and the files do not."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference_vit import images, logits, nose
from transformers import AutoImageProcessor, AutoModelForImageClassification


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import render_results  # noqa: E402


README = (ROOT / "README.md").read_text(encoding="utf-8")


def part(name: str) -> str:
    return README.split(f"<!-- {name}: begin", 1)[1].split("-->\n", 1)[1].split(f"<!-- {name}: end -->", 1)[0]


def numbers_in(value) -> list[float]:
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers_in(item)]
    if isinstance(value, list):
        return [number for item in value for number in numbers_in(item)]
    return [float(value)] if isinstance(value, int | float) and not isinstance(value, bool) else []


def test_every_recipe_that_is_named_is_there():
    head = README.split("## What a run leaves")[0]
    named = set(re.findall(r"`(?:--recipe )?((?:deit|cifar)-[\w-]+|short|cifar)`", head))
    recipes = {path.stem for path in (ROOT / "hf_nose" / "recipes").glob("*.yaml")}
    assert named | {"digits"} == recipes | {"cifar"} and len(named) > 7
    assert not re.search(r"`[\w-]*\{[\w,]+\}[^`]*`", README)


def test_generated_parts_are_current():
    assert render_results.rendered(README) == README


def test_every_measured_number_stands_in_the_json():
    folder = ROOT / "model_cards" / "results" / "digits"
    known = [number for path in folder.rglob("*.json") for number in numbers_in(json.loads(path.read_text()))]
    shown = {
        f"{scale * number:{form}}" for number in known for scale in (1, 100, 1e-6) for form in (".1f", ".2f", ",.0f")
    }
    rows = [line for line in part("results").splitlines() if line.startswith("|")]
    cells = [cell for row in rows for cell in row.split("|")[2:]]
    figures = re.findall(r"\d[\d,]*\.?\d*", " ".join(cells).replace(", ", " ; "))
    assert len(figures) > 30
    missing = [figure for figure in figures if figure not in shown]
    assert not missing


def test_a_number_typed_by_hand_is_noticed():
    forged = README.replace("|---|---|---|---|---|---|\n| dense | ", "|---|---|---|---|---|---|\n| dense | 9", 1)
    assert forged != README
    assert render_results.rendered(forged) != forged


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
def test_code_blocks_compile(block):
    compile(block, "README.md", "exec")


@pytest.mark.slow
def test_the_lines_of_python_run(deit_tiny, imagenet, tmp_path, monkeypatch):
    """Word for word, but for a smaller model and fewer images from a local file."""
    block = next(code for code in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL) if "fold(" in code)
    for old, new in (
        ("facebook/deit-base-patch16-224", str(deit_tiny)),
        (
            'load_dataset("ILSVRC/imagenet-1k", split="train", ',
            f'load_dataset("parquet", data_files="{imagenet}/*.parquet", split="train", ',
        ),
        ("take(256).batch(32)", "take(6).batch(4)"),
    ):
        assert block.count(old) == 1, old
        block = block.replace(old, new)
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "deit-b-nose40")
    assert len(model.config.removed_attention_layers) == 5
    assert AutoImageProcessor.from_pretrained(tmp_path / "deit-b-nose40", backend="pil").size["height"] == 224


@pytest.mark.slow
def test_the_lines_on_speed_run_and_change_no_logit():
    block = next(code for code in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL) if "fuse_qkv" in code)
    # Inductor needs a C++ compiler.
    assert block.count("fullgraph=True") == 1
    block = block.replace("fullgraph=True", 'fullgraph=True, backend="aot_eager"')
    model, pixel_values = nose(), images(6)
    expected = logits(model, pixel_values)
    names = {"model": model, "pixel_values": pixel_values}
    exec(block, names)
    with torch.no_grad():
        for made in (logits(model, pixel_values), names["compiled"](pixel_values).logits):
            assert torch.allclose(made, expected, rtol=1e-5, atol=1e-5)
    assert (model.config.class_token_tail, model.config.chunk_size_attention) == (False, 4)
    assert model.config.chunk_size_feed_forward == 788


def test_every_file_has_a_line_in_the_tree():
    tree = part("files")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    # Results and the README itself stand for themselves.
    for name in tracked:
        if not name.startswith("model_cards/") and name not in ("README.md", ".gitignore"):
            shown = re.sub(
                r"^(hf_nose/recipes|hf_nose|scripts/accelerate|scripts|tests)/(?=.*\.(py|yaml)$)", "  ", name
            )
            assert re.search(rf"^{re.escape(shown)} +\S", tree, flags=re.MULTILINE), name
