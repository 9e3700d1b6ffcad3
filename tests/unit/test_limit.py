"""What an order may take while it runs: the operator's file, and a machine that runs short."""

from __future__ import annotations

import dataclasses
import os

import pytest

from edge_runtime.config import BrokerConfig, Config, MemoryConfig, StateConfig, WorkerConfig
from edge_runtime.health import HERE
from edge_runtime.health import machine as questions
from edge_runtime.memory import limit, probe
from edge_runtime.memory.guard import Gauge

MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("24 MiB", 24 * MIB),
        ("25165824\n", 24 * MIB),
        ("0", 0),
        ("", 0),
        ("lots", 0),
        ("-5", 0),
        ("24 MiB" + " " * 99, 24 * MIB),
    ],
)
def test_the_operators_file(tmp_path, text, found):
    path = tmp_path / limit.FILE
    assert limit.told(path) == 0
    path.write_text(text)
    assert limit.told(path) == found


def test_what_is_no_file_says_nothing_and_holds_nobody_up(tmp_path):
    """A pipe that nobody writes to would stop the agent; a link is followed, a loop of links is not."""
    pipe, loop, device = (tmp_path / name for name in ("pipe", "loop", "device"))
    os.mkfifo(pipe)
    loop.symlink_to(loop)
    device.symlink_to("/dev/zero")
    assert [limit.told(path) for path in (pipe, loop, device, tmp_path)] == [0, 0, 0, 0]
    (tmp_path / "real").write_text("24 MiB")
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    assert limit.told(tmp_path / "linked") == 24 * MIB


@pytest.mark.parametrize(
    ("configured", "text", "found"),
    [(0, "", 336), (5, "", 5), (0, "7", 7), (5, "7", 5), (9, "7", 7), (5, "?", 5), (0, "999 MiB", 336)],
)
def test_the_least_is_granted(tmp_path, configured, text, found):
    """Free are 500 MiB, of which 64 are a reserve and 100 are the worker's own."""
    file = tmp_path / limit.FILE
    file.write_text(text)
    machine(tmp_path, 500 * MIB, resident=0)
    grant = limit.Grant(configured, 64 * MIB, file, tmp_path)
    assert grant.now(100 * MIB) == (336 * MIB if found == 336 else found)
    machine(tmp_path, 1 * MIB, resident=0)
    fresh = limit.Grant(configured, 64 * MIB, file, tmp_path)
    assert fresh.now(0) == 1, "nothing is left, which 0 would not say"


@pytest.mark.parametrize(("shared", "coming", "found"), [(True, 100, 150), (True, -30, 280), (False, 100, 400)])
def test_a_control_group_has_room_for_the_worker_and_the_order_together(tmp_path, shared, coming, found):
    """Its limit is 300 MiB, of which 50 are in use; free are 500. Behind a socket a worker is in another group."""
    machine(tmp_path, 500 * MIB, resident=0)
    grouped(tmp_path, 300 * MIB, 50 * MIB)
    grant = limit.Grant(0, 0, tmp_path / limit.FILE, tmp_path, shared=shared)
    assert grant.now(coming * MIB) == found * MIB


def test_whose_worker_is_behind_a_socket_has_another_group(tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "group_room", lambda _: 5)
    child = Config("d", BrokerConfig("mqtt://localhost"), state=StateConfig(str(tmp_path)))
    visited = dataclasses.replace(child, worker=WorkerConfig(socket="/run/door"))
    assert limit.grant_of(child).now(0) == 5
    assert limit.grant_of(visited).now(0) > MIB
    assert "take 0 MiB" in questions.memory(child, HERE).found
    assert "take 0 MiB" not in questions.memory(visited, HERE).found


def test_another_word_of_the_operators_is_heard_at_once(tmp_path):
    file = tmp_path / limit.FILE
    machine(tmp_path, 500 * MIB, resident=0)
    grant = limit.Grant(0, 0, file, tmp_path)
    assert (grant.now(0), grant.changed()) == (500 * MIB, False)
    file.write_text("48 MiB")
    assert (grant.changed(), grant.changed(), grant.now(0)) == (True, False, 48 * MIB)
    file.unlink()
    assert (grant.changed(), grant.now(0)) == (True, 500 * MIB)


