"""What the device processes of a demo hold, by the kernel's own accounting.

Memory that processes share, such as the code of Python, is split among them by the kernel (PSS): sums are right. It keeps no
high-water mark of that, but one of all resident memory: what a process held more at that mark than when it was looked at was
its own. So a peak between two looks is not missed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_SECONDS_BETWEEN = 0.25
_PROC = Path("/proc")
_KILO = 1024


@dataclass(frozen=True, slots=True)
class Peaks:
    """Of one device, in bytes.

    Attributes:
        agent: The idle process.
        worker: The process that trains; of several, one after the other, the one that held most.
    """

    agent: int
    worker: int


class Held:
    """Looks at agents and their children, four times a second at most."""

    def __init__(self, root: Path = _PROC) -> None:
        """Know no process yet."""
        self._root = root
        self._agents: dict[int, str] = {}
        self._peaks: dict[tuple[str, bool], int] = {}
        self._due = 0.0

    def add(self, device: str, pid: int) -> None:
        """Look at a device's agent from now on."""
        self._agents[pid] = device

    def look(self) -> None:
        """Look, when it is time to. Cost: about a millisecond for each process."""
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + _SECONDS_BETWEEN
        for pid, device in self._agents.items():
            self._note((device, False), pid)
            for child in self._children(pid):
                self._note((device, True), child)

    def peaks(self) -> Mapping[str, Peaks]:
        """Give what was seen, by device; nothing where the kernel does not tell."""
        devices = sorted({device for device, _ in self._peaks})
        return {name: Peaks(self._peaks.get((name, False), 0), self._peaks.get((name, True), 0)) for name in devices}

    def _note(self, key: tuple[str, bool], pid: int) -> None:
        status = _kilobytes(self._root / str(pid) / "status", ("VmHWM:", "VmRSS:"))
        share = _kilobytes(self._root / str(pid) / "smaps_rollup", ("Pss:",))
        if "Pss:" in share and len(status) == 2:
            more = max(0, status["VmHWM:"] - status["VmRSS:"])
            self._peaks[key] = max(self._peaks.get(key, 0), _KILO * (share["Pss:"] + more))

    def _children(self, pid: int) -> list[int]:
        try:
            return [
                int(word)
                for task in (self._root / str(pid) / "task").iterdir()
                for word in (task / "children").read_text("ascii").split()
            ]
        except (OSError, ValueError):
            return []


def _kilobytes(path: Path, keys: tuple[str, ...]) -> dict[str, int]:
    found: dict[str, int] = {}
    try:
        with path.open(encoding="ascii", errors="replace") as lines:
            for line in lines:
                words = line.split()
                if words and words[0] in keys:
                    found[words[0]] = int(words[1])
    except (OSError, ValueError, IndexError):
        return {}
    return found
