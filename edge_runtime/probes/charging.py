"""``charging``: power comes in from outside. A machine without a battery always has that."""

from __future__ import annotations

from edge_runtime.config import ConditionsConfig
from edge_runtime.probes import Reading
from edge_runtime.probes.machine import Machine
from edge_runtime.probes.supply import supply


def look(machine: Machine, wanted: ConditionsConfig) -> Reading:  # noqa: ARG001 - every probe has the same form
    """See whether it is plugged in."""
    found = supply(machine)
    if not found.battery:
        return Reading("holds", "no battery: it runs from the mains")
    if found.plugged is None:
        return Reading("asked" if found.asked else "unknown", found.problem or "nothing says whether it is plugged in")
    return Reading("holds", "plugged in") if found.plugged else Reading("fails", "unplugged")
