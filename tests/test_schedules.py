"""Schedules of the mask M, as properties: from 1, never up, exactly 0 in the tail."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_nose.schedules import SCHEDULES, decay_length, decay_turns, mask_value, scheduled_masks


falling = st.sampled_from(["linear", "cosine"])
lengths = st.integers(2, 500)
fractions = st.floats(0.01, 1.0)


@given(falling, lengths)
def test_a_decay_starts_at_one_ends_at_zero_and_never_rises(schedule, length):
    values = [mask_value(schedule, index, length) for index in range(length)]
    assert values[0] == 1.0
    assert values[-1] == 0.0
    assert all(0.0 <= value <= 1.0 for value in values)
    assert all(later < earlier for earlier, later in zip(values, values[1:], strict=False))


@given(st.sampled_from(SCHEDULES), lengths, st.integers(0, 10**6))
def test_after_its_length_a_decay_is_exactly_zero(schedule, length, further):
    assert mask_value(schedule, length - 1 + further, length) == 0.0


@given(lengths)
def test_linear_is_straight_and_cosine_is_symmetric(length):
    for index in range(length):
        assert mask_value("linear", index, length) == pytest.approx(1 - index / (length - 1))
        mirrored = mask_value("cosine", index, length) + mask_value("cosine", length - 1 - index, length)
        assert mirrored == pytest.approx(1.0)


@given(st.integers(0, 1000), lengths)
def test_one_shot_is_zero_from_the_first_step(index, length):
    assert mask_value("one_shot", index, length) == 0.0


@given(falling, fractions, st.integers(1, 400))
def test_training_always_ends_at_zero(schedule, decay, total):
    values = [scheduled_masks(schedule, decay, "step", step, total)[0] for step in range(total)]
    length = decay_length(decay, total)
    assert values[-1] == 0.0
    assert 1 <= length <= total
    assert all(value == 0.0 for value in values[length - 1 :])
    assert all(value > 0.0 for value in values[: length - 1])
    if length > 1:
        assert values[0] == 1.0


@given(st.integers(2, 400), st.data())
def test_a_decay_above_one_is_a_number_of_units(total, data):
    number = data.draw(st.integers(2, total))
    assert decay_length(float(number), total) == number
    assert scheduled_masks("linear", number, "step", number - 2, total)[0] > 0.0
    assert scheduled_masks("linear", number, "step", number - 1, total)[0] == 0.0


def test_a_decay_up_to_one_is_a_fraction():
    assert decay_length(1.0, 400) == 400
    assert decay_length(0.75, 400) == 300
    assert decay_length(0.001, 400) == 1


@pytest.mark.parametrize("decay", [0, -0.5, 1.5, 401, 401.5])
def test_a_decay_that_does_not_fit_into_training_is_refused(decay):
    with pytest.raises(ValueError, match=rf"decay must be .*400.* got {decay}"):
        decay_length(decay, 400)


@given(falling, st.integers(1, 40), st.integers(1, 30), fractions)
def test_in_epochs_the_mask_changes_only_between_epochs(schedule, num_epochs, steps_per_epoch, decay):
    total = num_epochs * steps_per_epoch
    values = [scheduled_masks(schedule, decay, "epoch", step, total, num_epochs)[0] for step in range(total)]
    by_epoch = [set(values[start : start + steps_per_epoch]) for start in range(0, total, steps_per_epoch)]
    assert [len(found) for found in by_epoch] == [1] * num_epochs
    length = decay_length(decay, num_epochs)
    assert [found.pop() for found in by_epoch] == [mask_value(schedule, epoch, length) for epoch in range(num_epochs)]


def test_the_published_decay_takes_300_of_400_epochs():
    values = [scheduled_masks("linear", 300, "epoch", 10 * epoch, 4000, 400)[0] for epoch in range(400)]
    assert values[0] == 1.0
    assert values[150] == pytest.approx(1 - 150 / 299)
    assert values[298] > 0.0
    assert set(values[299:]) == {0.0}


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="schedule must be one of .*'linear'.* got 'exponential'"):
        mask_value("exponential", 0, 10)
    with pytest.raises(ValueError, match="unit must be one of .*'epoch'.* got 'minute'"):
        scheduled_masks("linear", 0.5, "minute", 0, 10)
    with pytest.raises(ValueError, match="order must be one of .*'ascending'.* got 'random'"):
        decay_turns("random", 10, 2)
    with pytest.raises(ValueError, match="unit='epoch' needs the number of epochs"):
        scheduled_masks("linear", 0.5, "epoch", 0, 10)


@given(falling, lengths, lengths)
def test_a_longer_decay_is_never_below_a_shorter_one(schedule, one, other):
    short, long = sorted((one, other))
    for index in range(long):
        assert mask_value(schedule, index, long) >= mask_value(schedule, index, short) - math.ulp(1.0)


@given(falling, st.integers(1, 12), st.data())
def test_one_after_another_every_layer_has_the_whole_schedule_in_its_turn(schedule, count, data):
    length = data.draw(st.integers(2 * count, 300))
    told = (schedule, length, "step")
    rows = [scheduled_masks(*told, step, 300, None, "ascending", count) for step in range(300)]
    columns = list(zip(*rows, strict=True))
    for turn, column in enumerate(columns):
        start, end = turn * length // count, (turn + 1) * length // count
        assert set(column[:start]) <= {1.0}
        assert list(column[start:end]) == [mask_value(schedule, index, end - start) for index in range(end - start)]
        assert set(column[end - 1 :]) == {0.0}
    mirrored = [scheduled_masks(*told, step, 300, None, "descending", count) for step in range(300)]
    assert mirrored == [row[::-1] for row in rows]


def test_together_all_layers_have_one_mask():
    assert scheduled_masks("linear", 0.5, "step", 3, 20, None, "together", 3) == [mask_value("linear", 3, 10)] * 3


def test_turns_of_nothing_are_refused():
    assert scheduled_masks("linear", 4, "epoch", 2, 8, 4, "ascending", 4) == [0.0, 0.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="each of 5 layers a turn, but the decay has a length of 4"):
        scheduled_masks("linear", 4, "epoch", 0, 8, 4, "ascending", 5)
