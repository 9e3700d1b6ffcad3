"""`coordinator demo` as people run it: ends by itself with a model and a plot, and after Ctrl-C nothing of it is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from coordinator.export import JOURNAL
from coordinator.show import RunView, read
from tests.support.mosquitto import wait_until
from wire.errors import StoreError

KEYS = {
    "algo", "model", "data", "partition", "partition_digest", "seed", "rounds", "seconds", "seconds_virtual", "accuracy",
    "personal", "bytes_up", "bytes_down", "flops", "density_by_layer", "devices", "curve", "bytes_processes", "bytes_devices",
}  # fmt: skip
DEVICE_KEYS = {"name", "width", "density", "engine", "bytes_budget", "bytes_peak", "seconds"}
POINT_KEYS = {"round", "seconds_virtual", "accuracy", "bytes_up", "bytes_down", "flops"}

Process = tuple[int, str]
"""Its number, and when it was started, because a number may be used again."""


def started(pid: int) -> tuple[int, str, str]:
    """Parent, start and state of a process; raises OSError when there is none."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(words[1]), words[19], words[0]


def alive(process: Process) -> bool:
    try:
        _, since, state = started(process[0])
    except OSError:
        return False
    return since == process[1] and state != "Z"


def tree(root: int) -> dict[Process, str]:
    """A process and everything below it, with command lines."""
    parents: dict[int, tuple[int, str]] = {}
    for path in Path("/proc").iterdir():
        try:
            parents[int(path.name)] = started(int(path.name))[:2]
        except (OSError, ValueError):
            continue
    found = {root} & set(parents)
    while more := {pid for pid, (parent, _) in parents.items() if parent in found} - found:
        found |= more
    return {(pid, parents[pid][1]): command(pid) for pid in found}


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def words(out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "coordinator", "demo", "--devices", "2", "--out", str(out), *more]


@contextmanager
def demo(out: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (out.parent / "demo.log").open("wb") as log:
        process = subprocess.Popen(
            words(out, "--rounds", "50"), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def view(out: Path) -> RunView:
    try:
        return read(out / "run-1" / "coordinator")
    except StoreError:
        return RunView()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("demo")
    told = subprocess.run(
        words(folder / "out", "--rounds", "2", "--json", str(folder / "result.json")),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert told.returncode == 0, told.stdout + told.stderr
    return folder / "out" / "run-1", told.stdout, json.loads((folder / "result.json").read_text())


def test_its_result_has_the_shape_that_scripts_rely_on(finished: tuple[Path, str, dict[str, Any]]) -> None:
    folder, _, facts = finished
    assert set(facts) >= KEYS
    assert (facts["algo"], facts["data"], facts["partition"], facts["rounds"]) == ("nestfl", "digits", "dir0.5", 2)
    assert set(facts["accuracy"]) == {"full", "by_width"}
    assert 0 < facts["accuracy"]["full"] <= 1
    assert len(facts["accuracy"]["by_width"]) == 5
    for what in ("before", "after"):
        assert set(facts["personal"][what]) >= {"mean", "p10"}
        assert facts["personal"][what]["devices"] == 2
    assert not facts["personal"]["after"]["final"], "no device was asked about the last aggregation"
    assert [point["round"] for point in facts["curve"]] == [1, 2]
    assert all(set(point) >= POINT_KEYS for point in facts["curve"])
    rounds = read(folder / "coordinator").rounds.values()
    assert facts["curve"][-1]["bytes_up"] == facts["bytes_up"] == sum(r.closed.bytes_up for r in rounds if r.closed)
    assert facts["bytes_up"] > sum(r.bytes_up for r in rounds), "what the link has counted, and not the updates alone"
    assert json.loads((folder / "result.json").read_text()) == facts


def test_devices_of_different_memory_stay_within_it(finished: tuple[Path, str, dict[str, Any]]) -> None:
    small, large = finished[2]["devices"]
    assert set(small) >= DEVICE_KEYS
    assert (small["name"], small["width"], large["name"], large["width"]) == ("device-1", 0, "device-2", 4)
    for device in (small, large):
        assert 0 < device["bytes_peak"] <= device["bytes_budget"]
        assert device["engine"] == "native"
    assert large["bytes_peak"] - small["bytes_peak"] >= 12 << 20


def test_what_all_devices_hold_is_told_and_little(finished: tuple[Path, str, dict[str, Any]]) -> None:
    _, text, facts = finished
    held = facts["bytes_processes"]
    assert set(held) == {"device-1", "device-2"}
    for one in held.values():
        assert 4 << 20 < one["agent"] < 40 << 20
        assert 12 << 20 < one["worker"] < 80 << 20
    assert facts["bytes_devices"] == sum(sum(one.values()) for one in held.values()) <= 180 << 20
    assert f"memory of all 2 devices at their peaks: {facts['bytes_devices'] / (1 << 20):.0f} MiB" in text


def test_it_leaves_a_model_and_a_plot(finished: tuple[Path, str, dict[str, Any]]) -> None:
    folder, text, _ = finished
    model, plot = folder / "coordinator" / "model.safetensors", folder / "plot.png"
    for path in (model, plot, folder / "coordinator" / JOURNAL):
        assert path.exists()
    assert f"model: {model}" in text
    assert f"plot:  {plot}" in text
    assert plot.read_bytes().startswith(b"\x89PNG")
    with safe_open(model, framework="numpy") as found:
        assert found.metadata()["round"] == "2"
        assert "out.weight" in found.keys()  # noqa: SIM118 - it is no mapping


def just_started(out: Path, pid: int) -> bool:
    return (out / "run-1").exists()


def loading(out: Path, pid: int) -> bool:
    return sum("edge_runtime.worker" in line for line in tree(pid).values()) >= 2


def in_a_round(out: Path, pid: int) -> bool:
    rounds = view(out).rounds
    return bool(rounds) and rounds[max(rounds)].outcome == "open" and max(rounds) >= 2


@pytest.mark.parametrize("moment", [just_started, loading, in_a_round], ids=lambda f: f.__name__)
def test_after_an_interrupt_nothing_is_left(tmp_path: Path, moment: Callable[[Path, int], bool]) -> None:
    out = tmp_path / "out"
    with demo(out) as process:
        wait_until(lambda: moment(out, process.pid) or process.poll() is not None, 60.0)
        below = tree(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        until = time.monotonic() + 10.0
        while process.poll() is None and time.monotonic() < until:
            below = tree(process.pid) | below  # the first name counts: one that is ending has none
            time.sleep(0.02)
        assert process.returncode == 130, (tmp_path / "demo.log").read_text()
        wait_until(lambda: not any(map(alive, below)), max(0.1, until - time.monotonic()))
        if moment is not just_started:
            assert sum("mosquitto" in line for line in below.values()) == 1
            assert len(below) >= 6
    assert "Traceback" not in (tmp_path / "demo.log").read_text()


def test_a_killed_demo_takes_everything_with_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with demo(out) as process:
        wait_until(lambda: loading(out, process.pid), 60.0)
        below = tree(process.pid)
        process.kill()
        process.wait()
        wait_until(lambda: not any(map(alive, below)), 10.0)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--devices", "1"], "--devices 1: a federation has at least 2"),
        (["--algo", "nonsense"], "there are dpf, fedavg"),
    ],
)
def test_mistakes_are_named_before_anything_starts(tmp_path: Path, more: list[str], said: str) -> None:
    told = subprocess.run(words(tmp_path / "out", *more), capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 2
    assert said in told.stderr
    assert "broker:" not in told.stdout
