"""ERK: sums, saturation and the formula, against a naive search for its factor."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.blocks.erk import erk_counts, erk_densities, whole_counts

SHAPES = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 60), st.integers(1, 60)),
        st.tuples(st.integers(1, 30), st.integers(1, 30), st.just(3), st.just(3)),
    ),
    min_size=1,
    max_size=6,
).map(lambda shapes: {f"l{place}": shape for place, shape in enumerate(shapes)})


def searched(shapes, density):
    """Find the factor by bisection: the kept weights grow with it."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    low, high = 0.0, float(max(sizes.values()))
    for _ in range(200):
        middle = (low + high) / 2
        kept = sum(min(sizes[name], middle * sum(shape)) for name, shape in shapes.items())
        low, high = (middle, high) if kept < density * sum(sizes.values()) else (low, middle)
    return {name: min(1.0, high * sum(shape) / sizes[name]) for name, shape in shapes.items()}


@settings(deadline=None)
@given(SHAPES, st.floats(0.001, 0.999))
def test_densities_are_those_of_the_formula(shapes, density):
    found = erk_densities(shapes, density)
    assert found == pytest.approx(searched(shapes, density), rel=1e-6, abs=1e-9)
    assert all(0 < value <= 1 for value in found.values())


@settings(deadline=None)
@given(SHAPES, st.floats(0, 1))
def test_counts_add_up_exactly_and_are_within_one(shapes, part):
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    count = round(part * sum(sizes.values()))
    counts = erk_counts(shapes, count)
    assert sum(counts.values()) == count
    wanted = erk_densities(shapes, count / sum(sizes.values()))
    for name, size in sizes.items():
        assert 0 <= counts[name] <= size
        assert abs(counts[name] - wanted[name] * size) < 1 + 1e-6


def test_small_layers_are_whole_and_the_others_are_solved_again():
    # 5x5 would need more than it has at the common factor: 25 kept, and the rest falls on the other two alone.
    shapes = {"a": (100, 100), "b": (200, 100), "c": (5, 5)}
    found = erk_densities(shapes, 0.2)
    factor = (0.2 * 30025 - 25) / 500
    assert found == pytest.approx({"a": factor * 200 / 10000, "b": factor * 300 / 20000, "c": 1.0})


def test_the_reference_network_of_the_notes():
    shapes = {"conv1": (32, 3, 3, 3), "conv2": (64, 32, 3, 3)}
    assert erk_densities(shapes, 1.0) == {"conv1": 1.0, "conv2": 1.0}
    assert set(erk_densities(shapes, 0.0).values()) == {0.0}


@pytest.mark.parametrize("density", [-0.1, 1.1, math.nan])
def test_impossible_densities(density):
    with pytest.raises(ValueError, match="density"):
        erk_densities({"a": (2, 2)}, density)


def test_rounding_by_hand():
    assert whole_counts({"a": 1.5, "b": 1.5, "c": 2.0}, {"a": 9, "b": 9, "c": 9}, 5) == {"a": 2, "b": 1, "c": 2}
    assert whole_counts({"a": 3.0, "b": 3.0}, {"a": 3, "b": 9}, 8) == {"a": 3, "b": 5}
    assert whole_counts({"a": 3.0, "b": 3.0}, {"a": 3, "b": 9}, 4) == {"a": 2, "b": 2}
    with pytest.raises(ValueError, match="cannot be kept"):
        whole_counts({"a": 1.0}, {"a": 1}, 2)
