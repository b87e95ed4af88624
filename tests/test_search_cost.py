"""What the search costs: its script, on a model of seconds."""

import json
import sys
from pathlib import Path

import pytest
import torch
from reference_vit import images, reference, stock_vit
from tiny_run import finished_run


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import search_cost  # noqa: E402


@pytest.mark.slow
def test_every_arm_is_measured_in_every_round(tmp_path_factory):
    output = tmp_path_factory.mktemp("cost") / "cost.json"
    words = [f"--model={finished_run(tmp_path_factory) / 'dense'}", "--dataset=digits", "--num_removed=2"]
    words += ["--num_calibration=24", "--batch_size=8", "--rounds=2", f"--arms={','.join(search_cost.ARMS)}"]
    assert search_cost.main([*words, f"--output={output}"]) == 0
    record = json.loads(output.read_text())
    found = record["searches"]
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
