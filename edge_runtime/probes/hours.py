"""``hours``: when training may run, by this device's own clock: ``["22:00-06:00", "12-13"]``."""

from __future__ import annotations

import re
from collections.abc import Sequence

from edge_runtime.config import ConditionsConfig
from edge_runtime.probes import Reading
from edge_runtime.probes.machine import Machine
from wire.errors import ConfigError
from wire.schema import shown

_SPAN = re.compile(r"(\d{1,2})(?::(\d{2}))?-(\d{1,2})(?::(\d{2}))?", re.ASCII)
_DAY = 24 * 60
_HOUR = 60
_YEAR_MIN = 2025
"""A clock before this program was written is wrong: boards without a battery start in 1970."""


def look(machine: Machine, wanted: ConditionsConfig) -> Reading:
    """See what time it is."""
    now = machine.now()
    if now.tm_year < _YEAR_MIN:
        return Reading("unknown", f"this device's clock is wrong: it says {now.tm_year}")
    minute = now.tm_hour * _HOUR + now.tm_min
    inside = any(_within(minute, first, last) for first, last in spans(wanted.hours))
    said = f"it is {now.tm_hour:02}:{now.tm_min:02}, wanted: {', '.join(wanted.hours)}"
    return Reading("holds" if inside else "fails", said)


def spans(hours: Sequence[str]) -> list[tuple[int, int]]:
    """Read spans as minutes of the day, the last one outside; a span may go over midnight.

    Raises:
        ConfigError: One of them is no span.
    """
    found = []
    for text in hours:
        match = _SPAN.fullmatch(text.replace(" ", ""))
        first, last = (-1, -1)
        if match is not None:
            first = int(match[1]) * _HOUR + int(match[2] or 0)
            last = int(match[3]) * _HOUR + int(match[4] or 0)
            wrong_minutes = max(int(match[2] or 0), int(match[4] or 0)) >= _HOUR
            first = -1 if wrong_minutes else first
        if not 0 <= first < _DAY or not 0 <= last <= _DAY or first == last:
            raise ConfigError(f'conditions.hours: {shown(text)} is no span of the day; write for example "22:00-06:00"')
        found.append((first, last))
    return found


def _within(minute: int, first: int, last: int) -> bool:
    return first <= minute < last if first < last else minute >= first or minute < last
