"""Simulated badness, by seed: devices that are slower than they should be, and devices that get lost."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from wire.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Weather:
    """How bad it is.

    Attributes:
        slowness: Standard deviation of the logarithm of an order's duration.
        lost: Probability that a device gets lost during an order and comes back only for the next round.
    """

    slowness: float
    lost: float


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of one order.

    Attributes:
        factor: How much longer it takes than it should.
        lost_at: The fraction of its time after which the device is lost; None when it is not.
    """

    factor: float
    lost_at: float | None


WEATHERS: Mapping[str, Weather] = {
    "fair": Weather(0.0, 0.0),
    "gusty": Weather(0.2, 0.05),
    "stormy": Weather(0.6, 0.2),
}
"""Name to weather."""


def forecast(name: str) -> Weather:
    """Find a weather.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in WEATHERS:
        raise ConfigError(f"weather {name!r}: there are {', '.join(WEATHERS)}")
    return WEATHERS[name]


def fate(weather: Weather, seed: int, round_number: int, device: str) -> Fate:
    """Decide one order's fate; it depends on the arguments alone, not on who else takes part."""
    digest = hashlib.sha256(f"weather {seed} {round_number} {device}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    factor = math.exp(weather.slowness * rng.standard_normal())
    drawn, place = rng.random(2)
    return Fate(factor, float(place) if drawn < weather.lost else None)
