"""scripts/benchmark.py: its bounds, its README, and a measurement in small."""

import re
import sys
from pathlib import Path

import pytest
from made_benchmark import budget, group, record
from transformers import ViTConfig, ViTForImageClassification

from hf_nose.benchmark import BenchmarkOptions
from hf_nose.files import write_json


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import benchmark as script  # noqa: E402


def test_readme_of_the_results_is_what_their_files_say():
    folder = ROOT / "model_cards" / "results" / "speed"
    assert (folder / "README.md").read_text(encoding="utf-8") == script.readme(folder)


def test_the_costs_in_the_readme_are_method_s():
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in script.costs()}
    # METHOD's 4 N d^2 + 2 N^2 d an attention of all tokens, 8 N d^2 an MLP; in the tail one query and one token.
    attention, mlp = 4 * 197 * 768**2 + 2 * 197**2 * 768, 8 * 197 * 768**2
    tail = 2 * 197 * 768**2 + 2 * 768**2 + 2 * 197 * 768
    dense = [f"{(11 * attention + tail) / 1e9:.2f}", f"{(11 + 1 / 197) * mlp / 1e9:.2f}"]
    assert rows["deit-base dense"] == ["", "86.57", "17.58", "16.37", *dense, "86.6", "17.6"]
    without = [f"{(6 * attention + tail) / 1e9:.2f}", dense[1]]
    assert rows["deit-base 40%"] == ["0 1 3 4 6", "74.75", "14.96", "13.74", *without, "74.7", "15.0"]
    assert rows["deit-base 50%"][1:3] == ["72.38", "14.43"] and rows["deit-base 50%"][-1] == "14.5"
    assert rows["deit-small 30%"][1] == "19.68" and rows["deit-tiny 25%"][1] == "5.27"
    assert rows["deit-tiny 50%"][-2:] == ["", ""]


def test_every_preset_can_be_asked_for():
    for presets in script.PRESETS.values():
        for preset in presets:
            BenchmarkOptions(**preset)
    chunking, memory = script.PRESETS["chunking"][0], script.PRESETS["memory"]
    assert chunking["rounds"] >= script.LEAST_PAIRS
    # As many tokens as four images have.
    assert chunking["chunk_size_feed_forward"] == 4 * 197 and {str(item.get("dtypes")) for item in memory} == {
        "None",
        "['bfloat16']",
    }


def verdicts(checks):
    return {text.split(":")[0].rsplit(",", 1)[0]: kept for text, kept in checks}


def test_bounds_of_speed():
    entry = group(16)
    checks = script.speed_checks(entry)
    # Made up: dense 1.01, 40 % 1.30, 50 % 1.40.
    assert [kept for _, kept in checks] == [False, True, True]
    assert [text for text, _ in checks][0] == "deit-base dense 1.010x, at least 1.06x asked"
    entry["models"][3]["ratio_to_first"] = 1.26
    entry["models"][4]["ratio_to_first"] = 1.29
    assert not any(kept for _, kept in script.speed_checks(entry))
    for other in ({"batch_size": 8}, {"dtype": "bfloat16"}, {"shape": "deit-tiny"}, {"rounds": 0}):
        assert script.speed_checks(entry | other) == []


def test_bounds_of_memory():
    assert [kept for _, kept in script.memory_checks(budget())] == [True, True]
    few = budget()
    few["models"][0]["images"], few["models"][1]["images"] = 63, 63 * 3 - 1
    assert [kept for _, kept in script.memory_checks(few)] == [False, False]
    few["models"][0]["images"] = 0
    assert [kept for _, kept in script.memory_checks(few)] == [False, False]


@pytest.mark.parametrize(("ratio", "rounds", "kept"), [(0.98, 20, True), (0.98, 14, False), (0.96, 20, False)])
def test_bounds_of_chunking(ratio, rounds, kept):
    entry = group(16, rounds=rounds)
    entry["models"][2]["ratio_to_plain"] = ratio
    assert [found for _, found in script.chunking_checks(entry)] == [kept]
    assert script.chunking_checks(entry | {"rounds": 0}) == []


def test_readme_says_what_was_not_measured(tmp_path):
    assert "Nothing here was measured on a GPU" in script.readme(tmp_path)
    assert "Nothing here was measured on a CPU" in script.readme(tmp_path)
    write_json(tmp_path / "example-9000-2-threads.json", record())
    text = script.readme(tmp_path)
    assert "measured on a GPU" in text and "measured on a CPU" not in text
    assert "## Example 9000, 2 threads" in text and "| deit-base 40% | 74.76 |" in text
    write_json(tmp_path / "gpu.json", record(device="cuda", accelerator="Example GPU"))
    text = script.readme(tmp_path)
    assert "Nothing here" not in text and text.index("## Example 9000") < text.index("## Example GPU")


def test_no_number_is_typed_into_the_readme(tmp_path):
    head = script.readme(tmp_path).split("## What the shapes cost")[0]
    assert re.findall(r"\d", head) == []


IN_BUDGET = {
    "images": 4,
    "peak_bytes": 9,
    "allocated_bytes": None,
    "reserved_bytes": None,
    "weights_bytes": 1,
    "bytes_per_image": 2.0,
}


@pytest.mark.slow
def test_a_measurement_in_small(tmp_path, monkeypatch, capsys):
    model = tmp_path / "tiny-vit"
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=2)).save_pretrained(model)
    monkeypatch.setattr("hf_nose.roofline.CPU_SIZES", ((32, 16, 64),))
    monkeypatch.setattr(script, "CHUNKING_BOUND", 1e9)
    monkeypatch.setattr(script, "costs", lambda: [])
    results = tmp_path / "results"
    words = [f"--models={model}", f"--output_dir={results}", "--device=cpu", "--batch_sizes", "3", "--rounds", "15"]
    # A budget in the same file holds images of that name, and no times.
    monkeypatch.setattr("hf_nose.benchmark.images_in_budget", lambda *where: IN_BUDGET)
    monkeypatch.setattr(script, "PRESETS", script.PRESETS | {"memory": script.PRESETS["memory"][:1]})
    assert script.main(["memory", *words[:3], "--memory_budget", "1MB"]) == 1
    assert "MISSED: float32, 1 MiB: 4 stock images, at least 64 asked" in capsys.readouterr().out
    assert script.main(["chunking", *words]) == 0
    assert "kept: tiny-vit dense chunked: slices cost" in capsys.readouterr().out
    monkeypatch.setattr(script, "CHUNKING_BOUND", -1.0)
    assert script.main(["chunking", *words]) == 1
    assert "MISSED: tiny-vit dense chunked" in capsys.readouterr().out
    assert script.main(["table", "--removed", "0,2", *words]) == 0
    assert {path.suffix for path in results.iterdir()} == {".json", ".csv", ".md", ".png"} and len(
        list(results.iterdir())
    ) == 6
    readme, before = (results / "README.md").read_text(), {path: path.read_bytes() for path in results.iterdir()}
    for path in before:
        if path.suffix != ".json":
            path.unlink()
    assert script.main(["render", f"--output_dir={results}"]) == 0
    assert {path: path.read_bytes() for path in results.iterdir()} == before and "tiny-vit 0,2" in readme
