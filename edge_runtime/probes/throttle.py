"""``unthrottled``: nothing holds the processor back for want of power or for heat.

Looked at are, as far as they are there: the Raspberry Pi's under-voltage alarm and its firmware's flags, the cooling devices
that slow processors down, and a frequency that is held far below what the processor can do.
"""

from __future__ import annotations

from edge_runtime.config import ConditionsConfig
from edge_runtime.probes import Reading
from edge_runtime.probes.machine import Machine

_FIRMWARE = "sys/bus/platform/drivers/raspberrypi-firmware"
_FIRMWARE_OLD = "sys/devices/platform/soc/soc:firmware/get_throttled"
_FLAGS = ((1, "too little voltage"), (2, "frequency capped"), (4, "throttled"), (8, "soft limit of temperature"))
"""The firmware's low bits say what is now; the same 16 bits higher, what has been since the start, which is no matter here."""
_COOLING = "sys/class/thermal"
_SLOWERS = ("cpufreq", "processor", "cpu")
_HWMON = "sys/class/hwmon"
_CPUFREQ = "sys/devices/system/cpu/cpufreq"
_SHARE_MIN = 0.75


def look(machine: Machine, wanted: ConditionsConfig) -> Reading:  # noqa: ARG001 - every probe has the same form
    """Ask every source; one that complains is enough."""
    sources = [_volts(machine), _flags(machine), _cooled(machine), _capped(machine)]
    complaints = [said for said in sources if said]
    if complaints:
        return Reading("fails", "; ".join(complaints))
    if all(said is None for said in sources):
        return Reading("unknown", "nothing says whether the processor is held back")
    return Reading("holds", "the processor runs freely")


def _volts(machine: Machine) -> str | None:
    for name in machine.names(_HWMON) or ():
        if machine.text(f"{_HWMON}/{name}/name") == "rpi_volt":
            alarm = machine.number(f"{_HWMON}/{name}/in0_lcrit_alarm")
            return None if alarm is None else "too little voltage" if alarm else ""
    return None


def _flags(machine: Machine) -> str | None:
    paths = [f"{_FIRMWARE}/{name}/get_throttled" for name in machine.names(_FIRMWARE) or ()]
    for path in (*paths, _FIRMWARE_OLD):
        try:
            flags = int(machine.text(path)[:16], 16)
        except ValueError:
            continue
        return ", ".join(word for bit, word in _FLAGS if flags & bit)
    return None


def _cooled(machine: Machine) -> str | None:
    there = None
    for name in machine.names(_COOLING) or ():
        kind = machine.text(f"{_COOLING}/{name}/type").lower() if name.startswith("cooling_device") else ""
        if not any(word in kind for word in _SLOWERS):
            continue
        step = machine.number(f"{_COOLING}/{name}/cur_state")
        if step is not None:
            there = ""
            if step > 0:
                return f"slowed down for heat (step {step:.0f})"
    return there


def _capped(machine: Machine) -> str | None:
    there = None
    for name in machine.names(_CPUFREQ) or ():
        now = machine.number(f"{_CPUFREQ}/{name}/scaling_max_freq")
        most = machine.number(f"{_CPUFREQ}/{name}/cpuinfo_max_freq")
        if now is None or not most or most < 0 or now < 0:
            continue
        there = ""
        if now < _SHARE_MIN * most:
            return f"frequency held at {now / 1000:.0f} of {most / 1000:.0f} MHz"
    return there
