"""FAB-top-k against its walk over ranks, and the search for k against its regret bound."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.blocks import sparsify
from coordinator.blocks.sparsify import Search, fair_top, moved, probed, ranked, rounded, step_size


def walk(lists, count):
    """Section III-B as it is written: ranks from the first, devices by magnitude at that rank, index if it is new."""
    orders = [sorted(zip(-np.abs(v), p, strict=True)) for p, v in lists]
    taken = []
    for rank in range(max((len(o) for o in orders), default=0)):
        here = sorted(order[rank] for order in orders if rank < len(order))
        for _, place in here:
            if len(taken) == count:
                return sorted(taken)
            if place not in taken:
                taken.append(int(place))
    return sorted(taken)


@st.composite
def uploads(draw):
    size = draw(st.integers(1, 30))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    lists = []
    for _ in range(draw(st.integers(1, 5))):
        places = np.sort(rng.choice(size, rng.integers(0, size + 1), replace=False)).astype(np.int64)
        values = rng.standard_normal(len(places)).astype(np.float32)
        lists.append((places, np.round(values, draw(st.integers(0, 3)))))  # few digits make ties
    return size, lists, draw(st.integers(0, size + 3))


@settings(max_examples=200, deadline=None)
@given(uploads())
def test_fair_top_is_the_walk_over_ranks_and_exactly_as_many(case):
    size, lists, count = case
    chosen = fair_top(iter(lists), count, size)
    assert chosen.tolist() == walk(lists, count)
    union = {int(p) for places, _ in lists for p in places}
    assert len(chosen) == min(count, len(union))
    for places, values in lists:  # the fairness floor
        floor = places[np.lexsort((places, -np.abs(values)))][: count // len(lists)]
        assert set(floor.tolist()) <= set(chosen.tolist())


def test_fair_top_by_hand():
    a = (np.array([0, 1, 2]), np.array([9.0, -8.0, 7.0], np.float32))
    b = (np.array([0, 3, 4]), np.array([0.3, -0.2, 0.1], np.float32))
    # ranks: a has 0, 1, 2; b has 0, 3, 4, all of it small. A plain top-3 of the sum would hear nothing of b but 0.
    assert fair_top((a, b), 1, 5).tolist() == [0]
    assert fair_top((a, b), 2, 5).tolist() == [0, 1]
    assert fair_top((a, b), 3, 5).tolist() == [0, 1, 3]
    assert fair_top((a, b), 4, 5).tolist() == [0, 1, 2, 3]
    assert fair_top((a, b), 5, 5).tolist() == fair_top((a, b), 99, 5).tolist() == [0, 1, 2, 3, 4]
    assert fair_top((), 3, 5).tolist() == []
    assert fair_top((a,), 0, 5).tolist() == []


def test_ranked_is_a_stable_sort():
    values = np.array([1.0, -3.0, 0.0, 3.0, -0.0, 1.0, -1.0], np.float32)
    assert ranked(values).tolist() == np.argsort(-np.abs(values), kind="stable").tolist() == [1, 3, 0, 5, 6, 2, 4]


def test_times_and_signs_by_hand():
    assert sparsify.exchange_time(100, 100, 1.0, 10.0) == pytest.approx(11.0)  # whole is whole, whatever is asked for
    assert sparsify.exchange_time(1, 100, 1.0, 10.0) == pytest.approx(1 + 5 + 5 * 0.02)  # value and position
    assert sparsify.exchange_time(50, 100, 1.0, 10.0) == pytest.approx(1 + 5 + 5 * (0.5 + 1 / 32))  # a bit per weight
    assert sparsify.projected_time(2.0, 0.3, 0.1) == pytest.approx(6.0)
    for drops in ((0.0, 0.1), (0.1, -0.1), (math.nan, 0.1), (0.1, math.nan)):
        assert sparsify.projected_time(2.0, *drops) is None
    assert sparsify.slope_sign(3.0, 2.0, 10, 5) == 1
    assert sparsify.slope_sign(2.0, 3.0, 10, 5) == -1
    assert sparsify.slope_sign(2.0, 2.0, 10, 5) == 0


@given(st.floats(0, 1000), st.floats(0, 1, exclude_max=True))
def test_rounding_gives_a_neighbour_and_the_right_mean(count, drawn):
    assert rounded(count, drawn) in (math.floor(count), math.floor(count) + 1)
    grid = (np.arange(1000) + 0.5) / 1000
    assert np.mean([rounded(count, u) for u in grid]) == pytest.approx(count, abs=1.01e-3)


def test_a_step_by_hand():
    search = Search(60.0, 0.0, 100.0)
    assert step_size(search) == pytest.approx(100 / math.sqrt(2))
    assert probed(search, 10.0) == pytest.approx(60 - 50 / math.sqrt(2))
    assert probed(Search(30.0, 10.0, 100.0), 10.0) == 1.0  # a tenth of the least k
    assert probed(Search(1.0, 1.0, 1.0), 1.0) == 0.0
    assert moved(search, 1, (0, 100)).count == 0.0  # 60 - 70.7, back into the interval
    assert moved(search, -1, (0, 100)).count == 100.0
    assert moved(search, 0, (0, 100)).count == 60.0
    second = moved(search, 0, (0, 100))
    assert step_size(second) == pytest.approx(50.0)
    assert moved(second, 1, (0, 100)).count == pytest.approx(10.0)


def test_without_a_sign_k_stays_and_then_grows():
    search = Search(10.0, 0.0, 100.0)
    for _ in range(sparsify.PATIENCE):
        search = moved(search, None, (0, 100))
        assert search.count == 10.0
    delta = step_size(search)
    search = moved(search, None, (0, 100))
    assert search.count == pytest.approx(10 + delta)
    assert search.held == 0
    held = moved(moved(search, None, (0, 100)), None, (0, 100))
    assert held.held == 2
    assert moved(held, 1, (0, 100)).held == 0


def regret(slopes, least, rounds, seed):
    """Run the search on one convex cost, given by its slopes left and right of its minimum."""
    low, high = 10.0, 1000.0

    def cost(k):
        return slopes[0] * max(0.0, least - k) + slopes[1] * max(0.0, k - least)

    search = Search(float(np.random.default_rng(seed).uniform(low, high)), low, high)
    total = 0.0
    for _ in range(rounds):
        total += cost(search.count)
        sign = -1 if search.count < least else int(search.count > least)
        search = moved(dataclasses.replace(search, seen=0), sign, (low, high))  # the interval stays
    return total, max(slopes) * (high - low) * math.sqrt(2 * rounds)


@settings(max_examples=40, deadline=None)
@given(st.tuples(st.floats(0.01, 5), st.floats(0.01, 5)), st.floats(10, 1000), st.integers(1, 400), st.integers(0, 99))
def test_regret_is_within_the_bound(slopes, least, rounds, seed):
    total, bound = regret(slopes, least, rounds, seed)
    assert total <= bound * (1 + 1e-9)


def test_the_interval_shrinks_around_where_k_settles():
    search = Search(800.0, 2.0, 1000.0)
    widths = [search.high - search.low]
    for _ in range(400):
        search = moved(search, 1 if search.count > 50 else -1, (2.0, 1000.0))
        assert search.low <= search.count <= search.high
        if search.high - search.low != widths[-1]:
            before, now = widths[-1], search.high - search.low
            assert before + now <= math.sqrt(2) * before
            assert search.steps == 0
            widths.append(now)
    assert len(widths) > 2
    assert search.low < 50 < search.high
    assert abs(search.count - 50) < 10
    assert search.low >= 2.0


def test_the_interval_waits_for_as_many_steps_as_before():
    settled = {"seen": sparsify.WINDOW - 1, "seen_low": 50.0, "seen_high": 51.0}
    early = moved(Search(50.0, 0.0, 1000.0, steps=30, steps_before=40, **settled), 0, (0, 1000))
    assert (early.low, early.high, early.seen, early.steps) == (0.0, 1000.0, 0, 31)
    late = moved(Search(50.0, 0.0, 1000.0, steps=39, steps_before=40, **settled), 0, (0, 1000))
    assert (late.low, late.high, late.steps, late.steps_before) == (50 / 1.5, 51 * 1.5, 0, 40)
