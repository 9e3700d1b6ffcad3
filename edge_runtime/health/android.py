"""Questions about a phone: whether Android will let a worker live, and whether Termux can ask for battery and network."""

from __future__ import annotations

import json
import shutil

from edge_runtime.config import Config
from edge_runtime.health.finding import Finding, Machine, told

_SDK_KILLS = 31  # Android 12
_SDK_SETTING = 32  # Android 12L
_OVERRIDE = "persist.sys.fflag.override.settings_enable_monitor_phantom_procs"
_PHANTOM = "phantom process killer"
_API = "Termux:API"
_OFF = "adb shell settings put global settings_enable_monitor_phantom_procs false"
_MANY = (
    "adb shell device_config set_sync_disabled_for_tests persistent; "
    "adb shell device_config put activity_manager max_phantom_processes 2147483647"
)


def phantom(_: Config, where: Machine) -> Finding | None:
    """Ask whether Android (12 and later) may end a training process with SIGKILL for its use of the processor."""
    if not where.android:
        return None
    version = (told(["getprop", "ro.build.version.sdk"]) or "").strip()
    if not version.isdecimal():
        found = "Android does not say its version; from 12 on it may kill training with signal 9"
        return Finding(_PHANTOM, fine=True, found=found, advice=f"if that happens, from a computer: {_OFF}")
    if int(version) < _SDK_KILLS:
        return Finding(_PHANTOM, fine=True, found=f"not in this Android (API level {version})")
    if (told(["getprop", _OVERRIDE]) or "").strip() == "false":
        return Finding(_PHANTOM, fine=True, found="switched off")
    found = f"on (API level {version}): Android may kill training with signal 9, and the order is lost"
    how = _OFF if int(version) >= _SDK_SETTING else _MANY
    return Finding(_PHANTOM, fine=True, found=found, advice=f"switch it off from a computer: {how}")


def api(config: Config, where: Machine) -> Finding | None:
    """Ask whether battery and network can be asked for: that takes a package and an app.

    Whether that matters is the owner's choice: what is not known counts as a condition that does not hold.
    """
    if not where.android:
        return None
    wanted = config.conditions
    needless = not (wanted.charging or wanted.battery_min or wanted.battery_celsius_max or wanted.unmetered)
    unknown = f"battery and network are not known{'' if needless else ', so [conditions] never holds'}"
    if shutil.which("termux-battery-status") is None:
        advice = "pkg install termux-api, and the app Termux:API from where Termux itself came from"
        return Finding(_API, fine=needless, found=f"the package is missing: {unknown}", advice=advice)
    try:
        status = json.loads(told(["termux-battery-status"]) or "")
        found = f"answers: battery {float(status['percentage']):g} %, {str(status['status']).lower()}"
    except (ValueError, TypeError, LookupError):
        advice = (
            "install the app Termux:API from where Termux itself came from, open it once, and switch battery saving off"
        )
        found = f"the package is there, but the app does not answer: {unknown}"
        return Finding(_API, fine=needless, found=found, advice=advice)
    return Finding(_API, fine=True, found=found)
