"""Where a machine's power comes from: /sys/class/power_supply, or Termux's battery command on a phone."""

from __future__ import annotations

from dataclasses import dataclass

from edge_runtime.probes.machine import Machine, number

COMMAND = "termux-battery-status"
_FOLDER = "sys/class/power_supply"
_BATTERIES = frozenset({"Battery", "UPS"})
_CHARGED = frozenset({"charging", "full", "not charging", "not_charging"})  # plugged in, but held below full


@dataclass(frozen=True, slots=True)
class Supply:
    """What a machine says of its power.

    Attributes:
        battery: It has one; without, it lives on the mains.
        plugged: Power comes in from outside; None when that is not said.
        percent: Charge of its batteries, 0 to 100; None when that is not said.
        celsius: Warmest battery; None when that is not said.
        asked: A command was asked and has not answered yet.
        problem: Why nothing is known; empty when something is.
    """

    battery: bool = True
    plugged: bool | None = None
    percent: float | None = None
    celsius: float | None = None
    asked: bool = False
    problem: str = ""


def supply(machine: Machine) -> Supply:
    """Read or ask; never waits."""
    if machine.has(COMMAND):
        return _told(machine)
    names = machine.names(_FOLDER)
    if machine.android or names is None:
        return Supply(problem=f"the battery is closed to programs here and there is no {COMMAND}: install Termux:API")
    return _read(machine, names)


def _told(machine: Machine) -> Supply:
    said = machine.ask(COMMAND)
    if said is None:
        return Supply(asked=True, problem=f"{COMMAND} has not answered yet")
    if not said:
        return Supply(problem=f"{COMMAND} gives no answer: is the Termux:API app installed?")
    plugged, status = str(said.get("plugged", "")), str(said.get("status", ""))
    percent, celsius = number(said.get("percentage")), number(said.get("temperature"))
    return Supply(
        plugged=plugged != "UNPLUGGED"
        if plugged.endswith("PLUGGED") or plugged.startswith("PLUGGED_")
        else _fed(status),
        percent=percent if percent is not None and 0 <= percent <= 100 else None,
        celsius=celsius if celsius is not None and -40 <= celsius <= 150 else None,
    )


def _read(machine: Machine, names: tuple[str, ...]) -> Supply:
    online: list[bool] = []
    fed: list[bool] = []
    percents: list[float] = []
    heats: list[float] = []
    batteries = 0
    for name in names:
        folder = f"{_FOLDER}/{name}"
        if machine.text(f"{folder}/scope") == "Device" or machine.text(f"{folder}/present") == "0":
            continue  # a mouse's battery, or an empty bay
        if machine.text(f"{folder}/type") not in _BATTERIES:
            plugged = machine.number(f"{folder}/online")
            online += [] if plugged is None else [plugged > 0]
            continue
        batteries += 1
        status = _fed(machine.text(f"{folder}/status"))
        percent, tenths = machine.number(f"{folder}/capacity"), machine.number(f"{folder}/temp")
        fed += [] if status is None else [status]
        percents += [percent] if percent is not None and 0 <= percent <= 100 else []
        heats += [tenths / 10] if tenths is not None and -400 <= tenths <= 1500 else []
    if not batteries:
        return Supply(battery=False, plugged=True)
    told = online or fed
    return Supply(
        plugged=any(told) if told else None,
        percent=sum(percents) / len(percents) if percents else None,
        celsius=max(heats, default=None),
    )


def _fed(status: str) -> bool | None:
    """Read a battery's own word where no plug has one."""
    word = status.lower()
    return True if word in _CHARGED else False if word == "discharging" else None
