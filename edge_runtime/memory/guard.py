"""Enforce and measure a worker's memory. All of it is about the process that calls.

The wall is RLIMIT_DATA, which works on every kernel, also where Raspberry Pi OS has switched the memory control group
off. Beyond it torch sometimes raises and sometimes crashes, so it must stand around a child process and never around
the agent.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from pathlib import Path

from edge_runtime.memory.probe import MEBIBYTE

MMAP_THRESHOLD = MEBIBYTE
"""Blocks from this size on are mapped singly and given back at once. A fixed threshold makes peaks predictable and
small; 1 MiB has the same peaks as 64 KiB and costs less page-fault time."""

WALL_SLACK = 80 * MEBIBYTE
"""What the wall leaves beyond the budget: address space counts before it is touched. Of the orders measured, masked ones of
small models want 22 MiB (a heap with gaps, room for an index that is larger than the index), and MobileNetV3 at batches from
16 on wants 67 (oneDNN makes dozens of kernels); stacks are there before an order."""

WALL_SLACK_NATIVE = 32 * MEBIBYTE
"""The same for the native engine, which has no oneDNN: it lays its memory out beforehand."""

_SAID_OF_MEMORY = ("allocate memory", "could not create a", "could not execute a", "bad_alloc", "resource temporarily")
"""torch's allocator; oneDNN, which says no more of a failed allocation than what it was for; C++; a thread without a stack."""

_M_MMAP_THRESHOLD = -3
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def settle_allocator() -> bool:
    """Fix glibc's threshold for singly mapped blocks; call it before the engine is loaded. False: no glibc here."""
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD) == 1)
    except (AttributeError, OSError):
        return False


def offer_to_oom_killer(score: int = 800) -> None:
    """Ask the kernel to end this process before others when memory runs out; raising one's own score needs no right."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(score))


def wall(bytes_budget: int, bytes_from: int = 0, slack: int = WALL_SLACK) -> None:
    """Let this process map `bytes_budget` more than `bytes_from`, plus `slack`.

    Args:
        bytes_budget: 0 takes the wall away.
        bytes_from: Address space as far as walls count it (VmData); 0 for what is mapped now.
        slack: As `WALL_SLACK`.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = hard
    data = bytes_from or _field("VmData")
    if bytes_budget and data:
        soft = data + bytes_budget + slack
        if hard != resource.RLIM_INFINITY:
            soft = min(soft, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def starved(error: RuntimeError) -> bool:
    """Tell whether this is how an engine says that memory has run out: libraries below torch have but a text for it."""
    text = str(error).lower()
    return any(said in text for said in _SAID_OF_MEMORY)


def rest() -> None:
    """Give unused memory back to the system. Cost: about a millisecond."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


class Gauge:
    """Measures the peak of resident memory above a base that was taken at rest.

    The base stays what it was before the first order, so that what an allocator keeps afterwards counts as used.

    Attributes:
        bytes_base: Resident size at rest.
        bytes_left: What earlier orders had left above base when this one began: it counts as used.
    """

    def __init__(self) -> None:
        self.bytes_base = 0
        self.bytes_left = 0
        self._mapped = 0
        self._mapped_left = 0
        self._taken: set[str] = set()
        self._slack = WALL_SLACK
        self.begin("")

    def begin(self, engine: str) -> None:
        """Start a measurement; the base is taken anew when this is the first with a (just loaded) engine.

        Unused memory is given back and the kernel's high-water mark cleared first. Cost: about a millisecond.
        """
        rest()
        self._slack = WALL_SLACK_NATIVE if engine == "native" else WALL_SLACK
        with contextlib.suppress(OSError):
            _CLEAR.write_text("5")
        if engine not in self._taken:
            self._taken.add(engine)
            gc.freeze()  # what the libraries hold stays for good: collecting takes a tenth of the time without it
            self.bytes_base = _field("VmRSS") or _lifetime_peak()
            self._mapped = _field("VmData")
            self.bytes_left = self._mapped_left = 0

    def rested(self) -> None:
        """Look what earlier orders have left: called before anything of the next one is in memory. Cost: about 40 us."""
        if len(self._taken) > 1:  # with an engine; before the first one is loaded there is nothing to compare with
            self.bytes_left = max(0, _field("VmRSS") - self.bytes_base)
            self._mapped_left = max(0, _field("VmData") - self._mapped)

    def enclose(self, bytes_budget: int) -> None:
        """Put up the wall around an order; what earlier ones have left is taken from its budget. 0 takes it away."""
        room = max(1, bytes_budget - self.bytes_left) if bytes_budget else 0
        wall(room, self._mapped + self._mapped_left if self._mapped else 0, self._slack)

    def peak(self) -> int:
        """Give the highest resident size since the beginning, above base. Cost: about 20 us.

        Where the kernel keeps no high-water mark (not Linux), it is the lifetime's, which can only be higher.
        """
        return max(0, (_field("VmHWM") or _lifetime_peak()) - self.bytes_base)


def _field(name: str) -> int:
    try:
        with _STATUS.open(encoding="ascii", errors="replace") as lines:
            for line in lines:
                if line.startswith(name + ":"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return 0
    return 0


def _lifetime_peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
