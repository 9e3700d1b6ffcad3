"""``battery_min``: percent that the battery must have. It holds again from five percent above."""

from __future__ import annotations

from edge_runtime.config import ConditionsConfig
from edge_runtime.probes import Reading, below
from edge_runtime.probes.machine import Machine
from edge_runtime.probes.supply import supply

GAP = 5.0


def look(machine: Machine, wanted: ConditionsConfig) -> Reading:
    """See how full it is."""
    found, least = supply(machine), wanted.battery_min
    if not found.battery:
        return Reading("holds", "no battery: it runs from the mains")
    if found.percent is None:
        return Reading("asked" if found.asked else "unknown", found.problem or "nothing says how full the battery is")
    return Reading(below(found.percent, least, GAP), f"battery at {found.percent:.0f} %, wanted: {least:g} % or more")