def test_check_says_what_the_operators_file_allows(tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "budget", lambda configured, *_, **__: configured or 500 * MIB)
    config = Config("d", BrokerConfig("mqtt://localhost"), state=StateConfig(str(tmp_path)))
    file = tmp_path / limit.FILE
    assert str(file) not in questions.memory(config, HERE).found
    for text, fine, allowed in (("24 MiB", True, "24 MiB"), ("8 MiB", False, "8 MiB"), ("lots", False, "'lots'")):
        file.write_text(text)
        found = questions.memory(config, HERE)
        assert (found.fine, str(file) in found.found, allowed in found.found) == (fine, True, True)
        assert fine or str(file) in found.advice
    capped = dataclasses.replace(config, memory=MemoryConfig("96 MiB"))
    file.write_text("24 MiB")
    assert questions.memory(capped, HERE).advice == "", "not more than is free, but more than the operator allows now"


def machine(root, free, resident):
    (root / "proc" / str(os.getpid())).mkdir(parents=True, exist_ok=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 999999 kB\nMemAvailable: {free // 1024} kB\n")
    (root / "proc" / str(os.getpid()) / "status").write_text(f"VmRSS:\t{resident // 1024} kB\n")


def grouped(root, most, used):
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text("0::/a/b\n")
    folder = root / "sys/fs/cgroup/a/b"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(str(most))
    (folder / "memory.current").write_text(str(used))


def looked(root, reserve=64 * MIB, file=None, monkeypatch=None):
    gauge = Gauge()
    gauge.bytes_base = 100 * MIB
    return limit.Limit(file, reserve, gauge, root)


@pytest.mark.parametrize(
    ("free", "room"),
    [
        (500 * MIB, 0),
        (40 * MIB, 0),  # the reserve is eaten into, but not by half
        (32 * MIB, 0),
        (24 * MIB, 60 * MIB),  # it holds 100 MiB above base; 40 of the reserve are missing
        (0, 0),  # the kernel does not say
    ],
)
def test_half_a_reserve_left_is_made_whole(tmp_path, free, room):
    machine(tmp_path, free, resident=200 * MIB)
    assert looked(tmp_path)(0.5) == room
    assert looked(tmp_path, reserve=0)(0.5) == 0


def test_a_worker_keeps_to_its_own_group(tmp_path):
    machine(tmp_path, 500 * MIB, resident=200 * MIB)
    grouped(tmp_path, 400 * MIB, 220 * MIB)
    assert looked(tmp_path)(0.5) == 280 * MIB, "it holds 100 MiB above base, and 180 are left"
    assert looked(tmp_path, reserve=0)(0.5) == 0
    grouped(tmp_path, 400 * MIB, 500 * MIB)
    assert looked(tmp_path)(0.5) == 100 * MIB


def test_never_nothing(tmp_path):
    machine(tmp_path, 1 * MIB, resident=120 * MIB)
    assert looked(tmp_path)(0.5) == 1, "0 would mean that there is no limit"


def test_an_order_is_not_measured_by_what_held_for_the_one_before(tmp_path, monkeypatch):
    monkeypatch.setattr(limit.time, "monotonic", lambda: 10.0)
    file = tmp_path / limit.FILE
    file.write_text("1 MiB")
    machine(tmp_path, 500 * MIB, resident=200 * MIB)
    look = looked(tmp_path, file=file)
    assert look(0.9) == MIB
    file.unlink()
    assert (look(0.95), look(0.0), look(0.05)) == (MIB, 0, 0), "the order that begins looks for itself"


def test_the_lesser_of_both_five_times_a_second(tmp_path, monkeypatch):
    now = [10.0]
    monkeypatch.setattr(limit.time, "monotonic", lambda: now[0])
    file = tmp_path / limit.FILE
    machine(tmp_path, 24 * MIB, resident=200 * MIB)
    look = looked(tmp_path, file=file)
    assert look(0.1) == 60 * MIB
    file.write_text("48 MiB")
    now[0] += 0.19
    assert look(0.1) == 60 * MIB, "not yet"
    now[0] += 0.02
    assert look(0.1) == 48 * MIB
    file.unlink()
    machine(tmp_path, 500 * MIB, resident=200 * MIB)
    now[0] += 1.0
    assert look(0.1) == 0
