"""Image classification data: where it comes from, and which split serves what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import datasets
import numpy as np

from .images import ROW_COLUMN, Rows, undecoded
from .sources import Source, find_source
from .specs import find_spec
from .splits import choose_splits, find_image_column, find_label_column


@dataclass(frozen=True)
class ImageData:
    """
    A data set ready for use: images undecoded, training images apart from evaluation images.

    Args:
        train (`datasets.Dataset` or `datasets.IterableDataset`, *optional*): Training images, a stream where that was
            asked for; `None` where only evaluation was.
        evaluation (`datasets.Dataset`): Evaluation images.
        image_column (`str`): Column of images, of type `datasets.Image(decode=False)`.
        label_column (`str`): Column of integer labels.
        class_names (`list[str]`, *optional*): Names of the classes where the data set has them.
        notes (`list[str]`): What a reader of the results has to know about the splits.
        stream_length (`int`, *optional*): How many images there are in a stream.
    """

    train: datasets.Dataset | datasets.IterableDataset | None
    evaluation: datasets.Dataset
    image_column: str
    label_column: str
    class_names: list[str] | None
    notes: list[str]
    stream_length: int | None = None

    @property
    def num_train(self) -> int:
        """Number of training images."""
        if self.stream_length is not None:
            return self.stream_length
        return 0 if self.train is None else len(self.train)


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
    dataset_id: str | None = None,
    streaming: bool = False,
    train_images: int | None = None,
) -> ImageData:
    """
    Loads an image classification data set and decides which images train and which evaluate.

    Args:
        dataset (`str`):
            `"digits"` (1,797 handwritten digits of 8x8 pixels that come with scikit-learn; 450 of them evaluate, the
            same ones whatever the seed, so that no seed's model has seen them), a parquet file, a folder of parquet
            files, a folder of images with a subfolder per class, a folder written by `save_to_disk`, or a Hub id.
            Of parquet files only the splits that are used are fetched.
        image_column (`str`, *optional*):
            By default that of the data set's [`DatasetSpec`] if it has one, otherwise the column of type image.
        label_column (`str`, *optional*):
            By default that of the [`DatasetSpec`], otherwise the column of type class label, or of integers and named
            label, labels or fine_label.
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
        dataset_id (`str`, *optional*):
            Hub id of the data set that `dataset` is a local copy of, which says how it is laid out.
        streaming (`bool`, *optional*, defaults to `False`):
            Stream the training images instead of loading them. Evaluation images are loaded all the same.
        train_images (`int`, *optional*):
            How many there are in the stream, where neither the data set's card nor its files say so.

    Raises:
        `ValueError`: where nothing can be loaded, a split or column is missing or ambiguous, labels are not integers,
            or a sample size is below 1; of a stream, where it is the evaluation split too, was to be sampled, or its
            length is unknown.
    """
    check_sizes(max_train_samples, max_eval_samples, train_images, streaming)
    source = find_source(dataset)
    train_name, eval_name = choose_splits(source.splits, train_split, eval_split, evaluation_only)
    loaded = source.load(eval_name)
    features, spec = loaded.features, find_spec(dataset, dataset_id)
    if spec is not None:
        image_column, label_column = image_column or spec.image_column, label_column or spec.label_column
    columns = find_image_column(features, image_column), find_label_column(features, label_column)

    def take(name: str, rows: Rows) -> Rows:
        check_columns(rows.features, name, columns, features, eval_name)
        return undecoded(rows, columns[:1], columns[1:])

    notes = []
    train: datasets.Dataset | datasets.IterableDataset | None = None
    length, evaluation = None, numbered(take(eval_name, loaded))
    if evaluation_only and eval_name in ("train", train_split):
        notes.append(f"evaluated on all images of {eval_name!r}, the training split")
    elif train_name == eval_name:
        train, evaluation = halves(evaluation, eval_name, seed, streaming)
        notes.append(
            f"one split only: {eval_name!r} was divided at random with seed {seed} into {len(train)} training and "
            f"{len(evaluation)} evaluation images"
        )
    elif train_name is not None and streaming:
        stream, length = measured_stream(source, train_name, train_images)
        train = take(train_name, stream)
    elif train_name is not None:
        train = numbered(take(train_name, source.load(train_name)))

    classes = features[columns[1]]
    return ImageData(
        train=sample(train, max_train_samples, seed) if isinstance(train, datasets.Dataset) else train,
        evaluation=sample(evaluation, max_eval_samples, seed),
        image_column=columns[0],
        label_column=columns[1],
        class_names=list(classes.names) if isinstance(classes, datasets.ClassLabel) else None,
        notes=notes,
        stream_length=length,
    )


def check_sizes(train: int | None, evaluation: int | None, train_images: int | None, streaming: bool) -> None:
    """Refuses, by name, numbers of images that cannot be taken."""
    sizes = {"max_train_samples": train, "max_eval_samples": evaluation, "train_images": train_images}
    for argument, value in sizes.items():
        if value is not None and value < 1:
            raise ValueError(f"`{argument}` must be 1 or more, got {value}. Leave it out to take all images.")
    if streaming and train is not None:
        raise ValueError("`max_train_samples` takes images from all over a split, which a stream has not: load it.")
    if train_images is not None and not streaming:
        raise ValueError("`train_images` tells the length of a stream: leave it out, or stream the training images.")


def check_columns(
    found: datasets.Features, name: str, columns: tuple[str, str], expected: datasets.Features, eval_name: str
) -> None:
    """`ValueError` where a split lacks one of the columns, or numbers the classes unlike the evaluation split."""
    missing = [column for column in columns if column not in found]
    if missing:
        raise ValueError(f"Split {name!r} has no column {missing[0]!r}. Columns found: {list(found)}.")
    label = columns[1]
    if found[label] != expected[label]:
        raise ValueError(
            f"Splits {name!r} and {eval_name!r} number the classes of column {label!r} differently: "
            f"{found[label]} and {expected[label]}. Give both the same classes."
        )


def halves(
    split: datasets.Dataset, name: str, seed: int, streaming: bool
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The two halves of a split that has to train and to evaluate, drawn at random, in the split's order."""
    if streaming:
        raise ValueError(
            f"Split {name!r} would train and evaluate, but a stream cannot be divided in two. Give another "
            "`eval_split`, or load the training images."
        )
    if len(split) < 2:
        raise ValueError(f"Split {name!r} has {len(split)} image(s), too few to divide it in two.")
    order = np.random.default_rng(seed).permutation(len(split))
    middle = len(split) - len(split) // 2
    return split.select(np.sort(order[:middle])), split.select(np.sort(order[middle:]))


def numbered(split: datasets.Dataset) -> datasets.Dataset:
    """The split with the numbers of its rows, which outlive a sample."""
    return split.add_column(ROW_COLUMN, np.arange(len(split)))


def measured_stream(source: Source, split: str, length: int | None) -> tuple[datasets.IterableDataset, int]:
    """The stream of a split and its length: as found or, where nothing says it, as given."""
    stream, found = source.stream(split)
    if found is None and length is None:
        raise ValueError(
            f"`train_images`: nothing tells how many images split {split!r} of {source.dataset!r} has, so a stream of "
            "it has no epochs. Give their number, or load the training images."
        )
    if found is not None and length not in (None, found):
        raise ValueError(f"`train_images`: split {split!r} of {source.dataset!r} has {found} images, got {length}.")
    if stream.features is None:
        raise ValueError(f"`dataset`: the files of {source.dataset!r} do not tell their columns: load them instead.")
    return stream, found or cast(int, length)


def sample(split: datasets.Dataset, size: int | None, seed: int) -> datasets.Dataset:
    """Takes a seeded sample of `size` rows, in the split's order; all of them where `size` is `None` or larger."""
    if size is None or size >= len(split):
        return split
    return split.select(np.sort(np.random.default_rng(seed).permutation(len(split))[:size]))
