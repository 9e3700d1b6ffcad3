"""Angles and their weights against numbers worked out by hand and the paper's shape of the curve."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.blocks.angles import angle, angle_weights, gompertz, inner_product, smoothed

ANGLES = st.floats(0.0, math.pi)
COUNTS = st.lists(st.tuples(st.integers(1, 1000), ANGLES), min_size=1, max_size=8)


def test_inner_product_sums_in_float64():
    big = np.full(3, 1e8, np.float32)
    small = np.array([1.0, -1.0, 1e-8], np.float32)
    assert inner_product(big, small) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "wanted"),
    [
        ([1.0, 0.0], [3.0, 0.0], 0.0),
        ([1.0, 0.0], [0.0, 2.0], math.pi / 2),
        ([1.0, 0.0], [-1.0, 0.0], math.pi),
        ([1.0, 1.0], [1.0, 0.0], math.pi / 4),
        ([0.0, 0.0], [1.0, 0.0], math.pi / 2),
    ],
)
def test_angle_by_hand(a, b, wanted):
    (x, y) = (np.array(v, np.float32) for v in (a, b))
    assert angle(inner_product(x, y), inner_product(x, x), inner_product(y, y)) == pytest.approx(wanted)


def test_rounding_cannot_leave_the_cosine():
    assert angle(1.0 + 1e-12, 1.0, 1.0) == 0.0
    assert angle(-1.0 - 1e-12, 1.0, 1.0) == math.pi


def test_tiny_updates_still_have_a_direction():
    assert angle(1e-280, 1e-240, 1e-320) < 0.1


def test_smoothing_is_the_mean_of_the_devices_own_rounds():
    mean = 0.0
    seen = [0.4, 1.0, 0.1, 0.9]
    for count, value in enumerate(seen):
        mean = smoothed(mean, count, value)
    assert mean == pytest.approx(sum(seen) / 4)


def test_gompertz_is_the_papers_curve():
    def naive(theta, a):
        return a * (1 - math.exp(-math.exp(-a * (theta - 1))))

    for theta in np.linspace(0, math.pi, 50):
        assert gompertz(theta, 5.0) == pytest.approx(naive(theta, 5.0), abs=1e-12)
    # effect relative to a device at 90 degrees, from the published code
    ratio = [math.exp(gompertz(math.radians(d), 5.0) - gompertz(math.pi / 2, 5.0)) for d in (45, 57.3, 60, 80, 180)]
    assert ratio == pytest.approx([86, 17.8, 11.6, 1.44, 0.76], rel=0.03)


@given(COUNTS, st.floats(0.0, 10.0))
def test_weights_are_a_distribution_and_a_smaller_angle_never_weighs_less(pairs, alpha):
    samples, angles = zip(*pairs, strict=True)
    weights = angle_weights(samples, angles, alpha)
    assert sum(weights) == pytest.approx(1.0)
    assert all(w >= 0 for w in weights)
    per_sample = sorted(zip(angles, (w / n for w, n in zip(weights, samples, strict=True)), strict=True))
    assert all(low >= high * (1 - 1e-9) for (_, low), (_, high) in pairwise(per_sample))


@given(COUNTS)
def test_steepness_zero_or_equal_angles_leave_the_samples_to_decide(pairs):
    samples, angles = zip(*pairs, strict=True)
    wanted = [n / sum(samples) for n in samples]
    assert angle_weights(samples, angles, 0.0) == pytest.approx(wanted)
    assert angle_weights(samples, [0.7] * len(samples), 5.0) == pytest.approx(wanted)


@given(COUNTS)
def test_a_device_twice_is_a_device_with_twice_the_samples(pairs):
    samples, angles = map(list, zip(*pairs, strict=True))
    twice = angle_weights([*samples, samples[0]], [*angles, angles[0]], 5.0)
    doubled = angle_weights([2 * samples[0], *samples[1:]], angles, 5.0)
    assert twice[0] + twice[-1] == pytest.approx(doubled[0])
