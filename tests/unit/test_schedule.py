"""Schedules at their ends and between."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.blocks.schedule import cosine, cubic, linear, progress, rate_at, segmented, segmented_by_code
from coordinator.recipes import scheduled
from wire.errors import ConfigError
from wire.messages import Recipe


def test_progress_is_held_at_both_ends():
    assert [progress(t, 2, 6) for t in (0, 2, 3, 6, 9)] == [0, 0, 0.25, 1, 1]
    assert progress(0, 3, 3) == 1.0


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 50))
def test_cubic_goes_from_end_to_end_without_turning_back(start, end, rounds):
    values = [cubic(start, end, t / rounds) for t in range(rounds + 1)]
    assert values[0] == pytest.approx(start)
    assert values[-1] == end
    steps = [(b - a) * math.copysign(1, end - start) for a, b in itertools.pairwise(values)]
    assert all(step >= -1e-12 for step in steps)


def test_cubic_linear_and_cosine_by_hand():
    assert cubic(0.5, 0.9, 0.5) == pytest.approx(0.9 - 0.4 / 8)
    assert [linear(1.0, 0.2, done) for done in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.6, 0.2])
    assert [cosine(0.3, t, 10) for t in (0, 5, 10, 11)] == pytest.approx([0.3, 0.15, 0.0, 0.0])


@pytest.mark.parametrize(("segments", "rounds"), [(1, 7), (4, 100), (20, 1000), (3, 200)])
def test_penalties_have_q_values_that_never_fall(segments, rounds):
    for schedule in (segmented, segmented_by_code):
        values = [schedule(1e-3, segments, t, rounds) for t in range(rounds)]
        assert values[0] == 0
        assert values == sorted(values)
        assert len(set(values)) == segments
    assert segmented(1e-3, segments, rounds - 1, rounds) == pytest.approx(1e-3 * (segments - 1) / segments)
    assert segmented(1e-3, segments, rounds + 5, rounds) == segmented(1e-3, segments, rounds - 1, rounds)


def test_penalties_are_the_formula_and_the_code():
    for t in range(1000):
        assert segmented(1e-3, 20, t, 1000) == 1e-3 * (20 * t // 1000) / 20
    assert segmented_by_code(1e-3, 20, 50, 1000) == 5e-4
    assert segmented_by_code(1e-3, 20, 999, 1000) == pytest.approx(9.74e-4, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "factors"),
    [
        ("constant", (1.0, 1.0, 1.0, 1.0)),
        ("exponential 0.5", (1.0, 0.5, 0.25, 0.125)),
        ("halving 2", (1.0, 0.5**0.5, 0.5, 0.5**1.5)),
        ("staircase 2 0.1", (1.0, 1.0, 0.1, 0.1)),
        ("cosine 2", (1.0, 0.5, 0.5, 0.5)),
        ("linear 4", (1.0, 0.75, 0.5, 0.25)),
        ("linear 2", (1.0, 0.5, 0.5, 0.5)),
        ("cosine 4", (1.0, 0.5 + 0.5 * math.cos(math.pi / 4), 0.5, 0.5 + 0.5 * math.cos(3 * math.pi / 4))),
    ],
)
def test_rates(text, factors):
    assert [rate_at(text, 0.2, r) for r in (1, 2, 3, 4)] == pytest.approx([0.2 * factor for factor in factors])
    assert scheduled(Recipe(rate=0.2, batch=7), text, 3) == Recipe(rate=rate_at(text, 0.2, 3), batch=7)


def test_a_line_ends_at_its_last_round_and_stays_there():
    assert [rate_at("linear 4", 1.0, r) for r in (4, 5, 6, 400)] == pytest.approx([0.25] * 4)


def test_the_papers_rates():
    assert rate_at("exponential 0.998", 0.1, 1001) == pytest.approx(0.1 * 0.998**1000)
    assert rate_at("halving 10000", 0.1, 5001) == pytest.approx(0.1 * 0.5**0.5)


@pytest.mark.parametrize(
    "text",
    [
        *("", "steep", "constant 1", "exponential", "exponential 0", "exponential 1.5", "exponential nan"),
        *(
            "halving 0.5",
            "halving two",
            "halving nan",
            "staircase 3",
            "staircase 0 0.5",
            "cosine -1",
            "cosine inf",
            "linear",
            "linear 0",
            "linear 2.5",
        ),
    ],
)
def test_nonsense_is_refused(text):
    with pytest.raises(ConfigError, match="schedule"):
        rate_at(text, 0.1, 1)
