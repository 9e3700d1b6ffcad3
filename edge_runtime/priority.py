"""A worker steps aside: nice, the idle classes of processor and disk; and what it holds comes back when it is killed.

All of it is about a process of ours, from outside, and needs no right. Threads are set one by one, because a library may have
started some by then; what they start later is as they are.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path
from typing import Literal

Priority = Literal["idle", "low", "normal"]

_NICE = {"idle": 19, "low": 10}
_IO_WHO_PROCESS = 1
_IO_CLASS = {"idle": 3 << 13, "low": 2 << 13 | 7}  # idle; best effort at the last of its eight levels
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "armv7l": 314, "armv6l": 314, "riscv64": 30, "i686": 289}
_PROCESS_MRELEASE = 448  # the same number on every machine
_ANDROID = "ANDROID_ROOT" in os.environ  # there a call that the system has forbidden ends the process that makes it
_TASKS = Path("/proc")


def lower(pid: int, priority: Priority) -> None:
    """Let a process run behind all others, as far as this system allows; what it refuses stays as it was.

    Args:
        pid: A process of ours.
        priority: ``idle``: nice 19, SCHED_IDLE and the idle class of disks, so that it gets what nobody else wants; ``low``:
            nice 10 and the last place of the ordinary disk class; ``normal``: as it is.

    Cost: some 10 us for each thread.
    """
    if priority == "normal":
        return
    for task in _tasks(pid):
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, task, _NICE[priority])
        if priority == "idle" and hasattr(os, "SCHED_IDLE"):
            with contextlib.suppress(OSError):
                os.sched_setscheduler(task, os.SCHED_IDLE, os.sched_param(0))
        number = _IOPRIO_SET.get(os.uname().machine)
        if number is not None and not _ANDROID:
            ctypes.CDLL(None).syscall(number, _IO_WHO_PROCESS, task, _IO_CLASS[priority])


def release(pid: int) -> bool:
    """Free the memory of a process that was just killed, in this process's time instead of its own.

    A killed process takes itself apart with its own share of the processor. In the idle class, on a busy machine, that is
    nearly nothing: 600 MiB took 28 s to come back, measured beside four busy processes on two cores, and 0.14 s this way.

    Returns:
        Whether the kernel did it (Linux 5.15 and later). False also when there was nothing left to free.
    """
    if _ANDROID or not hasattr(os, "pidfd_open"):
        return False
    try:
        handle = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        return bool(ctypes.CDLL(None).syscall(_PROCESS_MRELEASE, handle, 0) == 0)
    except (AttributeError, OSError):
        return False
    finally:
        os.close(handle)


def _tasks(pid: int) -> list[int]:
    try:
        return [int(task.name) for task in (_TASKS / str(pid) / "task").iterdir()]
    except OSError:
        return [pid]
