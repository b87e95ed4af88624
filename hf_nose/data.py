"""Image classification data: where it comes from, which split serves what, and the calibration images."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import datasets
import numpy as np
from transformers.image_processing_backends import PilBackend

from .images import ROW_COLUMN, ImageBatches, ImageDataset
from .splits import choose_splits, find_image_column, find_label_column, load_splits


# Images that a stream is shuffled through before calibration images are taken from it.
SHUFFLE_BUFFER = 4096
# Calibration images are gone through many times, so more of them are kept in memory than of an ordinary data set.
CALIBRATION_BYTES = 2**30


@dataclass(frozen=True)
class ImageData:
    """
    A data set ready for use: images undecoded, training images apart from evaluation images.

    Args:
        train (`datasets.Dataset`, *optional*): Training images; `None` where only evaluation was asked for. A
            `datasets.IterableDataset` may stand here for [`calibration_batches`].
        evaluation (`datasets.Dataset`): Evaluation images.
        image_column (`str`): Column of images, of type `datasets.Image(decode=False)`.
        label_column (`str`): Column of integer labels.
        class_names (`list[str]`, *optional*): Names of the classes where the data set has them.
        notes (`list[str]`): What a reader of the results has to know about the splits.
    """

    train: datasets.Dataset | datasets.IterableDataset | None
    evaluation: datasets.Dataset
    image_column: str
    label_column: str
    class_names: list[str] | None
    notes: list[str]


class CalibrationSet(ImageBatches):
    """
    Calibration images as batches that can be gone through again and again (see [`calibration_batches`]).

    Attributes:
        num_images (`int`): How many images there are.
        sha256 (`str`): Hash over size, RGB pixels and label of every image, in order, before processing.
        notes (`list[str]`): What a reader of the results has to know.
    """

    def __init__(self, dataset: ImageDataset, batch_size: int, notes: list[str]) -> None:
        super().__init__(dataset, batch_size)
        self.notes = notes
        self.num_images = len(dataset)
        digest = hashlib.sha256()
        for index, label in enumerate(dataset.labels):
            image = dataset.decode(index)
            digest.update(f"{image.width}x{image.height} RGB {label}\n".encode())
            digest.update(image.tobytes())
        self.sha256 = digest.hexdigest()


def load_image_data(
    dataset: str,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    seed: int = 0,
    train_split: str | None = None,
    eval_split: str | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    evaluation_only: bool = False,
) -> ImageData:
    """
    Loads an image classification data set and decides which images train and which evaluate.

    Args:
        dataset (`str`):
            `"digits"` (1,797 handwritten digits of 8x8 pixels that come with scikit-learn; 450 of them evaluate, the
            same ones whatever the seed, so that no seed's model has seen them), a parquet file, a folder of parquet
            files, a folder of images with a subfolder per class, a folder written by `save_to_disk`, or a Hub id.
        image_column (`str`, *optional*):
            By default the column of type image.
        label_column (`str`, *optional*):
            By default the column of type class label, or of integers and named label, labels or fine_label.
        seed (`int`, *optional*, defaults to 0):
            Seed of the split in two of a data set with one split, and of the samples below.
        train_split (`str`, *optional*):
            By default `"train"`.
        eval_split (`str`, *optional*):
            By default the first there is of validation, val, valid, dev, test, eval, evaluation. Where it is the
            training split too, or there is no other, that split is divided at random into two halves.
        max_train_samples (`int`, *optional*):
            Take a random sample of so many training images.
        max_eval_samples (`int`, *optional*):
            Take a random sample of so many evaluation images.
        evaluation_only (`bool`, *optional*, defaults to `False`):
            Evaluate on the whole evaluation split (of one split: all of it) and leave `train` empty.

    Raises:
        `ValueError`: where nothing can be loaded, a split or column is missing or ambiguous, labels are not integers,
            or a sample size is below 1.
    """
    for argument, value in (("max_train_samples", max_train_samples), ("max_eval_samples", max_eval_samples)):
        if value is not None and value < 1:
            raise ValueError(f"`{argument}` must be 1 or more, got {value}. Leave it out to take all images.")
    splits = load_splits(dataset)
    train_name, eval_name = choose_splits(list(splits), train_split, eval_split, evaluation_only)
    features = splits[eval_name].features
    image_column = find_image_column(features, image_column)
    label_column = find_label_column(features, label_column)

    def take(name: str) -> datasets.Dataset:
        split = splits[name]
        missing = [column for column in (image_column, label_column) if column not in split.column_names]
        if missing:
            raise ValueError(f"Split {name!r} has no column {missing[0]!r}. Columns found: {split.column_names}.")
        if split.features[label_column] != features[label_column]:
            raise ValueError(
                f"Splits {name!r} and {eval_name!r} number the classes of column {label_column!r} differently: "
                f"{split.features[label_column]} and {features[label_column]}. Give both the same classes."
            )
        split = split.select_columns([image_column, label_column])
        split = split.cast_column(image_column, datasets.Image(decode=False))
        return split.add_column(ROW_COLUMN, np.arange(len(split)))

    notes = []
    train, evaluation = None, take(eval_name)
    if evaluation_only and eval_name in ("train", train_split):
        notes.append(f"evaluated on all images of {eval_name!r}, the training split")
    elif train_name == eval_name:
        if len(evaluation) < 2:
            raise ValueError(f"Split {eval_name!r} has {len(evaluation)} image(s), too few to divide it in two.")
        order = np.random.default_rng(seed).permutation(len(evaluation))
        middle = len(evaluation) - len(evaluation) // 2
        train, evaluation = (evaluation.select(np.sort(half)) for half in (order[:middle], order[middle:]))
        notes.append(
            f"one split only: {eval_name!r} was divided at random with seed {seed} into {len(train)} training and "
            f"{len(evaluation)} evaluation images"
        )
    elif train_name is not None:
        train = take(train_name)

    label_feature = features[label_column]
    return ImageData(
        train=None if train is None else sample(train, max_train_samples, seed),
        evaluation=sample(evaluation, max_eval_samples, seed),
        image_column=image_column,
        label_column=label_column,
        class_names=list(label_feature.names) if isinstance(label_feature, datasets.ClassLabel) else None,
        notes=notes,
    )


def calibration_batches(
    data: ImageData, processor: PilBackend, num_images: int, batch_size: int, seed: int, num_labels: int
) -> CalibrationSet:
    """
    Draws the calibration images: a seeded, class-mixed sample of the training split, never of the evaluation images.

    A streamed training split goes through a shuffle buffer. With the same seed, fewer images are the first of more
    (streams excepted).

    Args:
        data (`ImageData`): The data set.
        processor (`PilBackend`): The checkpoint's image processor.
        num_images (`int`): How many images; where there are fewer, all are taken and a note says so.
        batch_size (`int`): Images a batch.
        seed (`int`): Seed of the sample.
        num_labels (`int`): Number of classes of the model.

    Raises:
        `ValueError`: where the set would be empty, or as [`ImageDataset`] does.
    """
    if num_images < 1:
        raise ValueError(f"`num_images` must be 1 or more, got {num_images}: the calibration set would be empty.")
    if isinstance(data.train, datasets.IterableDataset):
        stream = data.train.cast_column(data.image_column, datasets.Image(decode=False))
        stream = stream.shuffle(seed=seed, buffer_size=max(SHUFFLE_BUFFER, num_images))
        columns = (data.image_column, data.label_column)
        rows = [{column: row[column] for column in columns} for row in stream.take(num_images)]
        features = datasets.Features(
            {data.image_column: datasets.Image(decode=False), data.label_column: datasets.Value("int64")}
        )
        chosen = datasets.Dataset.from_list(rows, features=features, split=datasets.Split("calibration"))
    elif data.train is not None:
        order = np.random.default_rng(seed).permutation(len(data.train))
        chosen = data.train.select(order[:num_images])
    if data.train is None or len(chosen) == 0:
        raise ValueError(
            "`data` has no training images, so the calibration set would be empty. Calibration images come from the "
            "training split; load a data set that has one."
        )
    notes = []
    if len(chosen) < num_images:
        notes.append(f"{num_images} calibration images were asked for; all {len(chosen)} training images were taken")
    images = ImageDataset(
        chosen, processor, data.image_column, data.label_column, num_labels, max_bytes=CALIBRATION_BYTES
    )
    return CalibrationSet(images, batch_size, notes)


def sample(split: datasets.Dataset, size: int | None, seed: int) -> datasets.Dataset:
    """Takes a seeded sample of `size` rows, in the split's order; all of them where `size` is `None` or larger."""
    if size is None or size >= len(split):
        return split
    return split.select(np.sort(np.random.default_rng(seed).permutation(len(split))[:size]))
