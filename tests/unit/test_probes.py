"""Conditions over trees of /proc and /sys: what boards and a phone say, what strangers may write there, and two thresholds."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from edge_runtime import probes
from edge_runtime.config import ConditionsConfig
from edge_runtime.probes import command as commands
from edge_runtime.probes import hours
from edge_runtime.probes.machine import Machine, number
from tests.support import trees
from tests.support.trees import AIR, BOUND_FLAGS, FLAGS, PHONE, stub, write
from wire.errors import ConfigError

ALL = ConditionsConfig(
    charging=True,
    battery_min=20,
    battery_celsius_max=40,
    celsius_max=78,
    unthrottled=True,
    unmetered=True,
    load_max=0.5,
    hours=("00:00-12:00", "12:00-24"),
)
BOARDS = {
    "PI_3": {},
    "PI_4": {"celsius_max": "fails", "unthrottled": "fails"},
    "PI_5": {},
    "ZERO_2_W": {"unthrottled": "fails"},
    "LAPTOP": {},
}
BATTERY = "sys/class/power_supply/BAT0"


def look(tmp_path, files, environ=None, **wanted):
    machine = Machine(write(tmp_path, files), environ or {})
    return probes.look(machine, ConditionsConfig(**wanted))


def one(tmp_path, files, environ=None, **wanted):
    (reading,) = look(tmp_path, files, environ, **wanted).values()
    return reading


def test_every_condition_has_a_key_a_file_and_words_of_its_own():
    every = ConditionsConfig(**{name: getattr(ALL, name) for name in probes.demanded(ALL)})
    assert len(probes.demanded(every)) == len(probes.demanded(ALL)) == 8
    assert probes.demanded(ConditionsConfig()) == ()
    for name in probes.demanded(ALL):
        assert f"``{name}``" in (probes.find(name).__doc__ or "")


@pytest.mark.parametrize("board", BOARDS)
def test_what_boards_say(tmp_path, board):
    wanted = {name: getattr(ALL, name) for name in probes.demanded(ALL) if name != "hours"}
    found = look(tmp_path, getattr(trees, board), **wanted)
    assert {name: reading.verdict for name, reading in found.items()} == dict.fromkeys(wanted, "holds") | BOARDS[board]


def test_why_they_fail_is_said(tmp_path):
    hot = look(tmp_path / "4", trees.PI_4, celsius_max=78, unthrottled=True)
    assert hot["celsius_max"].found == "processor at 81 C, wanted: 78 C or less"
    assert hot["unthrottled"].found == "too little voltage; soft limit of temperature"
    slow = one(tmp_path / "0", trees.ZERO_2_W, unthrottled=True)
    assert slow.found == "frequency held at 600 of 1000 MHz"


@pytest.mark.parametrize("name", ["charging", "battery_min", "battery_celsius_max"])
def test_a_board_without_a_battery_lives_on_the_mains(tmp_path, name):
    assert one(tmp_path, trees.PI_4, **{name: True if name == "charging" else 20}).verdict == "holds"


def test_the_mouse_does_not_count(tmp_path):
    found = one(tmp_path, trees.LAPTOP, battery_min=20)
    assert found.found == "battery at 71 %, wanted: 20 % or more"


@pytest.mark.parametrize(
    ("files", "verdict"),
    [
        ({"sys/class/power_supply/AC/online": "0"}, "fails"),
        ({"sys/class/power_supply/AC/online": "0", "sys/class/power_supply/usb/online": "1"}, "holds"),
        ({"sys/class/power_supply/AC/online": "", f"{BATTERY}/status": "Not charging"}, "holds"),
        ({"sys/class/power_supply/AC/online": "", f"{BATTERY}/status": "Discharging"}, "fails"),
        ({"sys/class/power_supply/AC/online": "", f"{BATTERY}/status": "Unknown"}, "unknown"),
    ],
)
def test_plugs_and_what_a_battery_says_itself(tmp_path, files, verdict):
    assert one(tmp_path, {**trees.LAPTOP, **files}, charging=True).verdict == verdict


@pytest.mark.parametrize(
    ("percent", "verdict"),
    [(19, "fails"), (20, "between"), (24, "between"), (25, "holds"), (101, "unknown"), ("x", "unknown")],
)
def test_a_battery_has_two_thresholds(tmp_path, percent, verdict):
    assert one(tmp_path, {**trees.LAPTOP, f"{BATTERY}/capacity": str(percent)}, battery_min=20).verdict == verdict


def test_a_full_battery_holds_whatever_is_wanted(tmp_path):
    assert one(tmp_path, {**trees.LAPTOP, f"{BATTERY}/capacity": "100"}, battery_min=100).verdict == "holds"


@pytest.mark.parametrize(
    ("milli", "verdict"), [(78001, "fails"), (78000, "between"), (70000, "holds"), (999999, "unknown")]
)
def test_heat_has_two_thresholds(tmp_path, milli, verdict):
    zone = "sys/class/thermal/thermal_zone0"
    assert one(tmp_path, {f"{zone}/temp": str(milli), f"{zone}/type": "cpu-thermal"}, celsius_max=78).verdict == verdict


def test_the_processors_own_zone_counts_before_all_others(tmp_path):
    assert one(tmp_path, trees.LAPTOP, celsius_max=90).found.startswith("processor at 58 C")


@pytest.mark.parametrize("path", [FLAGS, BOUND_FLAGS])
@pytest.mark.parametrize(
    ("flags", "verdict"), [("0", "holds"), ("50005", "fails"), ("50000", "holds"), ("0x4", "fails"), ("zz", "unknown")]
)
def test_the_firmwares_flags_are_about_now(tmp_path, path, flags, verdict):
    assert one(tmp_path, {path: flags}, unthrottled=True).verdict == verdict


def test_a_cooling_device_that_slows_the_processor_down(tmp_path):
    device = "sys/class/thermal/cooling_device0"
    files = {f"{device}/type": "cpufreq-cpu0", f"{device}/cur_state": "3"}
    assert one(tmp_path, files, unthrottled=True).found == "slowed down for heat (step 3)"


@pytest.mark.parametrize(
    ("mean", "own", "avg10", "verdict"),
    [
        ("0.10", 0, "0.00", "holds"),
        ("2.10", 0, "0.00", "fails"),
        ("1.80", 0, "0.00", "between"),
        ("2.10", 2, "0.00", "holds"),
        ("0.10", 0, "41.0", "fails"),
        ("0.10", 0, "30.0", "between"),
        ("0.10", 0, "nan", "holds"),
        ("nan", 0, "0.00", "unknown"),
        ("", 0, "0.00", "unknown"),
    ],
)
def test_load_of_others(tmp_path, mean, own, avg10, verdict):
    pressure = f"some avg10={avg10} avg60=0.00 avg300=0.00 total=1"
    machine = Machine(write(tmp_path, {**trees.PI_4, "proc/loadavg": mean, "proc/pressure/cpu": pressure}), {})
    machine.threads_own = own
    assert probes.look(machine, ConditionsConfig(load_max=0.5))["load_max"].verdict == verdict


@pytest.mark.parametrize(
    ("online", "cores"), [("0-3", 4), ("0,2-3", 3), ("0", 1), ("", 1), ("3-0", 1), ("0-99999999999", 1000000)]
)
def test_cores_are_counted(tmp_path, online, cores):
    files = {**trees.PI_4, "proc/loadavg": str(cores), "sys/devices/system/cpu/online": online}
    assert "load of others 1.00 per core" in one(tmp_path, files, load_max=0.5).found


@pytest.mark.parametrize(
    ("files", "wanted", "verdict"),
    [
        ({}, {}, "holds"),
        ({}, {"metered": ("eth0",)}, "fails"),
        ({"proc/net/route": ""}, {}, "holds"),
        ({"proc/net/route": trees._ROUTE + "usb0 00000000 01 0003 0 0 0 00000000 0 0 0\n"}, {}, "fails"),
        ({"proc/net/route": trees._ROUTE + "wwan0 00000000 01 0003 0 0 0 00000000 0 0 0\n"}, {}, "fails"),
        ({"proc/net/route": trees._ROUTE + "wg0 00000000 01 0003 0 0 0 00000000 0 0 0\n"}, {}, "holds"),
        ({"proc/net/route": "x\n00000000\nwwan0 zz 01 0003 0 0 0 0 0 0 0\n\0\0\0"}, {}, "holds"),
        ({"sys/class/net/eth0/uevent": "DEVTYPE=wwan"}, {}, "fails"),
        ({"sys/class/net/eth0/type": "512"}, {}, "fails"),
    ],
)  # fmt: skip
def test_networks(tmp_path, files, wanted, verdict):
    assert one(tmp_path, {**trees.PI_4, **files}, unmetered=True, **wanted).verdict == verdict


def test_a_machine_that_says_nothing_is_known_for_it(tmp_path):
    wanted = {"celsius_max": 78, "unthrottled": True, "unmetered": True, "load_max": 0.5}
    found = look(tmp_path, {}, **wanted)
    assert {reading.verdict for reading in found.values()} == {"unknown"}
    phone = look(tmp_path, trees.TERMUX, {"ANDROID_ROOT": "/system"}, charging=True, battery_min=9, **wanted)
    assert {reading.verdict for reading in phone.values()} == {"unknown"}
    assert "Termux:API" in phone["charging"].found


# --- hours ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("span", "at", "verdict"),
    [
        ("22:00-06:00", (23, 59), "holds"),
        ("22:00-06:00", (5, 59), "holds"),
        ("22:00-06:00", (6, 0), "fails"),
        ("22-6", (21, 59), "fails"),
        ("9 - 17:30", (17, 29), "holds"),
        ("9-17:30", (17, 30), "fails"),
        ("0-24", (0, 0), "holds"),
    ],
)
def test_hours(tmp_path, monkeypatch, span, at, verdict):
    now = time.struct_time((2026, 5, 1, *at, 0, 4, 121, 0))
    monkeypatch.setattr(Machine, "now", lambda _: now)
    assert one(tmp_path, {}, hours=(span,)).verdict == verdict


def test_a_clock_that_starts_in_1970_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Machine, "now", lambda _: time.gmtime(0))
    assert one(tmp_path, {}, hours=("0-24",)).verdict == "unknown"


@pytest.mark.parametrize(
    "text", ["", "22", "22-22", "25-1", "1-25", "1:60-2", "one-two", "-1-2", "1-2-3", "٣-٤", "9" * 99]
)
def test_what_is_no_span(text):
    with pytest.raises(ConfigError, match=r'conditions\.hours: .* write for example "22:00-06:00"'):
        hours.spans([text])


# --- strangers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\0" * 9,
        "9" * 5000,
        "1e999",
        "-1e999",
        "nan",
        "inf",
        "٣" * 9000,
        "\udcff" * 3,
        "0x",
        "a b\n" * 3000,
        "-1",
        "1_0",
    ],
)
def test_nonsense_in_every_file_is_no_crash(tmp_path, text):
    wanted = {name: getattr(ALL, name) for name in probes.demanded(ALL)}
    whole = {**trees.LAPTOP, **trees.PI_4, FLAGS: "0"}
    for path in whole:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(text.encode("utf-8", "surrogateescape"))
    found = probes.look(Machine(tmp_path, {}), ConditionsConfig(**wanted))
    assert all(reading.found.isprintable() for reading in found.values())


def test_what_is_no_file_holds_nobody_up(tmp_path):
    machine = Machine(tmp_path, {})
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "large").write_bytes(b"7" * 100_000)
    assert [machine.text(name) for name in ("pipe", "loop", "zero", "none", ".", "a\0b")] == [""] * 6
    assert len(machine.text("large")) == 4096
    for i in range(300):
        (tmp_path / "many" / str(i)).mkdir(parents=True)
    assert len(machine.names("many") or ()) == 256
    assert machine.names("large") == machine.names("none") == ()


@pytest.mark.parametrize(
    ("value", "found"), [("31.4", 31.4), (7, 7.0), (True, None), (None, None), ("1e999", None), (10**400, None)]
)
def test_numbers_of_strangers(value, found):
    assert number(value) == found


# --- a phone -------------------------------------------------------------------------------------------------------


def says(file):
    """A command that prints a file once that is there: a free processor runs a whole script before one look at it is over."""
    return f"until [ -e {file} ]; do sleep 0.01; done; cat {file}"


def told(machine, wanted, seconds=5.0):
    """Look until the commands have answered; every look comes back at once."""
    until = time.monotonic() + seconds
    while True:
        before = time.monotonic()
        found = probes.look(machine, wanted)
        assert time.monotonic() - before < 0.5
        if all(reading.verdict != "asked" for reading in found.values()) or before > until:
            return found
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("said", "charging", "percent", "heat"),
    [
        (PHONE, "holds", "holds", "holds"),
        ({**PHONE, "plugged": "UNPLUGGED", "temperature": "41.2"}, "fails", "holds", "fails"),
        ({**PHONE, "percentage": 3, "plugged": "PLUGGED_AC"}, "holds", "fails", "holds"),
        ({"status": "DISCHARGING"}, "fails", "unknown", "unknown"),
        ({"status": "FULL", "percentage": [1], "temperature": {"a": 1}}, "holds", "unknown", "unknown"),
        ({"percentage": 1e9, "temperature": "hot", "plugged": 7}, "unknown", "unknown", "unknown"),
        ([PHONE], "unknown", "unknown", "unknown"),
        ({}, "unknown", "unknown", "unknown"),
    ],
)
def test_a_phones_battery(tmp_path, said, charging, percent, heat):
    machine = Machine(tmp_path, stub(tmp_path / "bin", "termux-battery-status", says(tmp_path / "said")))
    wanted = ConditionsConfig(charging=True, battery_min=20, battery_celsius_max=40)
    assert {r.verdict for r in probes.look(machine, wanted).values()} == {"asked"}
    write(tmp_path, {"said": json.dumps(said)})
    found = told(machine, wanted)
    assert [reading.verdict for reading in found.values()] == [charging, percent, heat]


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        (AIR, "holds"),
        ({**AIR, "supplicant_state": "DISCONNECTED"}, "fails"),
        ({**AIR, "ip": "0.0.0.0"}, "fails"),
        ({"supplicant_state": "COMPLETED"}, "fails"),
    ],
)
def test_a_phones_network(tmp_path, said, verdict):
    environ = stub(tmp_path / "bin", "termux-wifi-connectioninfo", f"echo '{json.dumps(said)}'")
    found = told(Machine(tmp_path, environ), ConditionsConfig(unmetered=True))
    assert found["unmetered"].verdict == verdict


@pytest.mark.parametrize(
    "script", ["exit 3", "echo '{'", "head -c 300000 /dev/zero", "echo '[[[['", "kill -9 $$", "true"]
)
def test_a_command_that_says_nothing_useful(tmp_path, script, monkeypatch):
    monkeypatch.setattr(commands, "SECONDS_MAX", 0.3)
    machine = Machine(tmp_path, stub(tmp_path / "bin", "termux-battery-status", script))
    found = told(machine, ConditionsConfig(charging=True))
    assert found["charging"].verdict == "unknown"
    assert "Termux:API app" in found["charging"].found
    machine.close()


def test_a_command_that_hangs_is_ended_with_its_children(tmp_path, monkeypatch):
    """As Termux's do for ever where their app is not installed."""
    monkeypatch.setattr(commands, "SECONDS_MAX", 0.3)
    script = f"echo $$ > {tmp_path}/pid; sleep 60 & echo $! > {tmp_path}/child; wait"
    machine = Machine(tmp_path, stub(tmp_path / "bin", "termux-battery-status", script))
    wanted = ConditionsConfig(charging=True)
    began = time.monotonic()
    assert told(machine, wanted)["charging"].verdict == "unknown"
    assert time.monotonic() - began < 3.0
    pids = [int((tmp_path / name).read_text()) for name in ("pid", "child")]
    until = time.monotonic() + 3.0
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < until
        probes.look(machine, wanted)
        time.sleep(0.01)
    machine.close()


def test_an_answer_stands_until_a_newer_one_is_here(tmp_path):
    script = f"echo x >> {tmp_path}/asked; {says(tmp_path / 'said')}"
    machine = Machine(tmp_path, stub(tmp_path / "bin", "termux-battery-status", script))
    wanted = ConditionsConfig(charging=True)
    write(tmp_path, {"said": json.dumps(PHONE)})
    assert told(machine, wanted)["charging"].verdict == "holds"
    for _ in range(20):
        probes.look(machine, wanted)
    assert (tmp_path / "asked").read_text() == "x\n"
    (tmp_path / "said").unlink()
    machine.seconds_fresh = 0.0
    assert probes.look(machine, wanted)["charging"].verdict == "holds"
    write(tmp_path, {"said": json.dumps({**PHONE, "plugged": "UNPLUGGED"})})
    until = time.monotonic() + 5.0
    while probes.look(machine, wanted)["charging"].verdict != "fails":
        assert time.monotonic() < until
        time.sleep(0.01)
    machine.close()


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text("ascii", "replace").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
