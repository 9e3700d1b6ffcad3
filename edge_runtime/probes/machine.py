"""A machine as its probes see it: a tree of /proc and /sys, a few commands, and a clock. Everything read is bounded.

Files of other programs and drivers are strangers: one may be endless, a pipe, binary, or claim 10^99 degrees.
"""

from __future__ import annotations

import math
import os
import stat
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

from edge_runtime.probes.command import Command

BYTES_MAX = 4096
NAMES_MAX = 256
SECONDS_FRESH = 60.0


class Machine:
    """Where probes look.

    Attributes:
        android: Most of /proc and /sys is closed there; Termux has commands instead.
        threads_own: What our own threads are of the machine's load: no load of others.
        seconds_fresh: How old a command's answer may be.
    """

    __slots__ = ("_commands", "_path", "_root", "_texts", "android", "seconds_fresh", "threads_own")

    def __init__(self, root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> None:
        """Look nowhere yet.

        Args:
            root: Of /proc and /sys.
            environ: Where PATH leads to commands, and ANDROID_ROOT or Termux's PREFIX tell of a phone.
        """
        self._root = str(root)
        self._texts: dict[str, str] = {}
        self._path = environ.get("PATH", "")
        self._commands: dict[str, Command | None] = {}
        self.android = "ANDROID_ROOT" in environ or "com.termux" in environ.get("PREFIX", "")
        self.threads_own = 0.0
        self.seconds_fresh = SECONDS_FRESH

    def again(self) -> None:
        """Forget what was read: what comes now is one look, in which no file is read twice."""
        self._texts.clear()

    def text(self, path: str) -> str:
        """Give the beginning of a file, at most 4096 bytes; empty when it cannot be read or is no file."""
        if path not in self._texts:
            self._texts[path] = self._read(path)
        return self._texts[path]

    def _read(self, path: str) -> str:
        try:
            file = os.open(f"{self._root}/{path}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, ValueError):
            return ""
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                return ""
            return os.read(file, BYTES_MAX).decode("utf-8", "replace").strip()
        except OSError:  # a driver that has nothing to say right now
            return ""
        finally:
            os.close(file)

    def number(self, path: str) -> float | None:
        """Give a file's number; None when there is none."""
        return number(self.text(path))

    def names(self, folder: str) -> tuple[str, ...] | None:
        """Give a folder's entries in order, at most 256; none when it is not there, None when it is closed to us."""
        try:
            with os.scandir(f"{self._root}/{folder}") as entries:
                return tuple(sorted(entry.name for entry in islice(entries, NAMES_MAX)))
        except (FileNotFoundError, NotADirectoryError):
            return ()
        except OSError:
            return None

    def ask(self, name: str) -> Mapping[str, object] | None:
        """Ask a command for its JSON object, without waiting for it.

        Returns:
            The latest answer; empty when it failed; None when it has not answered yet. See `has` first.
        """
        if not self.has(name):
            return {}
        command = self._commands[name]
        assert command is not None
        return command.look(time.monotonic(), self.seconds_fresh)

    def has(self, name: str) -> bool:
        """Tell whether there is a command of this name."""
        if name not in self._commands:
            where = (Path(folder) / name for folder in self._path.split(os.pathsep) if folder)
            found = next((path for path in where if path.is_file() and os.access(path, os.X_OK)), None)
            self._commands[name] = None if found is None else Command(str(found))
        return self._commands[name] is not None

    def now(self) -> time.struct_time:
        """Give this device's local time."""
        return time.localtime()

    def close(self) -> None:
        """End the commands that still run."""
        for command in self._commands.values():
            if command is not None:
                command.close()


def number(value: object) -> float | None:
    """Read a finite number out of whatever it is; None when it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        found = float(value[:64] if isinstance(value, str) else value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None
