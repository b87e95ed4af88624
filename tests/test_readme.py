"""README.md says nothing that the committed JSON and the files do not."""

import json
import re
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import render_results  # noqa: E402


README = (ROOT / "README.md").read_text(encoding="utf-8")


def part(name: str) -> str:
    return README.split(f"<!-- {name}: begin", 1)[1].split("-->\n", 1)[1].split(f"<!-- {name}: end -->", 1)[0]


def numbers_in(value) -> list[float]:
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers_in(item)]
    if isinstance(value, list):
        return [number for item in value for number in numbers_in(item)]
    return [float(value)] if isinstance(value, int | float) and not isinstance(value, bool) else []


def test_generated_parts_are_current():
    assert render_results.rendered(README) == README


def test_every_measured_number_stands_in_the_json():
    folder = ROOT / "model_cards" / "results" / "digits"
    known = [number for path in folder.rglob("*.json") for number in numbers_in(json.loads(path.read_text()))]
    shown = {
        f"{scale * number:{form}}" for number in known for scale in (1, 100, 1e-6) for form in (".1f", ".2f", ",.0f")
    }
    rows = [line for line in part("results").splitlines() if line.startswith("|")]
    cells = [cell for row in rows for cell in row.split("|")[2:]]
    figures = re.findall(r"\d[\d,]*\.?\d*", " ".join(cells).replace(", ", " ; "))
    assert len(figures) > 30
    missing = [figure for figure in figures if figure not in shown]
    assert not missing


def test_a_number_typed_by_hand_is_noticed():
    forged = README.replace("|---|---|---|---|---|---|\n| dense | ", "|---|---|---|---|---|---|\n| dense | 9", 1)
    assert forged != README
    assert render_results.rendered(forged) != forged


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
def test_code_blocks_compile(block):
    compile(block, "README.md", "exec")


def test_every_file_has_a_line_in_the_tree():
    tree = part("files")
    for folder in ("hf_nose", "scripts"):
        for path in (ROOT / folder).glob("*.py"):
            assert re.search(rf"^  {re.escape(path.name)} +\S", tree, flags=re.MULTILINE), path.name
