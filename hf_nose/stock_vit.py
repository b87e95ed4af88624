"""The bare line: the folded weights as a plain `vit`, for whoever may run no code but transformers' own."""

from __future__ import annotations

import copy
import os
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import ModelCardData
from transformers import ViTConfig, ViTForImageClassification

from .card_text import CARD, LIBRARY, NOBODY, TAGS, marked, repository_name
from .configuration_nose_vit import NoseViTConfig
from .conversion_nose_vit import base_names
from .export import Card, exported, known_id, save_checkpoint
from .export_onnx import TOLERANCE, noise_images
from .export_source import open_source
from .files import write_text
from .inspection import words
from .modeling_nose_vit import NoseViTForImageClassification
from .records import Records


def to_stock_vit(model: NoseViTForImageClassification) -> ViTForImageClassification:
    """
    A plain [`ViTForImageClassification`] that computes what a dense or folded `model` does: where attention is gone
    it gets one whose output projection is zero, so that nothing is saved, neither memory nor time.

    Raises:
        `ValueError`: where some layer is diluted or doubles the stream, which a plain ViT cannot do.
        `ArithmeticError`: where the logits on seeded noise differ by more than 1e-5 of the greatest. A plain ViT has
            one `layer_norm_eps`, a folded model `eps / s^2`: with a large one they are not the same function.
    """
    config = model.config
    layers = sorted({*config.diluted_attention_layers, *config.compensated_attention_layers})
    if layers:
        raise ValueError(
            f"stock-vit takes dense and folded models, but layers {layers} are diluted or double the stream. Finish "
            "the dilution, set_mask(0.0), and fold first."
        )
    stock = ViTForImageClassification._from_config(stock_config(config), dtype=model.dtype).eval()
    state = base_names(model)
    with torch.no_grad():
        for name, tensor in base_names(stock).items():
            # Of a removed layer there is nothing to copy: no weights but a norm that changes nothing.
            if name in state:
                tensor.copy_(state[name])
            else:
                tensor.fill_(1.0 if name.endswith("layernorm_before.weight") else 0.0)
    check_same_logits(model, stock)
    return stock


def stock_config(config: NoseViTConfig) -> ViTConfig:
    """What a plain ViT knows of a configuration."""
    known = ViTConfig().to_dict().keys() | {"id2label", "label2id", "problem_type"}
    values = {name: value for name, value in config.to_dict().items() if name in known}
    for name in ("model_type", "architectures", "transformers_version", "chunk_size_feed_forward"):
        values.pop(name, None)
    return ViTConfig(**values)


def check_same_logits(model: NoseViTForImageClassification, stock: ViTForImageClassification) -> None:
    """`ArithmeticError` where the two differ on seeded noise; halves by what their precision holds."""
    images = noise_images(model, 3).to(model.dtype)
    ours = copy.deepcopy(model).cpu().eval()
    with torch.no_grad():
        wanted, found = ours(images).logits.float(), stock(images).logits.float()
    difference = float((found - wanted).abs().max() / wanted.abs().max())
    allowed = max(TOLERANCE, 2 * torch.finfo(model.dtype).eps)
    if not difference <= allowed:
        raise ArithmeticError(
            f"A plain ViT's logits would differ by {difference:.3g} of the greatest, at most {allowed:.3g} is allowed "
            f"(layer_norm_eps {model.config.layer_norm_eps}; folding divided it where the stream was scaled). Nothing "
            "was kept; export as hf."
        )


def export_stock_vit(
    source: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    base_model_id: str | None = None,
    card: Card | None = None,
    overwrite: bool = False,
) -> Path:
    """
    Writes a folder that loads by `AutoModel.from_pretrained` with nothing but transformers: no code in it, no flag.

    Arguments and errors are those of [`~hf_nose.export.export_folder`], and `ValueError` and `ArithmeticError` those
    of [`to_stock_vit`]. Returns the folder.
    """
    opened = open_source(source)
    with exported(opened, output_dir, overwrite) as folder:
        model = opened.load()
        save_checkpoint(opened, to_stock_vit(model), folder)
        base = known_id(base_model_id, opened.records, "model", "base_model_id")
        card = card or partial(stock_card, name=opened.name)
        write_text(folder / CARD, marked(card(folder, model.config, opened.records, base)))
    return Path(output_dir)


def stock_card(
    folder: Path, config: NoseViTConfig, records: Records, base_model_id: str | None, name: str = "nose-vit"
) -> str:
    """A card that says what this form costs."""
    data = ModelCardData(
        library_name=LIBRARY, pipeline_tag="image-classification", tags=list(TAGS), base_model=base_model_id
    )
    repo = f"{NOBODY}/{repository_name(name)}"
    parts = [
        f"---\n{data.to_yaml()}\n---",
        "# Vision Transformer compressed by hf_nose, as a plain ViT",
        f"Of {config.num_hidden_layers} attention layers, removed: {words(config.removed_attention_layers)}.",
        "This form loads with nothing but transformers. **It saves nothing**: where attention was removed there is "
        "one again, with an output projection of zero, which costs parameters, memory and time like any other. The "
        "compressed checkpoint is the ordinary form.",
        "```python\nfrom transformers import AutoModelForImageClassification\n\n"
        f'model = AutoModelForImageClassification.from_pretrained("{repo}")\n```',
        "`AutoModel.from_pretrained` gives a `ViTModel`, which has a pooler that this checkpoint lacks: transformers "
        "reports it missing and draws it at random. Use `last_hidden_state`, not `pooler_output`.",
    ]
    return "\n\n".join(parts) + "\n"
