"""A folder with a manifest is whole, or says which file is not."""

import os

import pytest

from hf_nose.files import read_json
from hf_nose.manifests import manifest_error, sha256, write_manifest


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(content)


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint-7"
    (folder / "rank").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(64)))
    (folder / "rank" / "rng_state.pth").write_bytes(b"state")
    (folder / "empty").touch()
    write_manifest(folder, step=7, mask=0.34)
    return folder


def test_sha256_is_the_known_one(tmp_path):
    (tmp_path / "abc").write_text("abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_whole_folder_has_no_error(checkpoint):
    assert manifest_error(checkpoint) is None
    record = read_json(checkpoint / "manifest.json")
    assert record["files"]["rank/rng_state.pth"]["bytes"] == 5
    assert set(record["files"]) == {"model.safetensors", "rank/rng_state.pth", "empty"}
    assert (record["step"], record["mask"]) == (7, 0.34)


def test_a_manifest_written_again_does_not_name_itself(checkpoint):
    (checkpoint / "trainer_state.json").write_text("{}")
    write_manifest(checkpoint, layers=(1, 2), by_layer={3: 0.5})
    assert manifest_error(checkpoint) is None
    assert "manifest.json" not in read_json(checkpoint / "manifest.json")["files"]


@pytest.mark.parametrize("name", ["model.safetensors", "rank/rng_state.pth", "empty", "manifest.json"])
def test_a_missing_file_is_noticed(checkpoint, name):
    (checkpoint / name).unlink()
    assert f"{checkpoint / name} is missing" in manifest_error(checkpoint)


def test_a_missing_folder_is_noticed(tmp_path):
    assert "missing" in manifest_error(tmp_path / "checkpoint-9")


@pytest.mark.parametrize("length", [0, 1, 63])
def test_a_truncated_file_is_noticed(checkpoint, length):
    os.truncate(checkpoint / "model.safetensors", length)
    assert f"model.safetensors is truncated: expected 64 bytes but got {length}" in manifest_error(checkpoint)


def test_a_longer_file_is_noticed(checkpoint):
    (checkpoint / "empty").write_text("x")
    assert "empty has changed" in manifest_error(checkpoint)


def test_every_flipped_bit_of_a_file_is_noticed(checkpoint):
    weights = checkpoint / "model.safetensors"
    for bit in range(8 * weights.stat().st_size):
        flip(weights, bit)
        assert "model.safetensors has changed" in manifest_error(checkpoint), bit
        flip(weights, bit)
    assert manifest_error(checkpoint) is None


def test_a_flipped_bit_of_the_manifest_is_noticed(checkpoint):
    manifest = checkpoint / "manifest.json"
    for bit in range(0, 8 * manifest.stat().st_size, 13):  # 13: each of a byte's bits has its turn
        flip(manifest, bit)
        assert manifest_error(checkpoint) is not None, bit
        flip(manifest, bit)
    assert manifest_error(checkpoint) is None


def test_a_truncated_manifest_is_noticed(checkpoint):
    manifest = checkpoint / "manifest.json"
    whole = manifest.read_bytes()
    for length in range(0, len(whole) - 1, 5):  # the last byte is a newline
        manifest.write_bytes(whole[:length])
        assert "manifest.json" in manifest_error(checkpoint), length


@pytest.mark.parametrize("name", ["schema", "versions", "files", "manifest_sha256"])
def test_extra_entries_do_not_take_the_manifests_names(tmp_path, name):
    with pytest.raises(ValueError, match=name):
        write_manifest(tmp_path, **{name: 1})
