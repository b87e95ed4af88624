"""Files appear whole or not at all, and a folder has one owner."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_nose import files
from hf_nose.configuration_nose_vit import __version__
from hf_nose.files import (
    RunLockedError,
    locked,
    read_json,
    versions,
    whole_folder,
    write_json,
    write_text,
)


def start(script, *arguments):
    """A child process whose script says on its standard output how far it has come."""
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


# --- text and JSON ---------------------------------------------------------------------------------------------------


def test_versions_are_those_that_run():
    found = versions()
    assert found["hf_nose"] == __version__
    assert found["torch"] == torch.__version__
    assert found["python"] == sys.version.split()[0]
    assert {"transformers", "accelerate", "datasets", "evaluate"} <= set(found)


def test_write_text_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "report.md"
    write_text(path, "first")
    write_text(path, "Größe\n")
    assert path.read_bytes() == "Größe\n".encode()
    assert names(tmp_path) == ["report.md"]


def test_write_text_overwrites_what_a_killed_one_left(tmp_path):
    (tmp_path / ".report.md.partial").write_text("half a rep")
    write_text(tmp_path / "report.md", "whole")
    assert names(tmp_path) == ["report.md"]


def test_the_bytes_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: (events.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(files.os, "replace", lambda *places: (events.append("replace"), replace(*places)))
    write_text(tmp_path / "a", "text")
    assert events == ["fsync", "replace", "fsync"]
    events.clear()
    with whole_folder(tmp_path / "folder") as staging:
        (staging / "one").write_text("1")
        (staging / "two").write_text("2")
    assert events == ["fsync"] * 3 + ["replace", "fsync"]


def test_write_json_stamps_and_keeps_the_order(tmp_path):
    path = tmp_path / "record.json"
    write_json(path, {"zeta": 1, "alpha": [1.5, None], "schema": 99, "versions": {"hf_nose": "0.0.0"}})
    record = read_json(path)
    assert list(record) == ["schema", "versions", "zeta", "alpha"]
    assert record["schema"] == files.SCHEMA
    assert record["versions"] == versions()
    assert path.read_text().endswith("}\n")


@settings(deadline=None)  # a slow disk is no failure
@given(
    record=st.dictionaries(
        st.text(st.characters(codec="utf-8")),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
            lambda inner: st.lists(inner, max_size=3),
            max_leaves=5,
        ),
        max_size=5,
    )
)
def test_json_round_trip(record, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "round_trip.json"
    write_json(path, record)
    expected = {key: value for key, value in record.items() if key not in ("schema", "versions")}
    found = read_json(path)
    assert {key: found[key] for key in expected} == expected
    assert len(found) == len(expected) + 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_write_json_refuses_what_json_cannot_hold(tmp_path, value):
    path = tmp_path / "metrics.json"
    write_json(path, {"top1": 0.8})
    with pytest.raises(ValueError, match="metrics.json"):
        write_json(path, {"top1": value})
    assert read_json(path)["top1"] == 0.8
    assert names(tmp_path) == ["metrics.json"]


@pytest.mark.parametrize("content", [b"", b'{"schema": 1, "lay', b"[1]", b'{"layers": []}', b'{"schema": 1, \xff}'])
def test_read_json_names_a_damaged_file(tmp_path, content):
    path = tmp_path / "selection.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="selection.json"):
        read_json(path)


def test_read_json_refuses_a_newer_schema(tmp_path):
    path = tmp_path / "selection.json"
    path.write_text(json.dumps({"schema": files.SCHEMA + 1}))
    with pytest.raises(ValueError, match=rf"selection.json has schema {files.SCHEMA + 1}.*Update hf_nose"):
        read_json(path)


# --- a disk that is full, a folder that cannot be written ------------------------------------------------------------


def test_full_disk_leaves_the_old_files_and_nothing_else(tmp_path):
    """RLIMIT_FSIZE in a child process: every write past 4 KiB fails as on a full disk, whoever runs it."""
    write_json(tmp_path / "record.json", {"old": True})
    with whole_folder(tmp_path / "model") as staging:
        (staging / "weights").write_text("old")
    write_text(tmp_path / "notes.md", "old")
    before = {entry: entry.read_bytes() for entry in tmp_path.rglob("*") if entry.is_file()}
    script = """
        import json, resource, sys
        from pathlib import Path
        from hf_nose.files import whole_folder, write_json, write_text
        from hf_nose.manifests import write_manifest

        def fill_folder(path):
            with whole_folder(path) as staging:
                (staging / "config").write_text("new")
                (staging / "weights").write_text(8192 * "x")

        def fill_manifest(path):
            with whole_folder(path) as staging:
                (staging / "weights").write_text("new")
                write_manifest(staging, log=[8192 * "x"])

        folder = Path(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        for write, path in [
            (lambda path: write_text(path, 8192 * "x"), folder / "notes.md"),
            (lambda path: write_json(path, {"new": 8192 * "x"}), folder / "record.json"),
            (fill_folder, folder / "model"),
            (fill_folder, folder / "other"),
            (fill_manifest, folder / "checkpoint"),
        ]:
            try:
                write(path)
            except OSError as error:
                print(json.dumps([error.errno, str(error.filename)]))
    """
    child = start(script, tmp_path)
    seen = [json.loads(line) for line in child.communicate(timeout=120)[0].splitlines()]
    assert child.returncode == 0
    places = [tmp_path / "notes.md", tmp_path / "record.json", tmp_path / "model", tmp_path / "other"]
    assert seen[:4] == [[errno.EFBIG, str(place)] for place in places]
    assert seen[4:] == [[errno.EFBIG, str(tmp_path / ".checkpoint.partial" / "manifest.json")]]
    assert {entry: entry.read_bytes() for entry in tmp_path.rglob("*") if entry.is_file()} == before
    assert names(tmp_path) == ["model", "notes.md", "record.json"]


def test_unwritable_folder_is_named(tmp_path):
    """A path below an ordinary file cannot be written, not even by root."""
    (tmp_path / "file").write_text("content")
    below = tmp_path / "file" / "run"
    for write in (lambda: write_text(below, "text"), lambda: write_json(below, {})):
        with pytest.raises(OSError, match="file/run'"):
            write()
    with pytest.raises(OSError, match="file/run'"), whole_folder(below):
        raise AssertionError("the block must not run")
    with pytest.raises(OSError, match="file/run'"), locked(below):
        raise AssertionError("the block must not run")
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "content"


# --- whole folders ---------------------------------------------------------------------------------------------------


def test_whole_folder_appears_at_the_end(tmp_path):
    path = tmp_path / "model"
    with whole_folder(path) as staging:
        assert staging.parent == tmp_path
        (staging / "deep").mkdir()
        (staging / "deep" / "weights").write_text("1")
        assert not path.exists()
    assert (path / "deep" / "weights").read_text() == "1"
    assert names(tmp_path) == ["model"]


def test_whole_folder_replaces_all_of_an_older_one(tmp_path):
    path = tmp_path / "model"
    for name in ("first", "second"):
        with whole_folder(path) as staging:
            (staging / name).write_text(name)
    assert names(path) == ["second"]
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("failure", [RuntimeError("inline_container"), KeyboardInterrupt(), OSError("no errno")])
def test_failure_inside_leaves_the_old_folder(tmp_path, failure):
    path = tmp_path / "model"
    with whole_folder(path) as staging:
        (staging / "weights").write_text("old")
    with pytest.raises(type(failure)) as raised, whole_folder(path) as staging:
        (staging / "weights").write_text("half")
        raise failure
    assert raised.value is failure
    assert (path / "weights").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_failure_of_the_last_move_puts_the_old_folder_back(tmp_path, monkeypatch):
    path = tmp_path / "model"
    with whole_folder(path) as staging:
        (staging / "weights").write_text("old")
    replace = os.replace

    def fails_into_place(source, target):
        if source == tmp_path / ".model.partial":
            raise OSError(errno.EIO, "Input/output error", str(source))
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", fails_into_place)
    with pytest.raises(OSError, match="/model'"), whole_folder(path) as staging:
        (staging / "weights").write_text("new")
    assert (path / "weights").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_kill_between_the_two_moves_loses_nothing(tmp_path):
    old = tmp_path / ".model.old"
    old.mkdir()
    (old / "weights").write_text("old")
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "model"):
        raise RuntimeError
    assert (tmp_path / "model" / "weights").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_kill_inside_a_whole_folder(tmp_path):
    path = tmp_path / "model"
    with whole_folder(path) as staging:
        (staging / "weights").write_text("old")
    script = """
        import sys, time
        from hf_nose.files import whole_folder
        with whole_folder(sys.argv[1]) as staging:
            (staging / "weights").write_text("half")
            (staging / "leftover").write_text("half")
            print("inside", flush=True)
            time.sleep(60)
    """
    child = start(script, path)
    assert child.stdout.readline() == "inside\n"
    child.kill()
    child.communicate()
    assert names(tmp_path) == [".model.partial", "model"]
    assert (path / "weights").read_text() == "old"
    with whole_folder(path) as staging:
        assert names(staging) == []
        (staging / "weights").write_text("new")
    assert names(tmp_path) == ["model"]
    assert names(path) == ["weights"]
    assert (path / "weights").read_text() == "new"


def test_whole_folder_does_not_replace_a_file(tmp_path):
    path = tmp_path / "model"
    path.write_text("mine")
    with pytest.raises(NotADirectoryError, match="model is a file"), whole_folder(path):
        raise AssertionError("the block must not run")
    assert path.read_text() == "mine"


# --- the lock --------------------------------------------------------------------------------------------------------


def test_locked_twice_in_one_process(tmp_path):
    folder = tmp_path / "runs" / "digits"
    with locked(folder):
        start_time = time.monotonic()
        with pytest.raises(RunLockedError, match="runs/digits"), locked(folder):
            raise AssertionError("the block must not run")
        assert time.monotonic() - start_time < 10  # says so at once
        with locked(tmp_path / "runs" / "other"):
            pass
    with locked(folder):
        pass


def test_lock_is_freed_by_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    with locked(tmp_path):
        pass


def test_kill_9_frees_the_lock_even_while_a_forked_worker_lives(tmp_path):
    """A loader worker is a fork that outlives its killed parent for seconds: it must not go on holding the folder."""
    script = """
        import os, sys, time
        from hf_nose.files import locked
        with locked(sys.argv[1]):
            worker = os.fork()
            if worker == 0:
                time.sleep(60)
                os._exit(0)
            print(worker, flush=True)
            time.sleep(60)
    """
    child = start(script, tmp_path)
    worker = int(child.stdout.readline())
    try:
        with pytest.raises(RunLockedError, match=tmp_path.name), locked(tmp_path):
            raise AssertionError("the block must not run")
        child.send_signal(signal.SIGKILL)
        assert child.wait(timeout=30) == -signal.SIGKILL
        os.kill(worker, 0)  # raises where the worker has gone: then the test would show nothing
        with locked(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        child.communicate(timeout=30)
