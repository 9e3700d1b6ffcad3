"""``battery_celsius_max``: how warm the battery may become. It holds again from three degrees below."""

from __future__ import annotations

from edge_runtime.config import ConditionsConfig
from edge_runtime.probes import Reading, above
from edge_runtime.probes.machine import Machine
from edge_runtime.probes.supply import supply

GAP = 3.0


def look(machine: Machine, wanted: ConditionsConfig) -> Reading:
    """See how warm it is."""
    found, most = supply(machine), wanted.battery_celsius_max
    if not found.battery:
        return Reading("holds", "no battery")
    if found.celsius is None:
        return Reading("asked" if found.asked else "unknown", found.problem or "nothing says how warm the battery is")
    return Reading(above(found.celsius, most, GAP), f"battery at {found.celsius:.0f} C, wanted: {most:g} C or less")
