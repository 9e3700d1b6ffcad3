"""GELU (Hendrycks and Gimpel, 2016) in numpy, which has no error function: ``x P(x)``, P being the normal distribution.

With ``u = |x|``, ``P(-u) = exp(-u^2 / 2) R(u)``, where R is Mills' ratio over sqrt(2 pi) (Abramowitz and Stegun, 26.2). R is
smooth in ``s = 6 / (3 + u) - 1`` over all of -1 < s <= 1, so that one polynomial serves every u and no value needs a branch.
Its coefficients are those of the Chebyshev series in s, in powers of s, worked out with 40 digits; in single precision those
of the polynomial whose largest error of P(-u) is least.
"""

from __future__ import annotations

from math import pi, sqrt
from typing import Final

import numpy as np

from edge_runtime.engines.native.at import Array, At

_SHORT: Final = (*(0.121514547, 0.206383799, 0.123400542, 0.0454550718, 0.00788807875, -0.00516230766, 0.00052026039),)
"""For float32: P to 1e-8, before rounding."""

_LONG: Final = (
    *(0.12151394835556208, 0.2064026120084699, 0.12322495031537349, 0.04621345752022842, 0.0061333596854250255),
    *(-0.002905914727078201, -0.0009908381412041065, 0.00034557034423073177, 0.00013154199452620593),
    *(-6.849628069012727e-05, -1.259570533051913e-05, 1.534843606494991e-05, -1.2451534055461417e-06),
    *(-2.875691018804437e-06, 1.2042772935504166e-06, 2.5389249023686274e-07, -3.9339171771558464e-07),
    *(7.466843547157736e-08, 7.386527139327108e-08, -3.527353546374567e-08, -5.865137693307532e-09),
    *(5.102403192586014e-09, -2.36656235811986e-10),
)
"""For float64: P to 1e-15."""


def gelu(at: At) -> None:
    """Go forward, a block of values at a time."""
    x, y, blocks = at.x[0].reshape(-1), at.y.reshape(-1), at.scratch["blocks"]
    length = blocks.shape[1]
    for first in range(0, len(x), length):
        some = x[first : first + length]
        np.multiply(some, _shares(some, blocks[:, : len(some)])[0], out=y[first : first + length])


def gelu_slope(x: Array, dy: Array, blocks: Array, dx: Array) -> None:
    """Write the gradient of the input: that of the output times ``P(x) + x exp(-x^2 / 2) / sqrt(2 pi)``."""
    shares, bell = _shares(x, blocks)
    bell *= x
    bell *= 1 / sqrt(2 * pi)
    shares += bell
    np.multiply(dy, shares, out=dx)


def _shares(x: Array, blocks: Array) -> tuple[Array, Array]:
    """Give P(x) and ``exp(-x^2 / 2)``, in two of three blocks."""
    u, s, total = blocks
    np.abs(x, out=u)
    np.add(u, 3, out=s)
    np.reciprocal(s, out=s)
    s *= 6
    s -= 1
    factors = _SHORT if x.itemsize == 4 else _LONG
    total.fill(factors[-1])
    for factor in factors[-2::-1]:
        total *= s
        total += factor
    u *= u
    u *= -0.5
    np.exp(u, out=u)
    total *= u
    np.subtract(0.5, total, out=total)
    # Now what P(x) is above 1/2, but for the sign, which is that of x: not by copysign, which is slow.
    bits = f"i{x.itemsize}"
    np.bitwise_and(x.view(bits), -1 << (8 * x.itemsize - 1), out=s.view(bits))
    np.bitwise_or(total.view(bits), s.view(bits), out=total.view(bits))
    total += 0.5
    return total, u
