"""A command beside the agent: started, looked at, ended when it takes too long. Nobody ever waits for it.

Termux's commands talk to an app over a socket and hang for good when that app is not installed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Mapping

SECONDS_MAX = 5.0
_BYTES_MAX = 65_536  # what a pipe holds: a command that says more stands still until its time is over


class Command:
    """One command that prints a JSON object, asked again when its answer is old."""

    __slots__ = ("_answer", "_asked", "_path", "_process", "_since")

    def __init__(self, path: str) -> None:
        """Ask nothing yet."""
        self._path = path
        self._process: subprocess.Popen[bytes] | None = None
        self._since = 0.0
        self._asked = float("-inf")
        self._answer: Mapping[str, object] | None = None

    def look(self, now: float, seconds_fresh: float) -> Mapping[str, object] | None:
        """Give the latest answer; empty when the command failed, None when it has not answered yet.

        Args:
            now: On the monotonic clock.
            seconds_fresh: When the answer is older than that, it is asked for again; the old one stands until then.
        """
        if self._process is None and now >= self._asked + seconds_fresh:
            self._begin(now)
        if self._process is not None:
            self._end(self._process, now)
        return self._answer

    def close(self) -> None:
        """End it if it runs."""
        if self._process is not None:
            self._kill(self._process)
            self._process.wait()
            self._forget(self._process)

    def _begin(self, now: float) -> None:
        self._asked = self._since = now
        try:
            self._process = subprocess.Popen(
                [self._path],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError:
            self._answer = {}
            return
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)

    def _end(self, process: subprocess.Popen[bytes], now: float) -> None:
        code = process.poll()
        if code is None:
            if now >= self._since + SECONDS_MAX:
                self._answer = {}
                self._kill(process)
            return
        said = b""
        assert process.stdout is not None
        with contextlib.suppress(OSError):
            said = os.read(process.stdout.fileno(), _BYTES_MAX)
        if now < self._since + SECONDS_MAX:
            self._answer = _object(said) if code == 0 else {}
        self._forget(process)

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)  # a script's children too; the group is its own

    def _forget(self, process: subprocess.Popen[bytes]) -> None:
        if process.stdout is not None:
            process.stdout.close()
        self._process = None


def _object(said: bytes) -> Mapping[str, object]:
    try:
        found = json.loads(said)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
