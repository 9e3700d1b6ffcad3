"""The largest values of a line against a stable sort, also where most of them are equal."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from wire.largest import largest

LINES = nps.arrays(np.float32, st.integers(1, 40), elements=st.integers(-2, 5))


def by_sorting(line, count):
    marked = np.zeros(line.size, bool)
    marked[np.argsort(-line, kind="stable")[: max(0, count)]] = True
    return marked


@given(LINES, st.integers(-1, 41), st.floats(0, 1), st.sampled_from([-1.0, 0.0, 9.0]))
def test_the_first_of_a_stable_sort(line, count, share, common):
    line[: round(share * line.size)] = common  # mostly one value, and not always the least
    for each in (line, line[::-1].copy()):
        before = each.copy()
        assert largest(each, count).tolist() == by_sorting(each, count).tolist()
        assert np.array_equal(each, before)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_infinities_are_values(count):
    line = np.array([-np.inf, np.inf, 0.0, np.inf, -np.inf, -np.inf, -np.inf])
    assert largest(line, count).tolist() == by_sorting(line, count).tolist()
