"""An exported folder in a fresh process, offline, with an empty cache: with hf_nose, and without it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exported import KINDS, checkpoint, processor
from PIL import Image
from reference_vit import images
from safetensors.torch import save_file
from transformers import ImageClassificationPipeline

from hf_nose import NoseViTBackbone, NoseViTForImageClassification
from hf_nose.export import export_folder


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """A dense, a half-diluted and a folded model, each with what it gives in this process."""
    root = tmp_path_factory.mktemp("exports")
    generator = torch.Generator().manual_seed(3)
    picture = torch.randint(0, 256, (20, 16, 3), generator=generator, dtype=torch.uint8)
    for kind in KINDS:
        source = checkpoint(root / f"{kind}-source", kind)
        export_folder(source, root / kind)
        # Loaded as well: where weights lie in memory decides the last bit of some sums.
        model = NoseViTForImageClassification.from_pretrained(source)
        found = ImageClassificationPipeline(model=model, image_processor=processor())(Image.fromarray(picture.numpy()))
        scores = {line["label"]: line["score"] for line in found}
        with torch.no_grad():
            wanted = {
                "images": images(),
                "picture": picture,
                "pixels": processor()(Image.fromarray(picture.numpy()), return_tensors="pt").pixel_values,
                "logits": model(images()).logits,
                "tokens": model.vit(images()).last_hidden_state,
                "map": NoseViTBackbone.from_pretrained(source)(images()).feature_maps[-1],
                "scores": torch.tensor([scores[f"LABEL_{index}"] for index in range(5)], dtype=torch.float64),
            }
            if kind == "half-diluted":
                model.set_mask(0)
                wanted["logits_at_zero"] = model(images()).logits
        save_file({name: tensor.contiguous() for name, tensor in wanted.items()}, root / f"{kind}.safetensors")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("how", ["remote", "installed"])
def test_a_stranger_loads_it_bit_for_bit(how, exports, tmp_path):
    """Without hf_nose also fine-tuned by the stock Trainer and by peft."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_TOKEN")}
    environment |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    if how == "installed":
        environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "stranger.py"), how, str(exports)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"remote": how == "remote"}
