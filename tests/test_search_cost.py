"""What the search costs: its script, on a model of seconds."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from reference_vit import images, reference, stock_vit
from tiny_run import finished_run


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import search_cost  # noqa: E402


@pytest.mark.slow
def test_every_arm_is_measured_in_every_round(tmp_path_factory, monkeypatch):
    output = tmp_path_factory.mktemp("cost") / "cost.json"
    words = [f"--model={finished_run(tmp_path_factory) / 'dense'}", "--dataset=digits", "--num_removed=2"]
    words += ["--num_calibration=24", "--batch_size=8", "--rounds=2", f"--arms={','.join(search_cost.ARMS)}"]
    monkeypatch.setattr(search_cost, "SEARCH_BOUND", 1e9)
    monkeypatch.setattr(search_cost, "RACE_BOUND", 1e9)
    assert search_cost.main([*words, f"--output={output}"]) == 0
    record = json.loads(output.read_text())
    found = record["searches"]
    assert all(each["options"] == search_cost.ARMS.get(name, {}) for name, each in found.items())
    assert list(found) == ["naive", *search_cost.ARMS]
    assert found["naive"]["ratio_to_naive"] == 1 and found["naive"]["block_forwards_per_batch"] == 4 * (1 + 4 + 3)
    for name, each in found.items():
        assert len(each["seconds"]) == 2 and min(each["seconds"]) > 0
        assert each["layers"] == found["naive"]["layers"] or "bf16" in name
        assert len(each["runner_up_distances"]) >= 1
        assert each["largest_te_difference"] < (1.0 if "bf16" in name else 1e-3)
        assert ("confidence" in each) == ("racing" in name) and ("precision" in each) == ("bf16" in name)
    assert found["kept"]["block_forwards_per_batch"] < found["prefix"]["block_forwards_per_batch"] < 32
    assert record["clock"] == "CPU seconds" and record["num_images"] == 24


def test_the_naive_forward_computes_no_masked_attention():
    """Nor anything else than the reference does; the model is as before afterwards."""
    stock, pixel_values = stock_vit(), images()
    blocks = list(stock.vit.layers)
    with search_cost.masked(stock, [1, 4]), torch.no_grad():
        found = stock(pixel_values).logits
    assert torch.equal(found, reference(stock, pixel_values, {1: (0, 1), 4: (0, 1)})["logits"])
    assert all(block is before for block, before in zip(stock.vit.layers, blocks, strict=True))


def test_an_unknown_arm(capsys):
    with pytest.raises(SystemExit):
        search_cost.main(["--model=m", "--dataset=d", "--output=o", "--arms=prefix,magic"])
    assert "--arms must be among prefix" in capsys.readouterr().err


def test_arms_alternate():
    order = []
    searches = {name: lambda name=name: order.append(name) or {} for name in "ab"}
    _, seconds = search_cost.in_turn(searches, 3, "cpu")
    assert order == list("ababab") and {len(each) for each in seconds.values()} == {3}


def test_a_processor_that_sleeps_spends_no_seconds():
    """The machine's other work counts for nothing: the clock is this process's."""
    _, seconds = search_cost.in_turn({"a": lambda: time.sleep(0.3) or {}}, 1, "cpu")
    assert seconds["a"][0] < 0.1


def test_the_committed_searches_are_as_cheap_and_exact_as_asked():
    path = ROOT / "model_cards" / "results" / "deit-tiny" / "search_cost.json"
    checks = search_cost.bounds(json.loads(path.read_text())["searches"])
    assert len(checks) == 4 and all(is_kept for _, is_kept in checks), checks


@pytest.mark.parametrize(
    ("arm", "change", "missed"),
    [
        ("kept", {"ratio_to_naive": 0.61}, []),
        ("prefix", {"ratio_to_naive": 0.61}, []),
        ("racing", {"ratio_to_naive": 0.26}, ["cheapest race"]),
        ("racing", {"layers": [2, 1]}, ["other layers than the naive search's: racing"]),
        ("kept", {"largest_te_difference": 2e-3}, ["TE within 0.002"]),
        # bfloat16 is told apart, with its error.
        ("racing_bf16", {"ratio_to_naive": 9.0, "layers": [3, 4], "largest_te_difference": 1.0}, []),
    ],
)
def test_bounds(arm, change, missed):
    good = {"layers": [1, 2], "largest_te_difference": 1e-5}
    searches = {"naive": good | {"ratio_to_naive": 1.0}, "prefix": good | {"ratio_to_naive": 0.6}}
    searches |= {"kept": good | {"ratio_to_naive": 0.4}, "racing": good | {"ratio_to_naive": 0.25}}
    searches["racing_bf16"] = dict(good, ratio_to_naive=0.2)
    searches[arm] |= change
    found = [text for text, is_kept in search_cost.bounds(searches) if not is_kept]
    assert len(found) == len(missed) and all(text.startswith(start) for text, start in zip(found, missed, strict=True))
    both = {name: each | {"ratio_to_naive": 0.61} for name, each in searches.items() if name in ("naive", "prefix")}
    assert [is_kept for _, is_kept in search_cost.bounds(both)][0] is False


def test_a_comparison_ends_where_the_picks_part():
    naive = {
        "num_images": 8,
        "trace": [{"picked": 1, "scores": {0: 3.0, 1: -2.0}}, {"picked": 0, "scores": {0: 9.0, 2: 8.5}}],
    }
    other = {
        "layers": [1, 2],
        "trace": [
            {"picked": 1, "scores": {0: 7.0, 1: -2.5}, "images": {0: 4, 1: 8}},
            {"picked": 2, "scores": {0: 9.25, 2: 8.5}, "images": {0: 8, 2: 8}},
            {"picked": 5, "scores": {0: 100.0, 5: 1.0}},
        ],
    }
    naive["trace"].append({"picked": 4, "scores": {0: 1.0, 5: 2.0}})
    found = search_cost.compare(naive, other)
    # Only what was scored on all images counts, and the round in which another layer is picked still does.
    assert found["largest_te_difference"] == 0.5
    assert found["runner_up_distances"] == [1.0, 0.5]
