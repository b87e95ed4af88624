"""From a folder to the Hub and back into a fresh process: with hf_nose, and where nobody has heard of it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_stand_in import HubStandIn
from PIL import Image
from pushable import exported, tiny_nose_vit
from safetensors.torch import save_file
from transformers import pipeline

from hf_nose import NoseViTBackbone, NoseViTForImageClassification, fold
from hf_nose.images import digits_processor, load_processor


TESTS = Path(__file__).resolve().parent


@torch.no_grad()
def prepare(folder: Path) -> None:
    """
    Folders to push, and what their models make of noise and of a picture. Models loaded from them: the last bit
    of a product depends on where in memory its factors lie, so that the model before it was saved may differ in it.
    """
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "picture.png")
    picture = Image.open(folder / "picture.png").convert("RGB")
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    masked = tiny_nose_vit("diluted")
    expected = {"mask": masked.vit.dilution_mask.clone(), "pixels": pixels}
    expected["processed"] = digits_processor()(picture, return_tensors="pt").pixel_values
    masked.set_mask(0.0)
    unsaved = {kind: tiny_nose_vit(kind) for kind in ("dense", "diluted", "folded")} | {"refolded": fold(masked)}
    answers = {}
    for kind, before in unsaved.items():
        source = exported(folder / kind, before)
        model = NoseViTForImageClassification.from_pretrained(source).eval()
        expected[f"{kind}.logits"] = model(pixels).logits
        torch.testing.assert_close(expected[f"{kind}.logits"], before(pixels).logits)
        expected[f"{kind}.hidden"] = model.vit(pixels).last_hidden_state
        backbone = NoseViTBackbone.from_pretrained(source, out_indices=[1, 4]).eval()
        expected |= {f"{kind}.map{n}": each for n, each in enumerate(backbone(pixels).feature_maps)}
        classify = pipeline("image-classification", model, image_processor=load_processor(source))
        answers[kind] = classify(str(folder / "picture.png"))
        if kind == "diluted":
            model.set_mask(0.0)
            expected["masked.logits"] = model(pixels).logits
    assert len({json.dumps(answer) for answer in answers.values()}) == len(answers), "the models can be told apart"
    save_file({name: value.contiguous() for name, value in expected.items()}, folder / "expected.safetensors")
    (folder / "answers.json").write_text(json.dumps(answers))
    # This one is made again by whoever folds the half-diluted one from the Hub.
    shutil.rmtree(folder / "refolded")
    shutil.rmtree(folder / "refolded-source")


@pytest.mark.slow
def test_what_is_pushed_loads_bit_for_bit_with_hf_nose_and_without(tmp_path):
    prepare(tmp_path)
    with HubStandIn() as hub:
        for mode, kinds in (("installed", "dense diluted folded"), ("remote", "dense diluted folded refolded")):
            environ = hub.environ(tmp_path / f"home of {mode}")
            if mode == "installed":
                environ["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS)])
            command = [sys.executable, str(TESTS / "hub_client.py"), mode, str(tmp_path)]
            done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=280)
            assert done.returncode == 0, done.stderr
            assert done.stdout.splitlines()[-1] == f"{mode}: {kinds} are the same"
            assert "missing" not in done.stderr.lower() and "newly initialized" not in done.stderr
        pushes = {name: repository.titles() for (_, name), repository in hub.repositories.items()}
        assert {name: len(titles) for name, titles in pushes.items()} == {
            f"you/{kind}": 2 for kind in ("dense", "diluted", "folded", "refolded")
        }
        assert hub.repository("you/refolded").private
