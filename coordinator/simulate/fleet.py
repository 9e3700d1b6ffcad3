"""Virtual fleets by name: how much memory, how fast, how far from the coordinator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from wire.errors import ConfigError
from wire.memory import predict, uniform
from wire.messages import Recipe
from wire.spec import ModelSpec

KEPT = (0.2, 0.4, 0.6, 0.8, 1.0)
"""Fractions of the channels that the budgets of an uneven fleet are made for."""


@dataclass(frozen=True, slots=True)
class Machine:
    """One virtual device.

    Attributes:
        name: ``device-1`` and so on.
        bytes_budget: Memory that an order may take.
        flops: Floating-point operations per second in training.
        bandwidth_down: Bytes per second that it receives.
        bandwidth_up: Bytes per second that it sends.
    """

    name: str
    bytes_budget: int
    flops: float
    bandwidth_down: float
    bandwidth_up: float

    def seconds_down(self, size: int) -> float:
        """Give the time to receive so many bytes."""
        return size / self.bandwidth_down

    def seconds_up(self, size: int) -> float:
        """Give the time to send so many bytes."""
        return size / self.bandwidth_up


def make(profile: str, count: int, spec: ModelSpec, recipe: Recipe) -> tuple[Machine, ...]:
    """Build a fleet.

    Args:
        profile: One of `PROFILES`.
        count: Devices.
        spec: The model that the budgets are measured by.
        recipe: How it will be trained; it decides what a width costs.

    Raises:
        ConfigError: There is no such profile, or no device.
    """
    if profile not in PROFILES:
        raise ConfigError(f"fleet {profile!r}: there are {', '.join(PROFILES)}")
    if count < 1:
        raise ConfigError(f"devices = {count}: write at least 1")
    return PROFILES[profile](budgets(spec, recipe, count))


def budgets(spec: ModelSpec, recipe: Recipe, count: int, grain: int = 1) -> list[int]:
    """Spread memory budgets over a fleet: from what the narrowest of five widths takes to what the whole model takes.

    Args:
        spec: The model.
        recipe: How it will be trained.
        count: Devices.
        grain: Budgets are rounded up to multiples of so many bytes.

    Returns:
        Bytes above a worker's base, ascending.
    """
    needs = [-(-predict(spec, uniform(spec, kept), recipe).bound // grain) * grain for kept in KEPT]
    last = max(count - 1, 1)
    return [needs[-1] if count == 1 else needs[round(i * (len(needs) - 1) / last)] for i in range(count)]


def _mixed(limits: list[int]) -> tuple[Machine, ...]:
    """The less memory, the slower: from an old phone (1 GFLOP/s, 0.5 MB/s) to a small server (16 GFLOP/s, 8 MB/s)."""
    steps = max(len(limits) - 1, 1)
    factors = [16.0 ** (i / steps) for i in range(len(limits))]
    return tuple(
        Machine(f"device-{i + 1}", limit, 1e9 * factor, 0.5e6 * factor, 0.5e6 * factor)
        for i, (limit, factor) in enumerate(zip(limits, factors, strict=True))
    )


def _even(limits: list[int]) -> tuple[Machine, ...]:
    """All alike, and each can hold the whole model."""
    return tuple(Machine(f"device-{i + 1}", limits[-1], 4e9, 2e6, 2e6) for i in range(len(limits)))


def _stragglers(limits: list[int]) -> tuple[Machine, ...]:
    """As `_even`, but every fourth device is ten times slower."""
    return tuple(
        Machine(m.name, m.bytes_budget, m.flops / 10, m.bandwidth_down / 10, m.bandwidth_up / 10) if i % 4 == 3 else m
        for i, m in enumerate(_even(limits))
    )


PROFILES: Mapping[str, Callable[[list[int]], tuple[Machine, ...]]] = {
    "mixed": _mixed,
    "even": _even,
    "stragglers": _stragglers,
}
"""Name to builder, which is given ascending memory budgets."""
