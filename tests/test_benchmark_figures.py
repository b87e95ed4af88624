"""The Pareto plot: which points nothing beats, and a picture of what the record holds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_benchmark import group, record
from matplotlib.figure import Figure
from PIL import Image

from hf_nose import benchmark_figures
from hf_nose.benchmark_figures import accuracy_panel, draw_pareto, latency_panel, pareto_front


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([(1, 1)], [0]),
        ([(1, 1), (2, 2), (3, 1.5)], [0, 1]),
        ([(1, 2), (2, 1)], [0]),
        ([(1, 2), (1, 3), (0.5, 3)], [2]),
        # Two of the same place do not beat each other.
        ([(1, 1), (1, 1), (2, 0.5)], [0, 1]),
        ([], []),
    ],
)
def test_pareto_front(points, front):
    assert pareto_front(points) == front


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_a_front_is_not_empty_and_rises(points):
    front = sorted({points[index] for index in pareto_front(points)})
    assert front[0][0] == min(cost for cost, _ in points) and front[-1][1] == max(gain for _, gain in points)
    assert [gain for _, gain in front] == sorted(gain for _, gain in front)
    assert len({cost for cost, _ in front}) == len({gain for _, gain in front}) == len(front)


def test_a_picture_with_a_row_a_setting(tmp_path):
    path = tmp_path / "speed.png"
    one, three = record(), record([group(1), group(8), group(1, dtype="bfloat16"), group(1, shape="my-vit")])
    heights = []
    for made in (one, three):
        assert draw_pareto(made, path)
        with Image.open(path) as picture:
            heights.append(picture.height)
    assert heights[1] > 2.5 * heights[0]


def test_models_that_did_not_run_side_by_side_share_no_panel(tmp_path):
    path, other = tmp_path / "speed.png", group(1)
    del other["models"][-1]
    heights = []
    for groups in ([group(1), group(8)], [group(1), other]):
        assert draw_pareto(record(groups), path)
        with Image.open(path) as picture:
            heights.append(picture.height)
    assert heights[1] > 1.5 * heights[0]


def drawn(axes):
    """The points of every line, by its label."""
    return {line.get_label(): [tuple(point) for point in line.get_xydata()] for line in axes.get_lines()}


def test_every_batch_size_is_a_point():
    axes, groups = Figure().subplots(), [group(1), group(8)]
    latency_panel(axes, groups)
    lines = drawn(axes)
    # Whoever is faster at once beats the slower; a larger batch gains images per second and costs time.
    assert lines.pop("not beaten") == lines["deit-base 50%"]
    assert set(lines) == {model["name"] for model in groups[0]["models"]}
    for name, points in lines.items():
        models = [model for entry in groups for model in entry["models"] if model["name"] == name]
        assert points == [(1e3 * model["latency_s"], model["images_per_s"]) for model in models]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("latency of a forward (ms)", "images per second")
    assert axes.get_xscale() == "log"
    axes = Figure().subplots()
    latency_panel(axes, [group(8)])
    assert axes.get_xscale() == "linear"


def test_our_speed_against_the_paper_s_accuracy():
    axes = Figure().subplots()
    accuracy_panel(axes, "deit-base", group(128))
    lines, speed = drawn(axes), 1 + 128 / 1000
    front = lines.pop("not beaten")
    # DeiT-B has 81.8 % in the paper, as its 40 % has; dense and stock are one model there.
    assert {name: points[0] for name, points in lines.items()} == {
        "deit-base stock": (10.0 * speed, 81.8),
        "deit-base dense": (10.1 * speed, 81.8),
        "deit-base 40%": (13.0 * speed, 81.8),
        "deit-base 50%": (14.0 * speed, 81.5),
    }
    assert front == [(13.0 * speed, 81.8), (14.0 * speed, 81.5)]
    assert "the paper's" in axes.get_title() and axes.get_ylabel() == "top-1 % (paper)"


def test_the_largest_batch_stands_beside_the_accuracy(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(benchmark_figures, "accuracy_panel", lambda axes, shape, entry: shown.append(entry))
    draw_pareto(record([group(8), group(128), group(1)]), tmp_path / "speed.png")
    assert [entry["batch_size"] for entry in shown] == [128]


def test_nothing_to_draw(tmp_path):
    path = tmp_path / "speed.png"
    path.write_bytes(b"old")
    assert not draw_pareto(record([], []), path)
    assert not path.exists()
