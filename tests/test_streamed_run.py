"""The main job on parquet shards laid out as CIFAR-10's: streamed, cropped, repeated, as the settings say."""

import pytest
import torch
from made_data import odd, write_shards
from safetensors.torch import load_file
from tiny_run import flags, record, run

from hf_nose.arguments import training_arguments
from hf_nose.command_line import parse_settings
from hf_nose.context import RunContext
from hf_nose.crops import RandomResizedCrop
from hf_nose.images import ImageDataset, digits_processor
from hf_nose.streams import ImageStream


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_streams")]

ID = "uoft-cs/cifar10"
STAGES = "prepare,profile,select,dilute,fold"


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cifar")
    for split, count, shards in (("train", 50, 3), ("test", 20, 1)):
        labels = {"label": ([number % 10 for number in range(count)], 10)}
        write_shards(folder, split, [odd(number) for number in range(count)], labels, shards, "img")
    return folder


def options(cifar, **values):
    values = {"streaming": True, "shuffle_buffer_size": 16, "crop": "random_resized", **values}
    return {"dataset": cifar, "dataset_id": ID, "max_train_samples": None, "stages": STAGES, **values}


@pytest.fixture(scope="module")
def streamed(cifar, tmp_path_factory):
    folder = tmp_path_factory.mktemp("streamed") / "run"
    run(folder, **options(cifar))
    return folder


def test_the_job_trains_from_a_stream_and_calibrates_on_it(streamed):
    prepared = record(streamed, "prepare")
    assert prepared["data"] | {"notes": []} == {
        **{"dataset": ID, "dataset_id": ID, "num_train": 50, "num_eval": 20, "notes": []}
    }
    assert prepared["dense_training"]["steps"] == 4 and record(streamed, "dilution")["steps"] == 8
    # Six batches and a last one of two make an epoch.
    assert record(streamed, "dilution")["log"][-2]["epoch"] == pytest.approx(8 / 7, abs=1e-3)
    calibration = record(streamed, "selection")["calibration"]
    assert calibration["num_images"] == 24 and calibration["sha256"] == record(streamed, "profile")["sha256"]
    assert record(streamed, "fold")["bitwise_equal"]


@pytest.mark.parametrize(
    "change, is_same",
    [
        ({"num_workers": 2, "prefetch_factor": 3}, True),
        ({"shuffle_buffer_size": 50}, False),
        ({"crop": "none"}, False),
    ],
    ids=str,
)
def test_the_result_depends_on_buffer_and_crop_and_not_on_the_loader(streamed, cifar, tmp_path, change, is_same):
    run(tmp_path / "run", **options(cifar, stages="prepare", **change))
    weights = [load_file(folder / "dense" / "model.safetensors") for folder in (streamed, tmp_path / "run")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0]) == is_same


# --- what the settings come to ---------------------------------------------------------------------------------------


def context(folder, cifar, **values):
    return RunContext(parse_settings(flags(folder, **options(cifar, **values))))


def test_a_stream_is_made_as_the_settings_say(cifar, tmp_path):
    found = context(tmp_path / "run", cifar, seed=3, crop_scale=0.25, crop_ratio=1.5)
    stream = found.images("train", 10, digits_processor())
    assert isinstance(stream, ImageStream)
    assert (len(stream), stream.seed, stream.buffer_size) == (50, 3, 16)
    expected = RandomResizedCrop(seed=3, height=8, width=8, resample=3, scale=0.25, ratio=1.5)
    assert stream.read.crop == expected and stream.read.num_labels == 10
    assert context(tmp_path / "run", cifar, crop="none").images("train", 10, digits_processor()).read.crop is None


def test_images_are_cropped_and_repeated_as_the_settings_say(cifar, tmp_path):
    found = context(tmp_path / "run", cifar, streaming=False, repeated_augmentation=3)
    train, evaluation = (found.images(split, 10, digits_processor()) for split in ("train", "evaluation"))
    assert isinstance(train, ImageDataset) and train.repeats == 3 and train.crop.scale == 0.08
    assert train.crop.ratio == pytest.approx(4 / 3)
    # The deterministic resize of evaluation stays the processor's.
    assert evaluation.crop is None and evaluation.repeats == 1 and len(evaluation) == 20
    plain = context(tmp_path / "run", cifar, streaming=False, crop="none").images("train", 10, digits_processor())
    assert plain.crop is None and plain.repeats == 1


def test_a_given_length_reaches_the_stream(cifar, tmp_path):
    with pytest.raises(ValueError, match="`train_images`: split 'train' of .* has 50 images, got 49"):
        context(tmp_path / "run", cifar, train_images=49).data  # noqa: B018


def test_loader_settings_reach_the_trainer(cifar, tmp_path):
    settings = context(tmp_path / "run", cifar, num_workers=2, prefetch_factor=5).settings
    args = training_arguments(settings, tmp_path, 1, None, on_cpu=True)
    assert (args.dataloader_num_workers, args.dataloader_prefetch_factor) == (2, 5)
    assert args.dataloader_persistent_workers is False
