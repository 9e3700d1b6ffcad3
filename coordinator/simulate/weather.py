"""Simulated badness, by seed: devices that are slower than they should be, that get lost, or whose memory shrinks."""

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
        squeezed: Probability that a device's memory falls below what its order takes, while it trains.
    """

    slowness: float
    lost: float
    squeezed: float = 0.0


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of one order.

    Attributes:
        factor: How much longer it takes than it should.
        lost_at: The fraction of its time after which the device is lost; None when it is not.
        squeezed_at: The fraction of its work after which memory shrinks; None when it does not.
        left: The share of what the order takes that there is from then on.
    """

    factor: float
    lost_at: float | None
    squeezed_at: float | None = None
    left: float = 1.0

    def room(self, bytes_order: int, done: float) -> int:
        """Give what an order of so many bytes may take when that fraction is done; 0 for what it was granted."""
        shrunk = self.squeezed_at is not None and done >= self.squeezed_at
        return int(self.left * bytes_order) if shrunk else 0


_LEFT = 0.4
"""At least so much of what an order takes is left where memory shrinks."""

WEATHERS: Mapping[str, Weather] = {
    "fair": Weather(0.0, 0.0),
    "gusty": Weather(0.2, 0.05),
    "stormy": Weather(0.6, 0.2),
    "squeezed": Weather(0.0, 0.0, squeezed=0.3),
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
    lost_at = float(place) if drawn < weather.lost else None
    drawn, place, left = rng.random(3)
    if drawn >= weather.squeezed:
        return Fate(factor, lost_at)
    return Fate(factor, lost_at, float(place), _LEFT + (1.0 - _LEFT) * float(left))
