"""What changes from round to round: sparsities, caps, regularisation and learning rates, as functions of the round."""

from __future__ import annotations

import math
from collections.abc import Callable

from wire.errors import ConfigError

_FIRST_PENALTY = 5e-4
"""What FedDIP's public code starts from in its second segment."""


def progress(t: float, first: float, last: float) -> float:
    """Give how far t is from `first` (0) to `last` (1), held at both ends; 1 when there is no way to go."""
    if last <= first:
        return 1.0
    return min(1.0, max(0.0, (t - first) / (last - first)))


def cubic(start: float, end: float, done: float) -> float:
    """Give the sparsity ``end + (start - end) (1 - done)^3`` (Zhu and Gupta, 2017, equation 1); `done` is from 0 to 1."""
    if done >= 1.0:
        return end
    return end + (start - end) * (1.0 - done) ** 3


def linear(start: float, end: float, done: float) -> float:
    """Go straight from `start` to `end` (PruneFL's cap on the density); `done` is from 0 to 1."""
    return end if done >= 1.0 else start + (end - start) * done


def cosine(height: float, t: float, end: float) -> float:
    """Give ``height / 2 (1 + cos(pi t / end))``, and 0 from `end` on (RigL's share of weights that move)."""
    return height / 2.0 * (1.0 + math.cos(math.pi * t / end)) if t < end else 0.0


def segmented(height: float, segments: int, t: int, end: int) -> float:
    """Give ``height * floor(Q t / T) / Q`` (FedDIP, Long et al., ICDM 2023): 0 in the first of Q equal parts of T rounds.

    The last part has ``height (Q - 1) / Q``, which is also what is given beyond it.

    Args:
        height: lambda_max.
        segments: Q.
        t: Rounds since the start, from 0.
        end: T.
    """
    return height * _segment(segments, t, end) / segments


def segmented_by_code(height: float, segments: int, t: int, end: int, first: float = _FIRST_PENALTY) -> float:
    """Give what FedDIP's public code does: 0 in part 0, ``first + (i - 1) (height - first) / (Q - 1)`` in part i."""
    part = _segment(segments, t, end)
    return first + (part - 1) * (height - first) / (segments - 1) if part else 0.0


def _segment(segments: int, t: int, end: int) -> int:
    return min(segments - 1, segments * max(0, t) // end)


def rate_at(text: str, rate: float, round_number: int) -> float:
    """Give the learning rate of a round.

    Args:
        text: How it changes from the `rate` of round 1:
            ``constant``;
            ``exponential F``: times F every round;
            ``halving N``: half as much every N rounds, going down evenly;
            ``staircase N F``: times F after every N rounds;
            ``cosine N``: along half a cosine that would reach 0 after N rounds; round N's is kept from there on;
            ``linear N``: straight to where it would be 0 after N rounds; round N's is kept from there on.
        rate: Of round 1.
        round_number: From 1.

    Raises:
        ConfigError: The text says none of these.
    """
    name, *numbers = text.split() or [""]
    if name not in _RATES or len(numbers) != len(_RATES[name][0]):
        raise ConfigError(f"parameter schedule = {text!r}: write one of {', '.join(map(repr, _EXAMPLES))}")
    values = [_number(text, kind, number) for kind, number in zip(_RATES[name][0], numbers, strict=True)]
    return rate * _RATES[name][1](max(0, round_number - 1), *values)


def _cosine_rate(t: int, n: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * min(t, n - 1) / n))


def _number(text: str, kind: str, number: str) -> float:
    """Read a count (N, whole, at least 1) or a factor (F, above 0 and at most 1)."""
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if kind == "N" and value >= 1.0 and value.is_integer():
        return value
    if kind == "F" and 0.0 < value <= 1.0:
        return value
    wanted = "a whole number of rounds" if kind == "N" else "a factor above 0 and at most 1"
    raise ConfigError(f"parameter schedule = {text!r}: {number!r} must be {wanted}")


_RATES: dict[str, tuple[str, Callable[..., float]]] = {
    "constant": ("", lambda _: 1.0),
    "exponential": ("F", lambda t, factor: factor**t),
    "halving": ("N", lambda t, n: 0.5 ** (t / n)),
    "staircase": ("NF", lambda t, n, factor: factor ** (t // n)),
    "cosine": ("N", _cosine_rate),
    "linear": ("N", lambda t, n: 1.0 - min(t, n - 1) / n),
}
"""Name to the kinds of its numbers and the factor as a function of the rounds since round 1 and these."""

_EXAMPLES = ("constant", "exponential 0.998", "halving 10000", "staircase 1000 0.9", "cosine 200", "linear 200")
