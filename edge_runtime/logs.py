"""What the agent says on stderr: one line for each event, in a form that programs read, and no floods.

Plain lines on a terminal; ``logfmt`` elsewhere (``ts=... level=warning msg="no broker: ..." device=kitchen-pi``), or one JSON
object a line. A call's `extra={"fields": {...}}` adds keys.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import IO, Literal, cast

from wire.errors import one_line

Form = Literal["auto", "plain", "logfmt", "json"]

SECONDS_BETWEEN = 60.0
BURST = 10
"""Lines of one kind that may differ within `SECONDS_BETWEEN`; of equal ones there is one."""
_KINDS_MAX = 256
_TEXT_MAX = 2000
_NEVER = float("-inf")
_BARE = re.compile(r"[A-Za-z0-9_.:/+@-]+")


def begin(form: Form, device: str, *, quiet: bool = False, stream: IO[str] | None = None) -> None:
    """Let all loggers of this process write to stderr.

    Args:
        form: ``auto`` is ``plain`` on a terminal and ``logfmt`` elsewhere.
        device: Named on every line.
        quiet: Warnings and worse only.
        stream: Instead of stderr.
    """
    where = stream or sys.stderr
    chosen = ("plain" if where.isatty() else "logfmt") if form == "auto" else form
    handler = logging.StreamHandler(where)
    handler.setFormatter(cast("logging.Formatter", Lines(chosen, device)))
    handler.addFilter(Flood().filter)
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING if quiet else logging.INFO)


class Flood:
    """Lets one warning of a kind through a minute, and up to ten that differ; the next one says how many were held back."""

    __slots__ = ("_clock", "_kinds", "_lines")

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Nothing was said yet."""
        self._clock = clock
        self._kinds: dict[tuple[str, int, str], tuple[float, int, int]] = {}
        self._lines: dict[tuple[str, int, int], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether this line may pass. Memory: 256 kinds and lines at most, however hostile what is logged."""
        if record.levelno < logging.WARNING:
            return True
        now = self._clock()
        for known in (self._kinds, self._lines):
            if len(known) >= _KINDS_MAX:
                known.clear()
        kind = (record.name, record.levelno, str(record.msg)[:_TEXT_MAX])
        line = (record.name, record.levelno, hash(record.getMessage()))
        since, passed, held = self._kinds.get(kind, (now, 0, 0))
        if now - since >= SECONDS_BETWEEN:
            since, passed = now, 0
        if passed >= BURST or now - self._lines.get(line, _NEVER) < SECONDS_BETWEEN:
            self._kinds[kind] = since, passed, held + 1
            return False
        self._kinds[kind] = since, passed + 1, 0
        self._lines[line] = now
        record.held_back = held
        return True


class Lines:
    """Makes a line of a record."""

    __slots__ = ("_device", "_form")

    def __init__(self, form: str, device: str) -> None:
        """Write ``plain``, ``logfmt`` or ``json``."""
        self._form = form
        self._device = device

    def format(self, record: logging.LogRecord) -> str:
        """Give one line, whatever a stranger's text in it: no newline, no control character."""
        said: dict[str, object] = {
            "ts": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "msg": record.getMessage()[:_TEXT_MAX],
            "device": self._device,
        }
        fields = getattr(record, "fields", {})
        said |= {str(key): value for key, value in fields.items()} if isinstance(fields, Mapping) else {}
        if held := getattr(record, "held_back", 0):
            said["held_back"] = held
        if record.exc_info and record.exc_info[0] is not None:
            said["error"] = record.exc_info[0].__name__
        if self._form == "json":
            return json.dumps(said)
        if self._form == "plain":
            more = f" (and {held} more that were held back)" if held else ""
            return f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {one_line(said['msg'])}{more}"
        return " ".join(f"{key}={_shown(value)}" for key, value in said.items())


def _shown(value: object) -> str:
    text = str(value)
    return text if _BARE.fullmatch(text) else json.dumps(text)
