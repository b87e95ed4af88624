"""Names of records, and names fit to be published."""

import pytest
from run_records import records, write_run

from hf_nose.records import RECORDS, public_id, public_name, read_records
from hf_nose.settings import STAGES


@pytest.mark.parametrize(
    ("source", "given", "name"),
    [
        ("/home/someone/deit", None, "deit"),
        ("../weights/deit-tiny-patch16-224", None, "deit-tiny-patch16-224"),
        ("~/models/deit/", None, "deit"),
        ("data/sets/images.parquet", None, "images.parquet"),
        ("C:\\Users\\someone\\deit", None, "deit"),
        ("facebook/deit-tiny-patch16-224", None, "facebook/deit-tiny-patch16-224"),
        ("digits", None, "digits"),
        ("/home/someone/deit", "facebook/deit-tiny-patch16-224", "facebook/deit-tiny-patch16-224"),
    ],
)
def test_public_name_holds_no_path(source, given, name):
    assert public_name(source, given) == name


@pytest.mark.parametrize(
    ("source", "given", "found"),
    [
        ("facebook/deit-tiny-patch16-224", None, "facebook/deit-tiny-patch16-224"),
        ("./weights", None, None),
        ("~/weights", None, None),
        ("configs/vit.json", None, None),
        ("./weights", "facebook/deit-tiny-patch16-224", "facebook/deit-tiny-patch16-224"),
        ("digits", None, None),
        ("digits-vit", None, None),
    ],
)
def test_public_id_is_a_hub_id_or_none(source, given, found):
    assert public_id(source, given) == found


def test_a_folder_that_is_there_has_no_public_id(tmp_path, monkeypatch):
    (tmp_path / "deit").mkdir()
    monkeypatch.chdir(tmp_path)
    assert public_id("deit") is None and public_id("other") == "other"


def test_every_stage_leaves_one_record():
    assert tuple(RECORDS) == STAGES


def test_read_records_leaves_out_what_was_not_run(tmp_path):
    write_run(tmp_path, records("selection", "metrics"))
    assert set(read_records(tmp_path)) == {"selection", "metrics"}
