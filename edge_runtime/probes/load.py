"""``load_max``: how much others may do on this machine, as load per core. It holds again from a quarter below.

Others' load is the mean of the last minute (/proc/loadavg) less what our own training threads are of it, by the number of
cores. That share comes and goes as slowly as the mean (`edge_runtime.guest`), or each order would be followed by a pause.
Where the kernel tells of pressure (/proc/pressure/cpu), tasks that wait for a processor count as well: that is seen within
seconds.
"""

from __future__ import annotations

from edge_runtime.config import ConditionsConfig
from edge_runtime.probes import Reading, above
from edge_runtime.probes.machine import Machine, number

PRESSURE_MAX = 40.0
"""Percent of the last ten seconds in which a task waited for a processor."""
_PRESSURE_GAP = 20.0
_GAP = 0.25


def look(machine: Machine, wanted: ConditionsConfig) -> Reading:
    """See what others do."""
    mean = number((machine.text("proc/loadavg").split() or [""])[0])
    if mean is None or mean < 0:
        return Reading("unknown", "nothing says how busy this machine is (/proc/loadavg)")
    others, most = max(0.0, mean - machine.threads_own) / _cores(machine), wanted.load_max
    load = above(others, most, _GAP * most)
    found = f"load of others {others:.2f} per core, wanted: {most:g} or less"
    pressure = _pressure(machine)
    if pressure is None:
        return Reading(load, found)
    waits = above(pressure, PRESSURE_MAX, _PRESSURE_GAP)
    worst = next(verdict for verdict in ("fails", "between", "holds") if verdict in (load, waits))
    return Reading(
        "fails" if worst == "fails" else load if load != "holds" else waits, f"{found}; pressure {pressure:.0f} %"
    )


def _pressure(machine: Machine) -> float | None:
    for line in machine.text("proc/pressure/cpu").splitlines():
        words = line.split()
        if words[:1] == ["some"]:
            said = next((word.partition("=")[2] for word in words if word.startswith("avg10=")), "")
            percent = number(said)
            return percent if percent is not None and 0 <= percent <= 100 else None
    return None


def _cores(machine: Machine) -> int:
    """Count what /sys lists as online, for example ``0-3`` or ``0,2-3``; 1 when it does not say."""
    count = 0
    for part in machine.text("sys/devices/system/cpu/online").split(","):
        first, _, last = part.partition("-")
        if first.isdecimal() and (last or first).isdecimal():
            count += max(0, int((last or first)[:6]) - int(first[:6]) + 1)
    return max(1, count)
