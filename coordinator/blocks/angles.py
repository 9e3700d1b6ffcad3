"""Weights from the angle between a device's update and the mean update (FedAdp: Wu and Wang, IEEE TCCN 2021).

A device whose update points where the mean points gets more say than its samples alone would give it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1 << 16
"""Products that are held at once."""


def inner_product(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Give ``<a, b>`` of two arrays of one shape, summed in float64 in an order that their shape and strides alone decide."""
    total = 0.0
    with np.nditer([a, b], ["external_loop", "buffered", "zerosize_ok"], buffersize=_BLOCK) as blocks:
        for one, other in blocks:
            total += float(np.multiply(one, other, dtype=np.float64).sum())
    return total


def angle(dot: float, square_a: float, square_b: float) -> float:
    """Give ``arccos(<a, b> / (|a| |b|))`` in radians, 0 to pi (FedAdp, equation 7).

    The cosine is clipped to [-1, 1], which rounding may leave. A vector without length has no direction: pi / 2.
    """
    lengths = math.sqrt(square_a) * math.sqrt(square_b)
    if not lengths > 0.0:
        return math.pi / 2
    return math.acos(min(1.0, max(-1.0, dot / lengths)))


def smoothed(previous: float, count: int, current: float) -> float:
    """Give the mean of `count` earlier angles, whose mean is `previous`, and the current one (FedAdp, equation 8).

    FedAdp writes the round's number for ``count + 1``, which is the same only when every device takes part in every round;
    here it counts the device's own rounds.
    """
    return previous + (current - previous) / (count + 1)


def gompertz(theta: float, alpha: float) -> float:
    """Give ``alpha (1 - exp(-exp(-alpha (theta - 1))))``, falling from about alpha to 0 around 1 rad (FedAdp, equation 9)."""
    return -alpha * math.expm1(-math.exp(-alpha * (theta - 1.0)))


def angle_weights(samples: Sequence[int], angles: Sequence[float], alpha: float) -> list[float]:
    """Give ``D_i exp(f(theta_i)) / sum_j D_j exp(f(theta_j))`` (FedAdp, equation 10); f is `gompertz`.

    Args:
        samples: D; none negative, not all zero.
        angles: Smoothed, in radians.
        alpha: 5 in the paper; 0 leaves the samples alone to decide.

    Returns:
        Weights that add up to 1, none negative.
    """
    raw = [count * math.exp(gompertz(theta, alpha)) for count, theta in zip(samples, angles, strict=True)]
    total = math.fsum(raw)
    return [value / total for value in raw]
