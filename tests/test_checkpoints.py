"""Checkpoints that are whole, and the damaged ones that are passed over."""

import os
import shutil

import pytest

from hf_nose.checkpoints import STAGING, checkpoint_record, latest_whole_checkpoint, publish, stage, steps_from_last


FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def write(folder, step, content="weights"):
    """A staged checkpoint, not yet published."""
    staged = stage(folder) / f"checkpoint-{step}"
    staged.mkdir()
    for name in FILES:
        (staged / name).write_bytes(f"{name} {content} of step {step}".encode() * 10)
    return staged


def save(folder, step, content="weights"):
    write(folder, step, content)
    return publish(folder, step, threads=1)


@pytest.fixture
def folder(tmp_path):
    """Checkpoints of steps 9, 10 and 100: in the order of names, 9 would come last."""
    for step in (9, 10, 100):
        save(tmp_path, step)
    return tmp_path


def test_publish_moves_the_staged_folder_into_place(tmp_path):
    final = save(tmp_path, 7)
    assert final == tmp_path / "checkpoint-7"
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-7"]
    record = checkpoint_record(final)
    assert (record["step"], record["threads"], set(record["files"])) == (7, 1, set(FILES))


def test_staging_starts_empty(tmp_path):
    write(tmp_path, 3)
    staging = stage(tmp_path)
    assert staging == tmp_path / STAGING
    assert list(staging.iterdir()) == []


def test_a_checkpoint_of_the_same_step_is_replaced(folder):
    (folder / "checkpoint-100" / "left_over.bin").write_bytes(b"of the one before")
    final = save(folder, 100, "new")
    assert (final / "optimizer.pt").read_bytes().startswith(b"optimizer.pt new")
    assert not (final / "left_over.bin").exists()
    assert latest_whole_checkpoint(folder) == final


def test_checkpoints_are_ordered_by_step_and_nothing_else_counts(folder):
    (folder / "checkpoint-best").mkdir()
    (folder / "runs").mkdir()
    assert [path.name for path in steps_from_last(folder)] == ["checkpoint-100", "checkpoint-10", "checkpoint-9"]


def test_the_last_whole_checkpoint_is_found_without_a_word(folder, caplog):
    assert latest_whole_checkpoint(folder) == folder / "checkpoint-100"
    assert caplog.records == []


def test_no_checkpoint_is_none(tmp_path):
    assert latest_whole_checkpoint(tmp_path) is None
    assert latest_whole_checkpoint(tmp_path / "missing") is None


def remove(file):
    file.unlink()


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("damage", [remove, truncate, flip])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(folder, caplog, damage, name):
    damage(folder / "checkpoint-100" / name)
    assert latest_whole_checkpoint(folder) == folder / "checkpoint-10"
    (warning,) = caplog.messages
    assert warning.startswith("Passing over checkpoint-100: ")
    assert name in warning


@pytest.mark.parametrize("bit", range(8))
def test_any_flipped_bit_shows(folder, bit):
    file = folder / "checkpoint-100" / "model.safetensors"
    whole = file.read_bytes()
    for place in (0, len(whole) - 1):
        content = bytearray(whole)
        content[place] ^= 1 << bit
        file.write_bytes(content)
        assert latest_whole_checkpoint(folder) == folder / "checkpoint-10"
    file.write_bytes(whole)
    assert latest_whole_checkpoint(folder) == folder / "checkpoint-100"


def test_two_damaged_checkpoints_are_both_named(folder, caplog):
    remove(folder / "checkpoint-100" / "optimizer.pt")
    truncate(folder / "checkpoint-10" / "rng_state.pth")
    assert latest_whole_checkpoint(folder) == folder / "checkpoint-9"
    assert ["checkpoint-100" in caplog.messages[0], "checkpoint-10:" in caplog.messages[1]] == [True, True]
    assert "optimizer.pt is missing" in caplog.messages[0]
    assert "rng_state.pth is truncated" in caplog.messages[1]


def test_where_none_is_whole_there_is_none(folder, caplog):
    for checkpoint in steps_from_last(folder):
        flip(checkpoint / "model.safetensors")
    assert latest_whole_checkpoint(folder) is None
    assert len(caplog.messages) == 3


def test_an_unfinished_staging_folder_is_never_resumed_from(folder, caplog):
    write(folder, 200)
    assert latest_whole_checkpoint(folder) == folder / "checkpoint-100"
    assert caplog.records == []


def test_a_checkpoint_moved_without_a_manifest_is_passed_over(folder, caplog):
    os.replace(write(folder, 200), folder / "checkpoint-200")
    assert latest_whole_checkpoint(folder) == folder / "checkpoint-100"
    assert "manifest.json is missing" in caplog.text


def test_a_kill_while_an_equal_step_is_replaced_leaves_the_one_before(folder, monkeypatch):
    write(folder, 100, "new")

    def killed(path, *args, **kwargs):
        os.remove(path / "manifest.json")
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        publish(folder, 100)
    monkeypatch.undo()
    assert latest_whole_checkpoint(folder) == folder / "checkpoint-10"
