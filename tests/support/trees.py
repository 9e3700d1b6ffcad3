"""Trees of /proc and /sys as small files, for what looks at a machine: a Raspberry Pi 3, 4, 5, Zero 2 W, a phone, a laptop."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path


def write(root: Path, files: Mapping[str, str]) -> Path:
    """Write files below a folder, each at once, so that nobody reads half of one."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_name(path.name + ".new")
        whole.write_text(text)
        whole.replace(path)
    return root


_LOADS = {"proc/loadavg": "0.08 0.03 0.01 1/189 1453", "sys/devices/system/cpu/online": "0-3"}
_CALM = "some avg10=0.00 avg60=0.00 avg300=0.00 total=1234\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0"
_ROUTE = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
_WIFI = {
    "proc/net/route": _ROUTE
    + "wlan0\t00000000\t0101A8C0\t0003\t0\t0\t600\t00000000\t0\t0\t0\n"
    + "wlan0\t0001A8C0\t00000000\t0001\t0\t0\t600\t00FFFFFF\t0\t0\t0\n",
    "sys/class/net/wlan0/type": "1",
    "sys/class/net/wlan0/operstate": "up",
    "sys/class/net/wlan0/uevent": "DEVTYPE=wlan\nINTERFACE=wlan0\nIFINDEX=3",
    "sys/class/net/lo/type": "772",
    "sys/class/net/lo/operstate": "unknown",
}
_CABLE = {
    "proc/net/route": _ROUTE
    + "eth0\t00000000\t0101A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0\n"
    + "wlan0\t00000000\t0101A8C0\t0003\t0\t0\t600\t00000000\t0\t0\t0\n",
    "sys/class/net/eth0/type": "1",
    "sys/class/net/eth0/operstate": "up",
    "sys/class/net/eth0/uevent": "INTERFACE=eth0\nIFINDEX=2",
}


def _zone(kind: str, milli: int, number: int = 0) -> dict[str, str]:
    folder = f"sys/class/thermal/thermal_zone{number}"
    return {f"{folder}/type": kind, f"{folder}/temp": str(milli)}


def _frequency(now: int, most: int) -> dict[str, str]:
    folder = "sys/devices/system/cpu/cpufreq/policy0"
    return {f"{folder}/scaling_max_freq": str(now), f"{folder}/cpuinfo_max_freq": str(most)}


def _alarm(number: int, on: bool) -> dict[str, str]:
    folder = f"sys/class/hwmon/hwmon{number}"
    return {f"{folder}/name": "rpi_volt", f"{folder}/in0_lcrit_alarm": str(int(on))}


FLAGS = "sys/devices/platform/soc/soc:firmware/get_throttled"
BOUND_FLAGS = "sys/bus/platform/drivers/raspberrypi-firmware/soc:firmware/get_throttled"

PI_3 = {
    "proc/device-tree/model": "Raspberry Pi 3 Model B Plus Rev 1.3\0",
    **_LOADS,
    **_WIFI,
    **_zone("cpu-thermal", 53692),
    **_frequency(1400000, 1400000),
    **_alarm(1, on=False),
    "sys/class/hwmon/hwmon0/name": "cpu_thermal",
    FLAGS: "0",
}
"""1 GB, four A53. No pressure files: its kernel is started without psi=1."""

PI_4 = {
    "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0",
    **_LOADS,
    **_CABLE,
    "proc/pressure/cpu": _CALM,
    **_zone("cpu-thermal", 81303),
    **_frequency(1800000, 1800000),
    **_alarm(1, on=True),
    BOUND_FLAGS: "e0008",
}
"""Hot, with a weak power supply: the alarm is on, the firmware's soft limit too."""

PI_5 = {
    "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
    **_LOADS,
    **_CABLE,
    "proc/pressure/cpu": _CALM,
    **_zone("cpu-thermal", 47400),
    **_frequency(2400000, 2400000),
    **_alarm(3, on=False),
    "sys/class/thermal/cooling_device0/type": "pwm-fan",
    "sys/class/thermal/cooling_device0/cur_state": "2",
    "sys/class/thermal/cooling_device0/max_state": "4",
}
"""With its fan running, which is no throttling."""

ZERO_2_W = {
    "proc/device-tree/model": "Raspberry Pi Zero 2 W Rev 1.0\0",
    **_LOADS,
    **_WIFI,
    **_zone("cpu-thermal", 66540),
    **_frequency(600000, 1000000),
    **_alarm(1, on=False),
    FLAGS: "50000",
}
"""Held at 600 of 1000 MHz; the firmware's flags are about the past alone."""

TERMUX = {"proc/meminfo": "MemTotal: 5743812 kB\nMemAvailable: 2300000 kB"}
"""A phone: nothing else can be read there; commands tell."""

LAPTOP = {
    **_LOADS,
    **_WIFI,
    "proc/pressure/cpu": _CALM,
    **_zone("acpitz", 16800),
    **_zone("x86_pkg_temp", 58000, 1),
    **_zone("iwlwifi_1", 141000, 2),
    **_frequency(4200000, 4200000),
    "sys/class/thermal/cooling_device0/type": "Processor",
    "sys/class/thermal/cooling_device0/cur_state": "0",
    "sys/class/power_supply/AC/type": "Mains",
    "sys/class/power_supply/AC/online": "1",
    "sys/class/power_supply/BAT0/type": "Battery",
    "sys/class/power_supply/BAT0/present": "1",
    "sys/class/power_supply/BAT0/status": "Charging",
    "sys/class/power_supply/BAT0/capacity": "71",
    "sys/class/power_supply/BAT0/temp": "312",
    "sys/class/power_supply/hidpp_battery_0/type": "Battery",
    "sys/class/power_supply/hidpp_battery_0/scope": "Device",
    "sys/class/power_supply/hidpp_battery_0/capacity": "4",
    "sys/class/power_supply/hidpp_battery_0/status": "Discharging",
}
"""With a mouse whose battery is nearly empty, which is no matter."""

PHONE = {
    "present": True,
    "technology": "Li-ion",
    "health": "GOOD",
    "plugged": "PLUGGED_USB",
    "status": "CHARGING",
    "temperature": 31.4,
    "percentage": 64,
}
"""What ``termux-battery-status`` prints, as far as it matters; some versions write the temperature as text."""

AIR = {"supplicant_state": "COMPLETED", "ip": "192.168.1.7", "ssid": "<unknown ssid>", "rssi": -61}
"""What ``termux-wifi-connectioninfo`` prints: the name of the network takes another permission."""


def stub(folder: Path, name: str, script: str) -> dict[str, str]:
    """Write a command; gives an environment of a phone where it is found.

    Another process writes it: a file that a child of this one's other threads holds open for writing cannot be started.
    """
    folder.mkdir(parents=True, exist_ok=True)
    argv = ["/bin/sh", "-c", 'cat >"$0" && chmod 755 "$0"', str(folder / name)]
    subprocess.run(argv, input=f"#!/bin/sh\n{script}\n", text=True, check=True)
    return {"PATH": f"{folder}:/usr/bin:/bin", "ANDROID_ROOT": "/system"}
