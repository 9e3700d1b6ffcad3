"""``celsius_max``: how warm the processor may become. It holds again from eight degrees below.

The warmest zone that names a processor counts; where none does, the warmest of all. Phones and boards have zones that stand
for nothing: what is not between -40 and 150 degrees is no temperature.
"""

from __future__ import annotations

from edge_runtime.config import ConditionsConfig
from edge_runtime.probes import Reading, above
from edge_runtime.probes.machine import Machine

GAP = 8.0
_FOLDER = "sys/class/thermal"
_PROCESSORS = ("cpu", "soc", "pkg", "core", "bcm2835", "k10temp")
_LOW, _HIGH = -40.0, 150.0


def look(machine: Machine, wanted: ConditionsConfig) -> Reading:
    """See how warm it is."""
    most, found, processor = wanted.celsius_max, [], []
    for name in machine.names(_FOLDER) or ():
        milli = machine.number(f"{_FOLDER}/{name}/temp") if name.startswith("thermal_zone") else None
        if milli is None or not _LOW <= milli / 1000 <= _HIGH:
            continue
        found.append(milli / 1000)
        kind = machine.text(f"{_FOLDER}/{name}/type").lower()
        if any(word in kind for word in _PROCESSORS):
            processor.append(milli / 1000)
    if not found:
        return Reading("unknown", "nothing says how warm the processor is (/sys/class/thermal)")
    celsius = max(processor or found)
    return Reading(above(celsius, most, GAP), f"processor at {celsius:.0f} C, wanted: {most:g} C or less")
