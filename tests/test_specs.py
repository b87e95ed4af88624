"""Data sets known by id, on shards laid out as theirs."""

import pytest

from hf_nose.specs import SPECS, DatasetSpec, find_spec


def test_a_spec_is_found_by_the_id_of_the_data_set_or_of_its_copy():
    assert find_spec("uoft-cs/cifar100") == DatasetSpec("img", "fine_label")
    assert find_spec("somewhere/copy", "uoft-cs/cifar100") is SPECS["uoft-cs/cifar100"]
    # What it is a copy of counts, whatever the folder is called.
    assert find_spec("uoft-cs/cifar100", "somebody/else") is None
    assert find_spec("somewhere/copy") is None


@pytest.mark.parametrize("dataset_id", SPECS)
def test_a_spec_is_for_classes_of_images_or_of_pixels(dataset_id):
    spec = SPECS[dataset_id]
    assert (spec.label_column is None) != (spec.annotation_column is None)
    assert (spec.annotation_column is None) == (spec.num_classes is None)
