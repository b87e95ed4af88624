"""What the script of inference options measures, on the smallest model."""

import json
import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import inference_options  # noqa: E402


@pytest.mark.slow
def test_every_variant_is_measured(tmp_path, capsys):
    words = ["--size=T", "--removed=1,11", "--batch_size=2", "--pairs=2", "--chunk_size_attention=1"]
    assert inference_options.main([*words, f"--output={tmp_path / 'options.json'}"]) == 0
    record = json.loads((tmp_path / "options.json").read_text())
    assert list(record["throughput"]) == ["as it is", "all tokens", "fused projections", "slices"]
    assert record["throughput"]["as it is"]["ratio_to_first"] == 1.0
    assert record["macs"]["as it is"] == record["macs"]["fused projections"] == record["macs"]["slices"]
    assert record["macs"]["as it is"] < record["macs"]["all tokens"]
    assert record["removed_attention_layers"] == [1, 11] and record["chunk_size_attention"] == 1
    assert capsys.readouterr().out.count("images/s") == 4
