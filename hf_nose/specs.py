"""The layouts of the data sets that the recipes are made for, by their Hub id."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DatasetSpec:
    """
    Columns of a data set, and what the values of its annotations mean.

    Args:
        image_column (`str`): Column of images.
        label_column (`str`, *optional*): Column of class ids, for classification.
        annotation_column (`str`, *optional*): Column of images whose pixels are class ids, for segmentation.
        first_class (`int`, *optional*, defaults to 0): Pixel value of the first class in an annotation.
        num_classes (`int`, *optional*): Number of classes in annotations; values follow each other.
        void (`int`, *optional*): Pixel value of what belongs to no class and counts nowhere.
    """

    image_column: str
    label_column: str | None = None
    annotation_column: str | None = None
    first_class: int = 0
    num_classes: int | None = None
    void: int | None = None


# As their cards say. The script of zhoubolei/scene_parse_150 no longer loads; merve's is a copy in parquet.
SPECS = {
    "ILSVRC/imagenet-1k": DatasetSpec("image", "label"),
    "uoft-cs/cifar10": DatasetSpec("img", "label"),
    "uoft-cs/cifar100": DatasetSpec("img", "fine_label"),
    "merve/scene_parse_150": DatasetSpec(
        "image", annotation_column="annotation", first_class=1, num_classes=150, void=0
    ),
}


def find_spec(dataset: str, dataset_id: str | None = None) -> DatasetSpec | None:
    """The layout of a data set by its Hub id, or of a local copy by the id it has there; `None` of any other."""
    return SPECS.get(dataset if dataset_id is None else dataset_id)
