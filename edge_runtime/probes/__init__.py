"""What the owner demands before this device trains: one file and one line below for each condition.

A probe looks at a machine (see `edge_runtime.probes.machine`) and gives a `Reading`. Conditions with a threshold have two: one
at which they fail and another, further off, at which they hold again; between the two it stays as it was. Probes that nobody
asked for are not even loaded.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, cast

if TYPE_CHECKING:
    from edge_runtime.config import ConditionsConfig
    from edge_runtime.probes.machine import Machine

Verdict = Literal["holds", "between", "fails", "unknown", "asked"]


@dataclass(frozen=True, slots=True)
class Reading:
    """What a probe has found.

    Attributes:
        verdict: ``between`` two thresholds it stays as it was; ``unknown``: this machine does not say, which counts as a
            failure; ``asked``: a command was asked and has not answered yet.
        found: One phrase for people: what is, and what is wanted.
    """

    verdict: Verdict
    found: str


class Probe(Protocol):
    """A module of this package."""

    def look(self, machine: Machine, wanted: ConditionsConfig) -> Reading:
        """Read a few small files; never waits."""
        ...


_PROBES: Mapping[str, str] = {
    "charging": "edge_runtime.probes.charging",
    "battery_min": "edge_runtime.probes.battery",
    "battery_celsius_max": "edge_runtime.probes.battery_heat",
    "celsius_max": "edge_runtime.probes.thermal",
    "unthrottled": "edge_runtime.probes.throttle",
    "unmetered": "edge_runtime.probes.network",
    "load_max": "edge_runtime.probes.load",
    "hours": "edge_runtime.probes.hours",
}
"""Key in ``[conditions]`` to the module behind it. A key that is false, 0 or empty demands nothing."""


def demanded(wanted: ConditionsConfig) -> tuple[str, ...]:
    """Name the conditions that the owner has set."""
    return tuple(name for name in _PROBES if getattr(wanted, name))


def look(machine: Machine, wanted: ConditionsConfig) -> dict[str, Reading]:
    """Read every condition that is set. Cost: below a millisecond after the first time."""
    machine.again()
    try:
        return {name: find(name).look(machine, wanted) for name in demanded(wanted)}
    finally:
        machine.again()


def find(name: str) -> Probe:
    """Load a probe by its key."""
    return cast("Probe", importlib.import_module(_PROBES[name]))


def above(value: float, most: float, gap: float) -> Verdict:
    """Judge a value that must stay at or below `most`; it holds again from `gap` below."""
    return "fails" if value > most else "holds" if value <= most - gap else "between"


def below(value: float, least: float, gap: float) -> Verdict:
    """Judge a value that must stay at or above `least`; it holds again from `gap` above, or at 100."""
    return "fails" if value < least else "holds" if value >= min(100.0, least + gap) else "between"
