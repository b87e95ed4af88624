"""The pages of what was measured: rendered from the committed JSON, every number of theirs in it."""

import json
import sys
from pathlib import Path

import pytest
from tiny_run import finished_run


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import int8_cost  # noqa: E402
import render_pages  # noqa: E402


@pytest.mark.parametrize("folder", render_pages.PAGES)
def test_the_committed_page_is_what_its_records_say(folder):
    path = render_pages.RESULTS / folder / "README.md"
    assert path.read_text(encoding="utf-8") == render_pages.PAGES[folder](path.parent)


def test_every_record_has_its_section():
    folder = render_pages.RESULTS / "deit-tiny"
    assert {path.stem for path in folder.glob("*.json")} <= set(render_pages.SECTIONS)


def test_a_page_follows_its_records(tmp_path):
    """Other numbers in the record, other words on the page."""
    record = json.loads((render_pages.RESULTS / "deit-tiny" / "half_precision.json").read_text())
    assert "does not overflow" in "".join(render_pages.half_precision(record))
    record["largest_by_doublings"][-1] = 70_000.4
    page = "".join(render_pages.half_precision(record))
    assert "70,000" in page and "stream overflows" in page


@pytest.mark.slow
def test_int8_is_measured_beside_float32(tmp_path_factory):
    pytest.importorskip("onnxruntime")
    output = tmp_path_factory.mktemp("int8") / "int8.json"
    words = [f"--model={finished_run(tmp_path_factory) / 'dense'}", "--dataset=digits", "--layers", "1"]
    assert int8_cost.main([*words, "--max_eval_samples=32", f"--output={output}"]) == 0
    record = json.loads(output.read_text())
    assert list(record["models"]) == ["as it is", "without attention 1"]
    for found in record["models"].values():
        assert found["float32"]["num_images"] == found["int8"]["num_images"] == 32
        assert found["int8"]["bytes"] < found["float32"]["bytes"]
    assert record["models"]["without attention 1"]["int8"]["bytes"] < record["models"]["as it is"]["int8"]["bytes"]
    page = "\n".join(render_pages.int8(record))
    assert page.count("\n| ") == 6 and "without attention 1, int8" in page
