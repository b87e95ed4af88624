"""The packaged recipes: each loads and does a dry run with nothing but --model and --dataset of its own."""

import io
import json

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image
from transformers import ViTConfig, ViTImageProcessorPil

from hf_nose import NoseViTConfig, NoseViTForImageClassification
from hf_nose.command_line import parse_job, parse_settings, read_recipe, recipe_path
from hf_nose.run import run_job
from hf_nose.transfer import transfer_job
from hf_nose.transfer_settings import TransferSettings


MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SIZES = {"b": (768, 12), "s": (384, 6), "t": (192, 3)}
# Parameters in millions, dense and compressed, as METHOD counts them; stochastic depth; the set of layers.
IMAGENET = {
    "deit-b-nose40": ("86.57", "74.75", "constant", "[0, 1, 3, 4, 6], 5 of 12"),
    "deit-b-nose50": ("86.57", "72.38", "constant", "[0, 1, 3, 4, 6, 9], 6 of 12"),
    "deit-s-nose25": ("22.05", "20.27", "linear", "[0, 2, 4], 3 of 12"),
    "deit-s-nose30": ("22.05", "19.68", "linear", "[0, 2, 4, 6], 4 of 12"),
    "deit-s-nose40": ("22.05", "19.09", "linear", "to be searched, 5 of 12"),
    "deit-t-nose25": ("5.72", "5.27", "linear", "[0, 2, 4], 3 of 12"),
    "deit-t-nose30": ("5.72", "5.12", "linear", "[0, 2, 4, 6], 4 of 12"),
}


def vit(folder, size):
    """A configuration of the recipe's shape, whose weights are random, with DeiT's image processor beside it."""
    folder.mkdir()
    hidden, heads = SIZES[size]
    ViTImageProcessorPil(size={"height": 224, "width": 224}, image_mean=MEAN, image_std=STD).save_pretrained(folder)
    shape = {"hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": 4 * hidden}
    (folder / "config.json").write_text(json.dumps({"model_type": "vit", "num_hidden_layers": 12, **shape}))
    return folder / "config.json"


def encoded(mode, form, seed):
    """An image file; not all images of ImageNet are RGB."""
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format=form)
    return {"bytes": file.getvalue(), "path": f"{seed}.JPEG"}


@pytest.fixture(scope="module")
def imagenet_layout(tmp_path_factory):
    """Parquet files as in ILSVRC/imagenet-1k."""
    folder = tmp_path_factory.mktemp("imagenet") / "data"
    folder.mkdir()
    label = datasets.ClassLabel(names=[f"class {number}" for number in range(1000)])
    features = datasets.Features({"image": datasets.Image(decode=False), "label": label})
    kinds = [("RGB", "jpeg"), ("L", "jpeg"), ("CMYK", "jpeg"), ("RGB", "png")]
    for split, shards in (("train", 2), ("validation", 1)):
        for shard in range(shards):
            cells = [encoded(*kind, seed=shard) for kind in kinds]
            made = datasets.Dataset.from_dict({"image": cells, "label": [7, 999, 0, 500]}, features=features)
            made.to_parquet(folder / f"{split}-{shard:05d}-of-{shards:05d}.parquet")
    return folder


@pytest.fixture(scope="module")
def cifar100_layout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cifar100")
    names = {"fine_label": 100, "coarse_label": 20}
    labels = {name: datasets.ClassLabel(num_classes=count) for name, count in names.items()}
    features = datasets.Features({"img": datasets.Image(decode=False), **labels})
    columns = {"img": [encoded("RGB", "png", seed) for seed in range(4)], **{name: [0, 1, 2, 3] for name in names}}
    for split in ("train", "test"):
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def dry_run(recipe, model, dataset, *more):
    run_job(parse_settings(["--recipe", recipe, "--dry_run", f"--model={model}", f"--dataset={dataset}", *more]))


def test_every_recipe_is_looked_at_here():
    folder = recipe_path("digits").parent
    assert {path.stem for path in folder.glob("*.yaml")} >= {"digits", "cifar", "cifar-probe", *IMAGENET}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", IMAGENET)
