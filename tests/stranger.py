"""Loads exported folders in a process of its own, as somebody who has heard of transformers alone (or of hf_nose)."""

import json
import sys
from pathlib import Path


class NotInstalled:
    """hf_nose cannot be imported, wherever it may lie."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_nose":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


HOW, ROOT = sys.argv[1], Path(sys.argv[2])
if HOW == "remote":
    sys.meta_path.insert(0, NotInstalled())
    OPTIONS = {"trust_remote_code": True}
else:
    import hf_nose

    OPTIONS = {}

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module  # noqa: E402
from transformers.utils import logging  # noqa: E402


logging.set_verbosity_error()


def check_loading(folder, wanted):
    """Every Auto class but AutoBackbone, which asks the Hub for an id; bit for bit."""
    images = wanted["images"]
    config = AutoConfig.from_pretrained(folder, **OPTIONS)
    assert config.model_type == "nose_vit"
    model, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True, **OPTIONS)
    assert not any(info.values()), info
    bare, info = AutoModel.from_pretrained(folder, output_loading_info=True, **OPTIONS)
    assert not info["missing_keys"] and info["unexpected_keys"] == {"classifier.weight", "classifier.bias"}, info
    processor = AutoImageProcessor.from_pretrained(folder, **OPTIONS)
    picture = Image.fromarray(wanted["picture"].numpy())
    assert torch.equal(processor(picture, return_tensors="pt").pixel_values, wanted["pixels"])
    if HOW == "remote":
        backbone_class = get_class_from_dynamic_module("backbone_nose_vit.NoseViTBackbone", str(folder))
    else:
        backbone_class = hf_nose.NoseViTBackbone
    backbone = backbone_class.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(model(images).logits, wanted["logits"])
        assert torch.equal(bare(images).last_hidden_state, wanted["tokens"])
        assert torch.equal(backbone(images).feature_maps[-1], wanted["map"])
    found = pipeline("image-classification", model=str(folder), **OPTIONS)(picture)
    scores = {line["label"]: line["score"] for line in found}
    assert [scores[f"LABEL_{index}"] for index in range(5)] == wanted["scores"].tolist(), (found, wanted["scores"])
    if config.diluted_attention_layers:
        values = model.vit.mask_values()
        assert values == [torch.tensor(0.37).item()] * 3
        model.set_mask(0)
        with torch.no_grad():
            assert torch.equal(model(images).logits, wanted["logits_at_zero"])


def check_saving_again(folder, out, wanted):
    """What was loaded by remote code and saved loads as everything that its configuration names."""
    for auto in (AutoModel, AutoModelForImageClassification):
        again = out / auto.__name__
        auto.from_pretrained(folder, **OPTIONS).save_pretrained(again)
        code = {path.name: path.read_bytes() for path in folder.glob("*.py")}
        assert {path.name: path.read_bytes() for path in again.glob("*.py")} == code
        auto_map = json.loads((again / "config.json").read_text())["auto_map"]
        assert auto_map == json.loads((folder / "config.json").read_text())["auto_map"]
        bare = AutoModel.from_pretrained(again, **OPTIONS)
        backbone_class = get_class_from_dynamic_module(auto_map["AutoBackbone"], str(again))
        # As AutoBackbone does.
        backbone_class.register_for_auto_class("AutoBackbone")
        backbone = backbone_class.from_pretrained(again)
        with torch.no_grad():
            assert torch.equal(bare(wanted["images"]).last_hidden_state, wanted["tokens"])
            assert torch.equal(backbone(wanted["images"]).feature_maps[-1], wanted["map"])
        backbone.save_pretrained(out / "backbone")
        assert {path.name for path in (out / "backbone").glob("*.py")} == set(code)


class Pictures(torch.utils.data.Dataset):
    """What a data set with the stock example's transform gives."""

    def __init__(self, processor, count=12):
        generator = np.random.default_rng(0)
        pictures = [Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(count)]
        self.pixels = processor(pictures, return_tensors="pt").pixel_values

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return {"pixel_values": self.pixels[index], "labels": index % 3}


def collate(examples):
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }


def top1(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def train(model, images, folder):
    """The stock loop."""
    arguments = TrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        remove_unused_columns=False,
        save_steps=2,
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model, arguments, train_dataset=images, eval_dataset=images, data_collator=collate, compute_metrics=top1
    )
    trainer.train()
    assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1
    trainer.save_model()
    return trainer


def check_fine_tuning(folder, out):
    """A new head of three classes, the Trainer, and what it saved loaded again; then the same by LoRA."""
    labels = dict(enumerate(("cat", "dog", "fox")))
    names = {"id2label": labels, "label2id": {name: index for index, name in labels.items()}}
    config = AutoConfig.from_pretrained(folder, num_labels=3, **names, **OPTIONS)
    images = Pictures(AutoImageProcessor.from_pretrained(folder, **OPTIONS))

    def new_model():
        torch.manual_seed(0)
        return AutoModelForImageClassification.from_pretrained(
            folder, config=config, ignore_mismatched_sizes=True, **OPTIONS
        )

    model = new_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, images, out / "whole")
    assert all(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    for saved in (out / "whole", out / "whole" / "checkpoint-4"):
        again = AutoModelForImageClassification.from_pretrained(saved, **OPTIONS)
        state = again.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
        assert again.config.id2label == labels
        assert again.config.removed_attention_layers == model.config.removed_attention_layers

    from peft import LoraConfig, PeftModel, get_peft_model

    lora = LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"], r=2)
    adapted = get_peft_model(new_model(), lora)
    start = {name: parameter.detach().clone() for name, parameter in adapted.named_parameters()}
    train(adapted, images, out / "lora")
    moved = {name for name, parameter in adapted.named_parameters() if not torch.equal(start[name], parameter)}
    assert moved == {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    loaded = PeftModel.from_pretrained(new_model(), out / "lora").eval()
    with torch.no_grad():
        wanted = adapted.eval()(pixel_values=images.pixels).logits
        assert torch.allclose(loaded(pixel_values=images.pixels).logits, wanted, atol=1e-6)
        merged = loaded.merge_and_unload()
        assert torch.allclose(merged(images.pixels).logits, wanted, atol=1e-5)


def main():
    for kind in ("dense", "half-diluted", "folded"):
        check_loading(ROOT / kind, load_file(ROOT / f"{kind}.safetensors"))
    if HOW == "remote":
        for kind in ("half-diluted", "folded"):
            check_saving_again(ROOT / kind, ROOT / f"{kind}-again", load_file(ROOT / f"{kind}.safetensors"))
        check_fine_tuning(ROOT / "folded", ROOT / "trained")
    print(json.dumps({"remote": any(name.startswith("transformers_modules.") for name in sys.modules)}))


if __name__ == "__main__":
    main()
