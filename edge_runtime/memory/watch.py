"""Memory pressure on the whole machine, looked at while a worker trains: when it must end so that the machine lives.

An order gives memory back by itself, between two batches (`edge_runtime.memory.limit`). This is for what it does not: a step
that takes minutes, or a machine that pages all the time. Two things count. Less than a quarter of the reserve is available,
twice in a row. Or the kernel says that all tasks that could run waited for memory most of the time (PSI,
``/proc/pressure/memory``); on kernels without it that is not looked at.
"""

from __future__ import annotations

from pathlib import Path

from edge_runtime.memory import probe

SECONDS_BETWEEN = 0.5
_SECONDS_STALLED = 2.0
_STALLED = 0.4
"""Part of those seconds in which nothing got on for want of memory; a machine in order has none."""
_TIMES = 2
_MICRO = 1e-6
NEVER = float("inf")


class Watch:
    """Looks while there is work, twice a second, and costs nothing at other times.

    Attributes:
        due: When `tick` wants to be called.
    """

    __slots__ = ("_low", "_reserve", "_root", "_since", "_stalled", "due")

    def __init__(self, reserve: int, root: Path = probe.SYSTEM) -> None:
        """Look nowhere yet.

        Args:
            reserve: Bytes that must stay available to the rest of the machine; 0 not to look at all.
            root: Of /proc.
        """
        self.due = NEVER
        self._reserve = reserve
        self._root = root
        self._low = 0
        self._since = 0.0
        self._stalled: float | None = None

    def tick(self, now: float, *, busy: bool) -> str:
        """Look, when it is time to.

        Returns:
            Why the worker must end; empty when it need not. Cost: two small files.
        """
        if not busy or not self._reserve:
            self.due, self._low = NEVER, 0
            return ""
        if self.due == NEVER:
            self._since, self._stalled = now, stalled(self._root)
            self.due = now + SECONDS_BETWEEN
            return ""
        if now < self.due:
            return ""
        self.due = now + SECONDS_BETWEEN
        return self._available() or self._pressure(now)

    def _available(self) -> str:
        free = probe.available(self._root)
        self._low = self._low + 1 if free and 4 * free < self._reserve else 0
        if self._low < _TIMES:
            return ""
        self._low = 0
        return f"the machine has only {free >> 20} MiB of memory left; the worker was ended"

    def _pressure(self, now: float) -> str:
        seconds = now - self._since
        if self._stalled is None or seconds < _SECONDS_STALLED:
            return ""
        before, self._since, self._stalled = self._stalled, now, stalled(self._root)
        share = (self._stalled - before) / seconds if self._stalled is not None else 0.0
        if share < _STALLED:
            return ""
        return f"the machine waited for memory {100 * min(share, 1.0):.0f} % of the time; the worker was ended"


def stalled(root: Path = probe.SYSTEM) -> float | None:
    """Give the seconds since the start in which all tasks that could run waited for memory; None where nobody counts them."""
    try:
        lines = (root / "proc/pressure/memory").read_text("ascii", "replace").splitlines()
        for line in lines:
            kind, *fields = line.split()
            if kind == "full":
                return _MICRO * int(dict(field.split("=", 1) for field in fields)["total"])
    except (OSError, ValueError, KeyError):  # psi=0 answers a read with an error
        return None
    return None
