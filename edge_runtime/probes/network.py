"""``unmetered``: the way to the internet is not paid by volume. Cables and Wi-Fi are free, radio modems and tethering are not.

The interface of the default route counts; without a route, or behind a tunnel, all that are up. An owner who knows better
(a Wi-Fi that a phone lends) names interfaces in ``metered``. On a phone Termux says whether Wi-Fi is connected.
"""

from __future__ import annotations

from edge_runtime.config import ConditionsConfig
from edge_runtime.probes import Reading
from edge_runtime.probes.machine import Machine

COMMAND = "termux-wifi-connectioninfo"
_FOLDER = "sys/class/net"
_METERED = ("wwan", "ppp", "rmnet", "ccmni", "usb", "bnep")
_TUNNELS = ("tun", "tap", "wg", "tailscale", "zt", "ipsec", "docker", "veth", "br-", "virbr", "dummy")
_ETHERNET = 1.0
_UP, _COLUMNS = 1, 8


def look(machine: Machine, wanted: ConditionsConfig) -> Reading:
    """See which way the network is, and whether it costs."""
    if machine.has(COMMAND):
        return _told(machine)
    if machine.android:
        return Reading("unknown", f"there is no {COMMAND}: install Termux:API")
    routed = _default(machine)
    names = [routed] if routed and not routed.startswith(_TUNNELS) else _up(machine)
    if not names:
        return Reading("unknown", "no network interface is up")
    costs = {name: name in wanted.metered or _metered(machine, name) for name in names}
    paid = [name for name, cost in costs.items() if cost]
    if paid:
        return Reading("fails", f"{paid[0]} is metered")
    return Reading("holds", f"{names[0]} is not metered")


def _told(machine: Machine) -> Reading:
    said = machine.ask(COMMAND)
    if said is None:
        return Reading("asked", f"{COMMAND} has not answered yet")
    if not said:
        return Reading("unknown", f"{COMMAND} gives no answer: is the Termux:API app installed?")
    if said.get("supplicant_state") == "COMPLETED" and said.get("ip") not in (None, "", "0.0.0.0"):  # noqa: S104 - an address that is none
        return Reading("holds", "on Wi-Fi")
    return Reading("fails", "not on Wi-Fi")


def _default(machine: Machine) -> str:
    """Name the interface of the default route with the least metric; empty when there is none."""
    found: list[tuple[int, str]] = []
    for line in machine.text("proc/net/route").splitlines()[1:]:
        words = line.split()
        try:
            if len(words) >= _COLUMNS and int(words[1], 16) == int(words[7], 16) == 0 and int(words[3], 16) & _UP:
                found.append((int(words[6]), words[0]))
        except ValueError:
            continue
    return min(found)[1] if found else ""


def _up(machine: Machine) -> list[str]:
    names = [name for name in machine.names(_FOLDER) or () if name != "lo" and not name.startswith(_TUNNELS)]
    return [name for name in names if machine.text(f"{_FOLDER}/{name}/operstate") in ("up", "unknown")]


def _metered(machine: Machine, name: str) -> bool:
    kind = machine.number(f"{_FOLDER}/{name}/type")
    modem = "DEVTYPE=wwan" in machine.text(f"{_FOLDER}/{name}/uevent").splitlines()
    return modem or name.startswith(_METERED) or (kind is not None and kind != _ETHERNET)
