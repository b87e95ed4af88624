"""
What people do with checkpoints on the Hub, typed in a fresh process: `hub_client.py installed|remote FOLDER`.

`installed` has hf_nose: it pushes, loads without trust_remote_code, folds what was half-diluted and pushes that too.
`remote` has never heard of hf_nose and trusts the code that comes with the weights.
"""

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    pipeline,
)


mode, folder = sys.argv[1], Path(sys.argv[2])
torch.set_num_threads(1)
expected, answers = load_file(folder / "expected.safetensors"), json.loads((folder / "answers.json").read_text())
picture = Image.open(folder / "picture.png").convert("RGB")
pixels, kinds = expected["pixels"], ["dense", "diluted", "folded"]

if mode == "installed":
    from pushable import exported

    from hf_nose import fold
    from hf_nose.cli import main

    trust, home = {}, "hf_nose."
    for kind in kinds:
        assert main(["push", str(folder / kind), "--repo_id", f"you/{kind}"]) == 0
else:
    # However it is installed, from here on it is not.
    assert "hf_nose" not in sys.modules
    sys.modules["hf_nose"] = None
    try:
        import hf_nose  # noqa: F401
    except ModuleNotFoundError:
        trust, home = {"trust_remote_code": True}, "transformers_modules.you."
    kinds.append("refolded")


def same(found, name):
    """Bit for bit."""
    assert found.dtype == expected[name].dtype and torch.equal(found, expected[name]), name


with torch.no_grad():
    for kind in kinds:
        repo_id = f"you/{kind}"
        config = AutoConfig.from_pretrained(repo_id, **trust)
        assert type(config).__module__.startswith(home) and config.model_type == "nose_vit"

        bare, loading = AutoModel.from_pretrained(repo_id, output_loading_info=True, **trust)
        assert not loading["missing_keys"] and type(bare).__name__ == "NoseViTModel"
        same(bare.eval()(pixels).last_hidden_state, f"{kind}.hidden")

        model = AutoModelForImageClassification.from_pretrained(repo_id, **trust).eval()
        assert type(model).__module__.startswith(home)
        same(model(pixels).logits, f"{kind}.logits")

        processor = AutoImageProcessor.from_pretrained(repo_id, **trust)
        same(processor(picture, return_tensors="pt").pixel_values, "processed")
        assert pipeline("image-classification", repo_id, **trust)(str(folder / "picture.png")) == answers[kind]

        if mode == "remote":
            # From here the backbone's code came along although only the classifier was asked for.
            model.save_pretrained(folder / "again" / kind)
            assert (folder / "again" / kind / "backbone_nose_vit.py").is_file()

        backbone = AutoBackbone.from_pretrained(repo_id, out_indices=[1, 4], **trust).eval()
        for number, feature_map in enumerate(backbone(pixels).feature_maps):
            same(feature_map, f"{kind}.map{number}")

        if kind == "diluted":
            assert model.vit.mask_values() == [torch.tensor(0.37).item()] * 2
            same(model.vit.dilution_mask, "mask")
            model.set_mask(0)
            assert model.vit.is_mask_zero
            same(model(pixels).logits, "masked.logits")
            if mode == "installed":
                exported(folder / "refolded", fold(model))
                assert main(["push", str(folder / "refolded"), "--repo_id", "you/refolded", "--private"]) == 0
print(f"{mode}: {' '.join(kinds)} are the same")
