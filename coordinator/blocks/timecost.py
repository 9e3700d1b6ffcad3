"""How long a round takes by what is kept: ``T(M) = c + sum over layers of t_l * kept_l`` (PruneFL, section IV).

The paper measures c and t before training, by linear regression. Here they are learnt while the fleet trains: the seconds of
the rounds so far are fitted with coefficients that are not negative, and with a prior where the rounds do not tell layers
apart (as long as the mask never changed, they tell nothing but one number).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from wire.errors import ConfigError
from wire.spec import ModelSpec, Structure
from wire.work import layers

Matrix = NDArray[np.float64]

OVERHEAD = 0.5
"""Prior: what a step takes beside its multiplications, as a share of them at full density (PruneFL's Conv-2: 0.76)."""


_ROUNDING = 1e-24
"""What share of the sum of squares the spread of equal numbers may seem to have."""


@dataclass(frozen=True, slots=True)
class Line:
    """Seconds of a round.

    Attributes:
        constant: c.
        weights: t of each layer, in the model's order.
    """

    constant: float
    weights: tuple[float, ...]

    def seconds(self, kept: Sequence[int]) -> float:
        """Give T for so many kept weights of each layer."""
        return self.constant + sum(t * n for t, n in zip(self.weights, kept, strict=True))

    def scaled(self, factor: float, each: float = 0.0, more: float = 0.0) -> Line:
        """Give ``factor`` times this, and `each` more for every weight and `more` for a round."""
        return Line(factor * self.constant + more, tuple(factor * t + each for t in self.weights))

    def plus(self, other: Line) -> Line:
        """Give the seconds of both, one after the other."""
        return Line(
            self.constant + other.constant, tuple(a + b for a, b in zip(self.weights, other.weights, strict=True))
        )


def slowest(lines: Sequence[Line], kept: Sequence[int]) -> float:
    """Give the seconds of the slowest: monotone, and with two or more lines no longer linear."""
    return max(line.seconds(kept) for line in lines)


def undominated(lines: Sequence[Line]) -> tuple[Line, ...]:
    """Give the lines that may be the slowest for some masks, the largest sum of coefficients first.

    A line is left out if another has every coefficient at least as large; of equal ones one stays. Cost: quadratic in lines.
    """
    found: list[tuple[float, ...]] = []
    for line in sorted(((line.constant, *line.weights) for line in lines), key=lambda one: (-sum(one), one)):
        if not any(all(a >= b for a, b in zip(other, line, strict=True)) for other in found):
            found.append(line)
    return tuple(Line(constant, tuple(weights)) for constant, *weights in found)


def read(text: str, layers: int) -> tuple[Line, ...]:
    """Read coefficients: ``c t1 t2 ...``, and after a semicolon those of another kind of device.

    Raises:
        ConfigError: Not numbers, negative, all zero, or not one t for each layer.
    """
    lines = []
    for part in text.split(";"):
        try:
            numbers = [float(word) for word in part.split()]
        except ValueError:
            numbers = []
        good = (
            len(numbers) == layers + 1
            and all(isfinite(number) and number >= 0.0 for number in numbers)
            and any(numbers)
        )
        if not good:
            raise ConfigError(
                f"parameter time = {text!r}: write fit, or the seconds c and one t for each of {layers} layers"
            )
        lines.append(Line(numbers[0], tuple(numbers[1:])))
    return tuple(lines)


def arithmetic(spec: ModelSpec, tensors: Sequence[str]) -> Line:
    """Give the prior: multiplications of a sample, by kept weight, and `OVERHEAD` of all; the unit is arbitrary.

    A linear layer uses a weight once for every step of its sample, a convolution once for every place of its output.
    """
    of = {layer.tensor: layer for layer in layers(spec, Structure())}
    full = sum(of[name].places * of[name].weights for name in tensors)
    return Line(OVERHEAD * full, tuple(float(of[name].places) for name in tensors))


def measured(line: Line, seconds: Mapping[str, float], kept: Mapping[str, int]) -> Line:
    """Correct a prior by what layers took: where all of them have seconds, their shares are the measured ones.

    A layer that keeps nothing took nothing, but would if it kept something: the prior's share, as the others keep theirs.

    Args:
        line: The prior, whose layers are those of `kept`, in order.
        seconds: Of a step, by layer.
        kept: Weights that each kept then.

    Returns:
        The prior itself unless every layer that keeps anything was measured.
    """
    if not all(seconds.get(name, 0.0) > 0.0 for name, count in kept.items() if count):
        return line
    total = sum(seconds[name] for name, count in kept.items() if count)
    foreseen = sum(t * count for t, count in zip(line.weights, kept.values(), strict=True))
    if not total or not foreseen:
        return line
    share = OVERHEAD / (1.0 + OVERHEAD)
    took = (
        seconds[name] / count if count else t * total / foreseen
        for t, (name, count) in zip(line.weights, kept.items(), strict=True)
    )
    return Line(share * total, tuple((1.0 - share) * t for t in took))


def nnls(matrix: Matrix, target: Matrix) -> Matrix:
    """Give the x, none negative, that minimises ``|matrix x - target|`` (Lawson and Hanson, 1974, chapter 23).

    Args:
        matrix: ``(rows, columns)``; meant for a handful of columns.
        target: ``(rows,)``.

    Returns:
        ``(columns,)``. Cost: a least-squares solution for each change of the set of positive columns.
    """
    columns = matrix.shape[1]
    x, free = np.zeros(columns), np.zeros(columns, np.bool_)
    tolerance = 1e-12 * max(1.0, float(np.abs(matrix.T @ target).max(initial=0.0)))
    for _ in range(3 * columns + 10):
        slope = matrix.T @ (target - matrix @ x)
        slope[free] = -np.inf
        if not (slope > tolerance).any():
            break
        free[int(np.argmax(slope))] = True
        while True:
            inner = np.zeros(columns)
            inner[free] = np.linalg.lstsq(matrix[:, free], target, rcond=None)[0]
            bad = free & (inner <= 0.0)
            if not bad.any():
                x = inner
                break
            step = float(np.min(x[bad] / (x[bad] - inner[bad]), initial=1.0, where=x[bad] > inner[bad]))
            x = x + step * (inner - x)
            free &= x > 1e-15 * max(1.0, float(x.max(initial=0.0)))
            x[~free] = 0.0
    return x


def r_squared(target: Sequence[float], fitted: Sequence[float]) -> float:
    """Give ``1 - sum (y - f)^2 / sum (y - mean)^2``; 0 where y never changes but for rounding: there is nothing to explain."""
    y, f = np.asarray(target, np.float64), np.asarray(fitted, np.float64)
    spread = float(np.square(y - y.mean()).sum()) if len(y) else 0.0
    return 1.0 - float(np.square(y - f).sum()) / spread if spread > _ROUNDING * float(np.square(y).sum()) else 0.0


def fit(kept: Sequence[Sequence[int]], seconds: Sequence[float], prior: Line, trust: float) -> tuple[Line, float]:
    """Fit a line to measured rounds.

    It is the least-squares one among those with no negative coefficient, where every coefficient is also drawn to the
    prior's, times the one factor by which the prior meets the rounds on the whole: with the strength of `trust` rounds in
    which that coefficient alone had taken all the time.

    Args:
        kept: Of each round, the kept weights by layer.
        seconds: What it took.
        prior: See `arithmetic`.
        trust: Strength of the prior.

    Returns:
        The line and its R squared. Without any round, the prior and 0.
    """
    shape = np.array([prior.constant, *prior.weights], np.float64)
    rows = np.array([[1.0, *counts] for counts in kept], np.float64).reshape(-1, len(shape)) * shape
    y = np.asarray(seconds, np.float64)
    total = float(rows.sum())
    if not total > 0.0 or not float(y.sum()) > 0.0:
        return prior, 0.0
    scale = float(y.sum()) / total
    # A column of its own size for each coefficient, so that the prior is drawn to in shares of the time.
    typical = float(rows.sum(axis=1).mean())
    pull = np.sqrt(trust) * typical * np.eye(len(shape))
    solved = nnls(np.vstack([rows, pull]), np.concatenate([y, pull @ np.full(len(shape), scale)]))
    found = solved * shape
    line = Line(float(found[0]), tuple(float(t) for t in found[1:]))
    return line, r_squared(list(y), [line.seconds(counts) for counts in kept])
