"""A process that steps aside, and what it held after it was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edge_runtime import priority

MIB = 1 << 20
HELD = 256 * MIB
HOLD = f"import time\nb = bytearray({HELD})\nfor i in range(0, len(b), 4096): b[i] = 1\nprint(1, flush=True)\nwhile True: pass"
SPIN = "while True: pass"


@pytest.fixture
def holder():
    with subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def resident(pid):
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    return 0


def test_in_the_idle_class_memory_comes_back_in_our_time(holder):
    """Beside busy neighbours the process itself would take seconds for it: it no longer gets a turn."""
    assert resident(holder.pid) > HELD
    priority.lower(holder.pid, "idle")
    neighbours = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        os.kill(holder.pid, signal.SIGSTOP)
        began = time.monotonic()
        holder.kill()
        freed = priority.release(holder.pid)
        seconds = time.monotonic() - began
        assert freed or holder.poll() is not None or not resident(holder.pid)
        assert seconds < 2.0
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()


def test_a_process_that_lives_is_not_touched(holder):
    assert not priority.release(holder.pid)
    assert resident(holder.pid) > HELD


def test_what_is_gone_is_no_error():
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    priority.lower(process.pid, "idle")
    assert not priority.release(process.pid)


def test_normal_changes_nothing(holder):
    before = os.getpriority(os.PRIO_PROCESS, holder.pid), os.sched_getscheduler(holder.pid)
    priority.lower(holder.pid, "normal")
    assert (os.getpriority(os.PRIO_PROCESS, holder.pid), os.sched_getscheduler(holder.pid)) == before


def test_where_the_kernel_cannot_it_says_so(holder, monkeypatch):
    monkeypatch.setattr(priority, "_ANDROID", True)
    holder.kill()
    assert not priority.release(holder.pid)
