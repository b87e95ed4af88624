"""The Pareto plot: which points nothing beats, and a picture of what the record holds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_benchmark import group, record
from PIL import Image

from hf_nose.benchmark_figures import draw_pareto, pareto_front


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


def test_nothing_to_draw(tmp_path):
    path = tmp_path / "speed.png"
    path.write_bytes(b"old")
    assert not draw_pareto(record([], []), path)
    assert not path.exists()
