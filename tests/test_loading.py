"""The Trainer's loaders: what a resumed training draws, epochs, refusals."""

import pytest
import torch
from made_data import encoded, numbers, write_numbered, write_shards
from PIL import Image
from recorded_training import images, train
from tiny_training import Images, arguments, differing, model

from hf_nose.data import load_image_data
from hf_nose.images import ImageDataset, digits_processor
from hf_nose.training import NoseTrainer


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_streams")]

COUNT = 22  # Six batches of four an epoch, the last of two images.
KINDS = {
    "map style": {},
    "map style, cropped": {"crop": True},
    "map style, cropped, repeated": {"crop": True, "repeats": 3},
    "stream": {"streaming": True},
    "stream, cropped": {"streaming": True, "crop": True},
}
# Steps an epoch are 6 or, with two batches a step, 3. Both trainings end within their third epoch.
STEPS = {1: 15, 2: 8}
# Stopped there, it goes on from the checkpoint before, which is made every second step.
STOPS = {"first epoch": {1: 5, 2: 3}, "second epoch": {1: 9, 2: 6}}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Images in which every pixel differs, so that no two crops are alike."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("data")
    for split, count, parts in (("train", COUNT, 3), ("validation", 4, 1)):
        noise = torch.randint(0, 256, (count, 64, 64, 3), dtype=torch.uint8).numpy()
        cells = [encoded(Image.fromarray(pixels)) for pixels in noise]
        write_shards(folder, split, cells, {"label": ([n % 3 for n in range(count)], 3)}, parts)
    return folder


@pytest.fixture(scope="module", params=[(kind, accumulation) for kind in KINDS for accumulation in (1, 2)], ids=str)
def never_stopped(request, shards, tmp_path_factory):
    """A kind of data, the batches a step, and what a training with both comes to."""
    kind, accumulation = request.param
    folder, options = tmp_path_factory.mktemp("never"), {"gradient_accumulation_steps": accumulation}
    return kind, accumulation, train(folder, images(shards, **KINDS[kind]), STEPS[accumulation], **options)


@pytest.mark.parametrize("stopped", STOPS)
def test_a_training_that_was_stopped_sees_the_same_images_and_ends_alike(shards, tmp_path, never_stopped, stopped):
    kind, accumulation, expected = never_stopped
    steps, stop = STEPS[accumulation], STOPS[stopped][accumulation]
    options = {"gradient_accumulation_steps": accumulation}
    first = train(tmp_path / "run", images(shards, **KINDS[kind]), steps, stop, **options)
    # Other workers do not change what is drawn.
    resumed = train(
        tmp_path / "run", images(shards, **KINDS[kind]), steps, resume=True, num_workers=accumulation - 1, **options
    )
    last = (stop - 1) // 2 * 2
    assert min(resumed["batches"]) == (last, 0)
    assert {**first["batches"], **resumed["batches"]}.keys() == expected["batches"].keys()
    for place, pixel_values in [*first["batches"].items(), *resumed["batches"].items()]:
        assert torch.equal(pixel_values, expected["batches"][place]), place
    assert differing(resumed["weights"], expected["weights"]) == []
    assert resumed["epoch"] == expected["epoch"] == pytest.approx(2 + (3 if accumulation == 1 else 4) / 6)


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_holds_every_image_and_the_next_one_in_another_order(tmp_path, kind):
    folder = write_numbered(tmp_path / "data", train=COUNT, evaluation=4, shards=3)
    found = train(tmp_path / "run", images(folder, **KINDS[kind]), steps=12)["batches"]
    epochs = [[n for step in range(e, e + 6) for n in numbers(found[step, 0])] for e in (0, 6)]
    for drawn in epochs:
        if "repeats" in KINDS[kind]:
            assert len(drawn) == COUNT and [drawn.count(n) for n in dict.fromkeys(drawn)] == [3] * 7 + [1]
        else:
            assert sorted(drawn) == list(range(COUNT))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "crop" in kind])
def test_no_crop_comes_twice(shards, tmp_path, kind):
    """One keyed by (seed, image) alone would come again in every epoch, and in every repetition."""
    found = train(tmp_path, images(shards, **KINDS[kind]), steps=12)["batches"]
    drawn = [image.numpy().tobytes() for batch in found.values() for image in batch]
    assert len(set(drawn)) == len(drawn) == 2 * COUNT


@pytest.mark.parametrize("workers", [0, 2])
def test_the_draws_of_a_training_are_the_samplers(shards, tmp_path, workers):
    found = train(tmp_path, images(shards, crop=True), steps=12, num_workers=workers)["batches"]
    again = train(tmp_path / "other", images(shards, crop=True), steps=12)["batches"]
    assert all(torch.equal(found[place], again[place]) for place in again)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_data_smaller_than_a_batch_are_refused(shards, tmp_path, streaming):
    for batch_size in (COUNT, COUNT + 1):
        args = arguments(tmp_path, batch_size=batch_size)
        trainer = NoseTrainer(
            model=model(), args=args, train_dataset=images(shards, streaming=streaming), eval_dataset=Images(6)
        )
        if batch_size > COUNT:
            with pytest.raises(ValueError, match="have 22 images, fewer than the 23 of one batch, all processes"):
                trainer.train()
        else:
            assert len(trainer.get_train_dataloader()) == 1


def test_a_stream_is_not_read_by_workers_that_live_on(shards, tmp_path):
    args = arguments(tmp_path, num_workers=1, dataloader_persistent_workers=True)
    trainer = NoseTrainer(
        model=model(), args=args, train_dataset=images(shards, streaming=True), eval_dataset=Images(6)
    )
    with pytest.raises(ValueError, match="persistent_workers never hear of a stream's next epoch: switch it off"):
        trainer.train()


def test_data_of_other_kinds_are_drawn_by_the_trainer_itself(tmp_path):
    trainer = NoseTrainer(model=model(), args=arguments(tmp_path), train_dataset=Images(), eval_dataset=Images(6))
    assert isinstance(trainer._get_train_sampler(), torch.utils.data.RandomSampler)


def test_uncropped_images_stay_in_memory_and_cropped_ones_need_draws(shards):
    data = load_image_data(str(shards))
    columns = data.image_column, data.label_column
    assert ImageDataset(data.train, digits_processor(), *columns).pixel_values is not None
    cropped = images(shards, crop=True)
    assert cropped.pixel_values is None
    with pytest.raises(ValueError, match="`index` must be a Draw, got 3: an image is cropped anew in every epoch"):
        cropped[3]
