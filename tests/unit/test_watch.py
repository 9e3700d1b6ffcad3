"""Memory pressure on the machine: when the worker must end, and when nothing is looked at."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime.memory.watch import SECONDS_BETWEEN, Watch, stalled

MIB = 1 << 20
LINES = "some avg10=0.00 avg60=0.00 avg300=0.00 total={0}\nfull avg10=0.00 avg60=0.00 avg300=0.00 total={0}\n"


def machine(root: Path, free: int, waited: float | None = 0.0) -> Path:
    (root / "proc/pressure").mkdir(parents=True, exist_ok=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 900000 kB\nMemAvailable: {free // 1024} kB\n")
    if waited is not None:
        (root / "proc/pressure/memory").write_text(LINES.format(int(waited * 1e6)))
    return root


def looked(watch: Watch, times: int, start: float = 0.0) -> list[str]:
    return [watch.tick(start + SECONDS_BETWEEN * turn, busy=True) for turn in range(times)]


def test_a_machine_with_room_is_left_alone(tmp_path: Path) -> None:
    watch = Watch(64 * MIB, machine(tmp_path, 500 * MIB))
    assert looked(watch, 20) == [""] * 20
    assert watch.due == 20 * SECONDS_BETWEEN


def test_little_that_is_available_twice_in_a_row_is_a_breach(tmp_path: Path) -> None:
    watch = Watch(64 * MIB, machine(tmp_path, 15 * MIB))
    assert looked(watch, 2) == ["", ""]
    machine(tmp_path, 100 * MIB)
    assert looked(watch, 1, 1.0) == [""]
    machine(tmp_path, 15 * MIB)
    first, second = looked(watch, 2, 1.5)
    assert first == ""
    assert "only 15 MiB" in second


def test_waiting_for_memory_most_of_two_seconds_is_a_breach(tmp_path: Path) -> None:
    watch = Watch(64 * MIB, machine(tmp_path, 500 * MIB, 100.0))
    assert looked(watch, 4) == [""] * 4
    machine(tmp_path, 500 * MIB, 101.0)
    assert "50 % of the time" in watch.tick(2.0, busy=True)
    assert looked(watch, 8, 2.5) == [""] * 8


@pytest.mark.parametrize("text", ["", "full\n", "full total=many\n", "some total=1\n", "full avg10\n"])
def test_kernels_that_count_nothing_are_read_without_harm(tmp_path: Path, text: str) -> None:
    machine(tmp_path, 500 * MIB, None)
    assert stalled(tmp_path) is None
    (tmp_path / "proc/pressure/memory").write_text(text)
    assert stalled(tmp_path) is None
    assert looked(Watch(64 * MIB, tmp_path), 8) == [""] * 8


def test_nothing_is_looked_at_without_work_or_without_a_reserve(tmp_path: Path) -> None:
    root = machine(tmp_path, MIB)
    watch = Watch(64 * MIB, root)
    assert [watch.tick(float(now), busy=False) for now in range(5)] == [""] * 5
    assert watch.due == float("inf")
    assert looked(Watch(0, root), 8) == [""] * 8
