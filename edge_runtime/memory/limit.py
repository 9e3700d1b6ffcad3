"""What an order may take while it runs: less than it was granted, when the operator says so or the machine runs short.

The operator's word is a file with an amount, such as ``24 MiB``. It counts from the next batch on, and for every order after;
without the file the configuration's word stands. The machine runs short when less than half of the reserve is available. The
order then has to give back what the reserve lacks. The other half keeps what comes and goes from cutting models. A worker
also keeps to what its own control group has left, which a unit's ``MemoryMax=`` bounds.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.amounts import amount
from edge_runtime.memory import probe
from edge_runtime.memory.guard import Gauge
from wire.errors import ConfigError

if TYPE_CHECKING:
    from edge_runtime.config import Config

FILE = "budget"
"""Name of the operator's file in the state folder."""

SECONDS_BETWEEN = 0.2
_SECONDS_GRANT = 1.0
_BYTES_MAX = 64


def told(path: Path) -> int:
    """Give the bytes that the operator's file allows; 0 where there is none, or nothing that can be read."""
    try:
        return said(path)
    except ConfigError:
        return 0


def said(path: Path) -> int:
    """Give the bytes that the operator's file allows; 0 where there is none, or it says 0, which is no limit.

    Raises:
        ConfigError: It says something else.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe that nobody writes to holds nobody up
    except OSError:
        return 0
    try:
        text = os.read(file, _BYTES_MAX)
    except OSError:
        return 0
    finally:
        os.close(file)
    return amount(text.decode("ascii", "replace"), FILE)


class Grant:
    """What a new order may take: the least of the configuration's limit, the operator's file, and what the machine has."""

    __slots__ = ("_configured", "_due", "_file", "_found", "_reserve", "_root", "_shared", "_told")

    def __init__(
        self, configured: int, reserve: int, file: Path, root: Path = probe.SYSTEM, *, shared: bool = True
    ) -> None:
        """Look at the file for the first time.

        Args:
            configured: The configuration's limit; 0 for none.
            reserve: Bytes that must stay available to the rest of the machine.
            file: The operator's.
            root: Of /proc and /sys.
            shared: Whether workers are in this process's control group; those behind a socket have one of their own.
        """
        self._configured = configured
        self._reserve = reserve
        self._file = file
        self._root = root
        self._shared = shared
        self._told = told(file)
        self._due = 0.0
        self._found: dict[str, int] = {}

    def now(self, bytes_coming: int, engine: str = "") -> int:
        """Give the bytes above a worker's base, as of this second; 0 when nothing bounds them.

        Args:
            bytes_coming: What the worker itself will take before an order's own begins; below 0 for what it will give back.
            engine: The engine that this is asked for: each has a base of its own.
        """
        now = time.monotonic()
        if now >= self._due:
            self._found.clear()
            self._due = now + _SECONDS_GRANT
        if engine not in self._found:
            limits = [limit for limit in (self._configured, told(self._file)) if limit]
            most, where = min(limits, default=0), self._root
            found = probe.budget(most, self._reserve, where, coming=bytes_coming, shared=self._shared)
            self._found[engine] = found or int(probe.available(self._root) > 0)
        return self._found[engine]

    def changed(self) -> bool:
        """Tell whether the operator has said something else since this was last asked; what was found before is forgotten."""
        known, self._told = self._told, told(self._file)
        if known == self._told:
            return False
        self._due = 0.0
        return True


def grant_of(config: Config) -> Grant:
    """Give what a configuration's workers may take."""
    memory = config.bytes_budget, config.bytes_reserve, config.budget_file
    return Grant(*memory, shared=not config.worker.socket)


class Limit:
    """Looks up what the order in hand may take: before its first batch, and then five times a second at most."""

    __slots__ = ("_due", "_file", "_found", "_gauge", "_reserve", "_root")

    def __init__(self, file: Path | None, reserve: int, gauge: Gauge, root: Path = probe.SYSTEM) -> None:
        """Look nothing up yet.

        Args:
            file: The operator's; None for none.
            reserve: Bytes that must stay available to the rest of the machine; 0 not to look.
            gauge: Knows the base of this process.
            root: Of /proc and /sys.
        """
        self._file = file
        self._reserve = reserve
        self._gauge = gauge
        self._root = root
        self._due = 0.0
        self._found = 0

    def __call__(self, done: float = 0.0) -> int:
        """Give bytes above the worker's base; 0 for what was granted. Cost: about 150 us, five times a second."""
        now = time.monotonic()
        if not done or now >= self._due:  # what was found for the order before says nothing of one that begins
            self._due = now + SECONDS_BETWEEN
            rooms = self._operators(), self._machines(), self._groups()
            self._found = min((room for room in rooms if room), default=0)
        return self._found

    def _operators(self) -> int:
        return told(self._file) if self._file is not None else 0

    def _machines(self) -> int:
        free = probe.available(self._root) if self._reserve else 0
        if not free or 2 * free >= self._reserve:
            return 0
        return max(1, self._held() + free - self._reserve)

    def _groups(self) -> int:
        room = probe.group_room(self._root) if self._reserve else None
        return 0 if room is None else max(1, self._held() + room)

    def _held(self) -> int:
        return probe.resident(os.getpid(), self._root) - self._gauge.bytes_base
