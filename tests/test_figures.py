"""Pictures show what the records say, read back from the axes."""

import json

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from PIL import Image
from run_records import LAYERS, records, write_run

from hf_nose.figures import (
    comparison_figure,
    draw_figures,
    entropy_figure,
    scaled_scores,
    training_figure,
    trajectory_boxes,
    trajectory_figure,
)


TRACE = [
    {"picked": 2, "scores": {"0": -30.0, "1": 20.0, "2": -10.0, "3": 15.0}},
    {"picked": 0, "scores": {"0": -5.0, "1": 10.0, "3": 45.0}},
]


def test_all_figures_are_drawn_and_hold_something(tmp_path):
    drawn = draw_figures(write_run(tmp_path, records()))
    assert [path.name for path in drawn] == ["entropy.png", "trajectory.png", "training.png", "comparison.png"]
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == sorted(path.name for path in drawn)
    for path in drawn:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("L"), dtype=float)
            assert picture.width >= 1000 and pixels.var() > 100
            assert len(picture.convert("RGB").getcolors(maxcolors=2**24)) > 20
            # No host, path or date in what the file says of itself.
            assert not set(picture.info) - {"dpi"}


@pytest.mark.parametrize(
    ("present", "names"),
    [
        ((), []),
        (("profile",), ["entropy"]),
        (("selection",), ["trajectory"]),
        (("prepare",), ["training"]),
        (("prepare", "profile", "selection"), ["entropy", "trajectory", "training"]),
        (("metrics",), ["comparison"]),
    ],
)
def test_what_is_missing_is_left_out_and_stale_pictures_go(tmp_path, present, names):
    write_run(tmp_path, records(*present) if present else {})
    (tmp_path / "figures").mkdir()
    for name in ("entropy", "trajectory", "training", "comparison"):
        (tmp_path / "figures" / f"{name}.png").write_text("stale")
    (tmp_path / "figures" / "mine.png").write_text("not ours")
    assert [path.stem for path in draw_figures(tmp_path)] == names
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {*names, "mine"}