def test_imagenet_recipes_do_a_dry_run(imagenet_layout, tmp_path, monkeypatch, capsys, recipe):
    monkeypatch.chdir(tmp_path)
    dense, compressed, depth, layers = IMAGENET[recipe]
    dry_run(recipe, vit(tmp_path / "model", recipe[5]), imagenet_layout)
    words = capsys.readouterr().out
    for line in (
        f"Layers: {layers}",
        f"Parameters: {dense} M -> {compressed} M",
        f"drop_path_schedule: {depth}",
        # Eight images are one step an epoch.
        "M at step 0: 1.000, 100: 0.666, 200: 0.331, 300: 0.000, 399: 0.000, of 400 steps; compensation on",
        "adamw, learning rate 0.000125 = 0.0005 x 128 images a step / 512; warm-up 5 (epochs), "
        "then a cosine to 1e-05; no clipping",
        "(1, 3, 224, 224) -> (1, 1000), finite: True",
    ):
        assert line in words, words
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("recipe", IMAGENET)
def test_imagenet_recipes_differ_only_in_model_layers_and_stochastic_depth(recipe):
    own = ("model", "layers", "ratio", "drop_path_schedule")
    values = [read_recipe(recipe_path(name)) for name in (recipe, "deit-b-nose40")]
    assert [{k: v for k, v in each.items() if k not in own} for each in values][0] == {
        k: v for k, v in values[1].items() if k not in own
    }


def test_imagenet_recipes_hold_the_published_numbers():
    settings = parse_settings(["--recipe", "deit-b-nose40"])
    published = {
        "model": "facebook/deit-base-patch16-224",
        "dataset": "ILSVRC/imagenet-1k",
        "epochs": 400.0,
        "decay": 300.0,
        "unit": "epoch",
        "optimizer": "adamw",
        "min_learning_rate": 1e-5,
        "weight_decay": 0.05,
        "warmup": 5.0,
        "label_smoothing": 0.1,
        "mixup": 0.8,
        "cutmix": 1.0,
        "rand_augment": 9.0,
        "random_erasing": 0.25,
        "crop": "random_resized",
        "repeated_augmentation": 3,
        "ema_decay": 0.99996,
        "drop_path_rate": 0.1,
        "max_grad_norm": 0.0,
    }
    assert {name: getattr(settings, name) for name in published} == published
    # 8 x 128 images give the paper's peak.
    assert settings.base_learning_rate * 8 * settings.batch_size / 512 == pytest.approx(1e-3)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """A random model of DeiT-T's shape, compressed, as a folder."""
    folder = tmp_path_factory.mktemp("compressed") / "model"
    config = json.loads(vit(folder, "t").read_text())
    options = {"removed_attention_layers": [0, 2, 4], "folded_attention_layers": [0, 2, 4]}
    NoseViTForImageClassification(NoseViTConfig.from_vit(ViTConfig(**config), **options)).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "trained"), [("cifar", "5,097,892 of 5,097,892"), ("cifar-probe", "19,300 of 5,097,892")]
)
def test_cifar_recipes_transfer_by_sgd(compressed, cifar100_layout, tmp_path, monkeypatch, capsys, recipe, trained):
    monkeypatch.chdir(tmp_path)
    words = ["--recipe", recipe, f"--model={compressed}", f"--dataset={cifar100_layout}"]
    settings = parse_job(TransferSettings, words)
    assert (settings.optimizer, settings.learning_rate, settings.batch_size) == ("sgd", 0.1, 384)
    assert settings.base_learning_rate is None and settings.linear_probe == (recipe == "cifar-probe")
    transfer_job(parse_job(TransferSettings, [*words, "--dry_run"]))
    words = capsys.readouterr().out
    assert f"Trainable parameters: {trained}" in words
    assert "(1, 3, 224, 224) -> (1, 100), finite: True" in words
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_short_recipe_does_a_dry_run_where_none_is_named(cifar100_layout, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [f"--model={vit(tmp_path / 'vit', 't')}", f"--dataset={cifar100_layout}", "--label_column=fine_label"]
    run_job(parse_settings([*words, "--dry_run"]))
    said = capsys.readouterr().out
    assert "to be searched, 5 of 12" in said and "Dry run: nothing was written." in said
    shown = yaml.safe_load(said.partition("\nStages: ")[0])
    assert {**shown, **read_recipe(recipe_path("short"))} == shown
    assert [path.name for path in tmp_path.iterdir()] == ["vit"]


@pytest.mark.parametrize("recipe", [*IMAGENET, "cifar", "cifar-probe", "digits", "short"])
def test_the_first_line_of_a_recipe_says_what_it_is(recipe):
    first = recipe_path(recipe).read_text().splitlines()[0]
    assert first.startswith("# ") and first.endswith(".") or recipe == "digits"
    if "nose" in recipe:
        name, ratio = recipe[:6].replace("deit", "DeiT").upper().replace("DEIT", "DeiT"), recipe[-2:]
        assert name in first and "ImageNet-1k" in first
        assert f"{round(int(ratio) / 100 * 12)} of its 12 attention layers" in first
