"""Who is asked in a round: pure functions over names, by name of the selection.

A selection is ``all``, ``random:N`` (N devices) or ``random:F`` (a fraction F such as 0.2; at least one device). Random
means: every device draws a number, the hash of (seed, round, name), and the smallest ones go. That is uniform without
replacement, the same on every machine, and does not depend on the order in which devices are listed; one device more or
less changes at most one other choice.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

from wire.errors import ConfigError

_APART = 1_000_003


def choose(selection: str, names: Iterable[str], *, seed: int, round_number: int, draw: int = 0) -> tuple[str, ...]:
    """Choose devices; the result is sorted. Cost: one hash per name.

    Args:
        selection: How many.
        names: Of those who are there.
        seed: Of the run.
        round_number: Counts from 1.
        draw: How often others were chosen for this round of whom nobody could hold any part of the model.

    Raises:
        ConfigError: There is no such selection.
    """
    candidates = sorted(set(names))
    limit = count(selection, len(candidates))
    if limit >= len(candidates):
        return tuple(candidates)
    return tuple(sorted(sorted(candidates, key=lambda name: _number(seed + draw * _APART, round_number, name))[:limit]))


def count(selection: str, available: int) -> int:
    """Say how many of the available devices a selection asks.

    Raises:
        ConfigError: There is no such selection; call it at start with any number to check what the operator wrote.
    """
    if selection == "all":
        return available
    kind, _, amount = selection.partition(":")
    if kind == "random":
        if amount.isdecimal() and int(amount) > 0:
            return min(int(amount), available)
        fraction = _fraction(amount)
        if 0.0 < fraction <= 1.0:
            return min(available, max(1, math.ceil(fraction * available - 1e-9)))
    raise ConfigError(
        f"selection {selection!r}: write 'all', 'random:5' (devices) or 'random:0.2' (a fraction of them)"
    )


def _fraction(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _number(seed: int, round_number: int, name: str) -> bytes:
    return hashlib.sha256(f"select {seed} {round_number} {name}".encode()).digest()