def test_a_figure_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    write_run(tmp_path, records("profile"))
    (path,) = draw_figures(tmp_path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("hf_nose.figures.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        draw_figures(tmp_path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["entropy.png"]


def test_a_corrupt_record_is_named(tmp_path):
    write_run(tmp_path, records("profile"))
    (tmp_path / "profile.json").write_text('{"schema": 1, "layers": [')
    with pytest.raises(ValueError, match="profile.json"):
        draw_figures(tmp_path)


def test_scores_are_scaled_in_each_row():
    expected = [[1.0, 0.5, 0.0, 0.25], [0.0, 0.125, np.nan, 1.0]]
    np.testing.assert_allclose(scaled_scores(TRACE, 4), expected)
    np.testing.assert_allclose(scaled_scores(TRACE, 5)[:, 4], [np.nan, np.nan])
    signed = scaled_scores(TRACE, 4, absolute=False)
    np.testing.assert_allclose(signed, [[0.0, 1.0, 0.4, 0.9], [0.0, 0.3, np.nan, 1.0]])


def test_equal_scores_are_all_zero():
    np.testing.assert_array_equal(scaled_scores([{"picked": 0, "scores": {"0": -3.0, "1": 3.0}}], 2), [[0.0, 0.0]])
    np.testing.assert_array_equal(scaled_scores([{"picked": 1, "scores": {"1": 7.0}}], 2), [[np.nan, 0.0]])


def test_boxes_are_where_the_trace_says():
    trace = [{"picked": layer, "scores": {}} for layer in (3, 5, 1)]
    chosen, earlier = trajectory_boxes(trace)
    assert chosen == [(0, 3), (1, 5), (2, 1)]
    assert earlier == [(1, 3), (2, 3), (2, 5)]


def boxes(figure, colour):
    """(row, column) of the centres of the boxes of a colour, and their line styles."""
    patches = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    patches = [patch for patch in patches if to_hex(patch.get_edgecolor()) == colour]
    centres = [
        (round(patch.get_y() + patch.get_height() / 2), round(patch.get_x() + patch.get_width() / 2))
        for patch in patches
    ]
    return centres, {patch.get_linestyle() for patch in patches}


def test_trajectory_figure_draws_those_boxes_and_that_matrix():
    content = records("prepare", "selection")
    figure = trajectory_figure(content)
    chosen, earlier = trajectory_boxes(content["selection"]["trace"])
    assert boxes(figure, "#d00000") == (chosen, {"--"})
    assert boxes(figure, "#7a7f8a") == (earlier, {":"})
    shown = figure.axes[0].images[0].get_array().filled(np.nan)
    np.testing.assert_allclose(shown, scaled_scores(content["selection"]["trace"], 12))
    assert shown.shape == (5, 12)
    texts = {text.get_position(): text.get_text() for text in figure.axes[0].texts}
    assert texts[3, 0] == "−1.9" and (3, 1) not in texts
    assert "3, 5, 1, 8, 7" in figure.get_suptitle()
    assert figure.axes[1].get_ylabel() == "|TE|, scaled in each row"


@pytest.mark.parametrize(
    ("change", "label"),
    [
        ({"sign": "signed"}, "TE, scaled in each row"),
        ({"criterion": "prediction_kl"}, "prediction kl, scaled in each row"),
        ({"search": "racing"}, "|TE|, scaled in each row"),
    ],
)
def test_the_trajectory_names_what_it_shows(change, label):
    content = records("selection")
    content["selection"] |= change
    assert trajectory_figure(content).axes[1].get_ylabel() == label


def test_trajectory_has_a_column_for_blocks_that_were_no_candidates():
    content = records("prepare", "selection")
    content["selection"]["trace"] = TRACE
    assert trajectory_figure(content).axes[0].images[0].get_array().shape == (2, 12)


@pytest.mark.parametrize(
    "selection",
    [
        {"search": "given", "trace": []},
        {"search": "exhaustive", "trace": [{"picked": [1, 3], "scores": {"1,3": -2.0, "0,1": 4.0}}]},
    ],
)
def test_only_a_greedy_search_has_a_trajectory(selection):
    content = records("selection")
    content["selection"] |= selection
    assert trajectory_figure(content) is None


def curve(axes, label):
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return np.asarray(line.get_ydata(), dtype=float)


def test_entropy_figure_shows_the_profile():
    content = records("profile", "selection")
    left, right = entropy_figure(content).axes
    layers = content["profile"]["layers"]
    np.testing.assert_allclose(curve(left, "attention"), [layer["attention"]["stream"] for layer in layers])
    np.testing.assert_allclose(curve(right, "MLP"), [layer["mlp"]["branch"] for layer in layers])
    assert sorted(round(patch.get_x() + 0.4) for patch in left.patches) == sorted(LAYERS)
    assert len(left.lines) == 2
    del content["selection"]
    assert not entropy_figure(content).axes[0].patches


def test_entropy_figure_of_a_compressed_model():
    content = records("profile")
    first, second, third, *_ = content["profile"]["layers"]
    first["attention"] = None
    second["attention"] |= {"branch": None, "branch_scale_free": None}
    third["mlp"]["stream_scale_free"] -= 33.3
    left, right = entropy_figure(content).axes
    assert np.isnan(curve(left, "attention")).tolist() == [True] + 11 * [False]
    assert np.isnan(curve(right, "attention")).tolist() == [True, True] + 10 * [False]
    raw, scale_free = curve(left, "MLP"), curve(left, "MLP, scale-free")
    assert raw[2] - scale_free[2] == pytest.approx(33.3)
    assert len(right.lines) == 2


def test_training_figure_shows_dilution_beside_its_control():
    content = records()
    mask, loss, top1 = training_figure(content).axes
    log = content["dilution"]["log"]
    np.testing.assert_allclose(curve(mask, "dilution"), [line["mask"] for line in log])
    assert curve(mask, "dilution")[-1] == 0.0
    assert len(curve(mask, "dense, trained on as long")) == 0
    control = content["dilution"]["control"]["log"]
    np.testing.assert_allclose(
        curve(loss, "dense, trained on as long"), [line["loss"] for line in control if "loss" in line]
    )
    np.testing.assert_allclose(
        curve(top1, "dilution"), [100 * line["eval_top1"] for line in log if "eval_top1" in line]
    )
    np.testing.assert_allclose(curve(top1, "dense, before"), 96.23)


def test_training_figure_without_control_metrics_or_evaluation():
    content = records("dilution")
    content["dilution"]["control"] = None
    content["dilution"]["log"] = [line for line in content["dilution"]["log"] if "eval_top1" not in line]
    figure = training_figure(content)
    assert [axes.get_ylabel() for axes in figure.axes] == ["mask M", "training loss"]
    content["dilution"]["log"] = []
    assert training_figure(content) is None


def test_training_figure_of_a_dense_run():
    content = records("prepare")
    assert [axes.get_ylabel() for axes in training_figure(content).axes] == ["training loss", "top-1 (%)"]
    content["prepare"]["dense_training"] = None
    assert training_figure(content) is None


def test_comparison_figure_shows_the_metrics():
    content = records("metrics")
    panels = comparison_figure(content).axes
    assert [axes.get_title() for axes in panels] == [
        "top-1 (%)",
        "parameters (M)",
        "MACs (M)",
        "images per second",
    ]
    widths = [[bar.get_width() for bar in axes.patches] for axes in panels]
    models = content["metrics"]["models"].values()
    np.testing.assert_allclose(widths[0], [100 * model["top1"] for model in models])
    np.testing.assert_allclose(widths[1], [model["parameters"] / 1e6 for model in models])
    np.testing.assert_allclose(widths[3], [model["images_per_s"] for model in models])
    for axes in panels:
        assert axes.get_xlim()[0] == 0


def test_comparison_figure_needs_a_compressed_model():
    content = records("metrics")
    for model in content["metrics"]["models"].values():
        model["macs"] *= 1000
    assert comparison_figure(content).axes[2].get_title() == "MACs (G)"
    del content["metrics"]["models"]["dense_control"]
    assert len(comparison_figure(content).axes[0].patches) == 2
    del content["metrics"]["models"]["compressed"]
    assert comparison_figure(content) is None


def test_figures_come_from_the_files_alone(tmp_path):
    one, two = (write_run(tmp_path / name, records("metrics")) for name in ("one", "two"))
    record = json.loads((two / "metrics.json").read_text())
    record["models"]["compressed"]["top1"] = 0.2
    (two / "metrics.json").write_text(json.dumps(record))
    same = [draw_figures(one)[0].read_bytes() for _ in range(2)]
    assert same[0] == same[1]
    assert draw_figures(two)[0].read_bytes() != same[0]
