"""Non-negative least squares against all sets of positive columns, R squared by hand, and the line of a fleet."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.blocks.timecost import (
    OVERHEAD,
    Line,
    arithmetic,
    fit,
    measured,
    nnls,
    r_squared,
    read,
    slowest,
    undominated,
)
from tests.support.models import small_cnn
from wire.errors import ConfigError
from wire.spec import Axis, AxisGroup, ModelSpec, Node, TensorSpec, check


def brute(matrix, target):
    """The best of all least-squares solutions over a subset of columns that are not negative."""
    best = float(np.square(target).sum())
    for count in range(1, matrix.shape[1] + 1):
        for columns in itertools.combinations(range(matrix.shape[1]), count):
            x = np.linalg.lstsq(matrix[:, columns], target, rcond=None)[0]
            if (x >= -1e-12).all():
                best = min(best, float(np.square(target - matrix[:, columns] @ x).sum()))
    return best


@settings(deadline=None, max_examples=150)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 9), columns=st.integers(1, 5), doubled=st.booleans())
def test_nnls_meets_the_best_active_set(seed, rows, columns, doubled):
    rng = np.random.default_rng(seed)
    matrix, target = rng.standard_normal((rows, columns)), rng.standard_normal(rows)
    if doubled:
        matrix[:, -1] = matrix[:, 0]
    x = nnls(matrix, target)
    assert (x >= 0).all()
    found = float(np.square(target - matrix @ x).sum())
    assert found <= brute(matrix, target) + 1e-9


def test_r_squared_by_hand():
    assert r_squared([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 1.0
    assert r_squared([1.0, 2.0, 3.0], [1.5, 2.0, 2.5]) == pytest.approx(1.0 - 0.5 / 2.0)
    assert r_squared([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]) == 0.0
    assert r_squared([2.0, 2.0], [1.0, 3.0]) == 0.0
    assert r_squared([0.1 + 0.2, 0.3, 0.3], [0.1, 0.2, 0.3]) == 0.0, "they differ by rounding alone"
    assert r_squared([], []) == 0.0


def test_lines_are_read_scaled_and_compared():
    lines = read("1 2 0; 4 0 0.5", 2)
    assert lines == (Line(1.0, (2.0, 0.0)), Line(4.0, (0.0, 0.5)))
    assert lines[0].seconds((3, 9)) == 7.0
    assert lines[0].scaled(2.0, 0.5, 1.0) == Line(3.0, (4.5, 0.5))
    assert slowest(lines, (1, 1)) == 4.5
    assert slowest(lines, (3, 1)) == 7.0
    for wrong in ("", "1 2", "1 -2 3", "0 0 0", "1 nan 1", "1 2 3;", "fast"):
        with pytest.raises(ConfigError, match="time"):
            read(wrong, 2)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 12), layers=st.integers(1, 3))
def test_lines_that_another_dominates_never_decide(seed, count, layers):
    rng = np.random.default_rng(seed)
    lines = [Line(float(c), tuple(map(float, t))) for c, *t in rng.integers(0, 5, (count, layers + 1))]
    found = undominated(lines)
    for kept in rng.integers(0, 1000, (20, layers)):
        assert slowest(found, kept) == slowest(lines, kept)
    for line in found:
        others = [(other.constant, *other.weights) for other in found if other is not line]
        assert line in lines
        assert not any(np.greater_equal(other, (line.constant, *line.weights)).all() for other in others)


def test_the_prior_counts_multiplications():
    line = arithmetic(small_cnn(), ("c.weight", "f.weight", "o.weight"))
    assert line.weights == (36.0, 1.0, 1.0)
    assert line.constant == OVERHEAD * (36 * 54 + 12 * 54 + 48)


def test_a_linear_layer_uses_its_weight_at_every_step():
    tensors = (TensorSpec("s.weight", (Axis("h"), Axis(inner=3))), TensorSpec("s.bias", (Axis("h"),)))
    tensors += (TensorSpec("o.weight", (Axis("classes"), Axis(inner=35))), TensorSpec("o.bias", (Axis("classes"),)))
    nodes = (
        Node("s", "linear", ("input",), {"weight": "s.weight", "bias": "s.bias"}),
        Node("flat", "flatten", ("s",)),
        Node("o", "linear", ("flat",), {"weight": "o.weight", "bias": "o.bias"}),
    )
    groups = (AxisGroup("h", 7, prunable=False), AxisGroup("classes", 4, prunable=False))
    spec = check(ModelSpec("steps", (5, 3), 4, groups, tensors, nodes))
    line = arithmetic(spec, ("s.weight", "o.weight"))
    assert line.weights == (5.0, 1.0)
    assert line.constant == OVERHEAD * (5 * 21 + 140)


def test_measured_layers_correct_the_prior():
    prior = Line(9.0, (1.0, 1.0))
    assert measured(prior, {"a": 1.0}, {"a": 10, "b": 10}) == prior
    line = measured(prior, {"a": 1.0, "b": 3.0}, {"a": 10, "b": 5})
    assert line.weights[1] / line.weights[0] == pytest.approx(3.0 / 5 * 10)
    assert line.seconds((10, 5)) == pytest.approx(4.0)
    assert measured(prior, {}, {"a": 0, "b": 0}) == prior


def test_a_layer_that_keeps_nothing_is_not_free():
    line = measured(Line(9.0, (2.0, 6.0)), {"a": 1.0}, {"a": 10, "b": 0})
    assert line.weights[0] == pytest.approx(0.1 / 1.5)
    assert line.weights[1] == pytest.approx(3.0 * line.weights[0])
    found, _ = fit([(10, 0)] * 5, [3.0] * 5, line, 0.01)
    assert found.weights == pytest.approx((0.2, 0.6))


def test_rounds_of_one_mask_scale_the_prior():
    prior = Line(2.0, (1.0, 3.0))
    line, explained = fit([(4, 5)] * 6, [42.0] * 6, prior, 0.01)
    assert line.constant == pytest.approx(4.0)
    assert line.weights == pytest.approx((2.0, 6.0))
    assert explained == 0.0
    assert fit([], [], prior, 0.01) == (prior, 0.0)
    assert fit([(4, 5)], [0.0], prior, 0.01) == (prior, 0.0)


def test_many_masks_find_the_truth_whatever_the_prior_says():
    rng = np.random.default_rng(1)
    truth = Line(0.8, (2e-6, 1e-7, 0.0))
    kept = [[int(n) for n in rng.integers(1, 500_000, 3)] for _ in range(60)]
    noise = rng.normal(1.0, 0.01, 60)
    seconds = [truth.seconds(row) * n for row, n in zip(kept, noise, strict=True)]
    line, explained = fit(kept, seconds, Line(1.0, (1e-6, 1e-6, 1e-6)), 0.01)
    assert explained > 0.99
    assert line.constant == pytest.approx(truth.constant, rel=0.05)
    assert line.weights[0] == pytest.approx(truth.weights[0], rel=0.05)
    assert line.weights[1] == pytest.approx(truth.weights[1], rel=0.5)
    assert 0.0 <= line.weights[2] < 1e-7
    wanted = [line.seconds(row) for row in kept]
    assert explained == pytest.approx(r_squared(seconds, wanted))
