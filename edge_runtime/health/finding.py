"""What a question gives, and where it looks."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edge_runtime.memory import probe

_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One question's answer.

    Attributes:
        what: The question.
        fine: Whether this machine can take part as far as this goes.
        found: What was seen.
        advice: What to do; may also stand behind a fine one.
    """

    what: str
    fine: bool
    found: str
    advice: str = ""


def android() -> bool:
    """Tell whether this is Android: Python says so itself from 3.13 on, and Termux's shell does before that."""
    return sys.platform == "android" or "com.termux" in os.environ.get("PREFIX", "")


@dataclass(frozen=True, slots=True)
class Machine:
    """Where questions look. Tests hand in a folder, a stubbed interpreter, another processor.

    Attributes:
        root: Of /proc, /sys and /dev.
        python: The interpreter that the engine is tried with.
        android: Whether this is a phone.
        processor: As `platform.machine` names it.
        bytes_page: Size of a page of memory.
        is_64: Whether Python is a 64-bit program; Raspberry Pi OS with 32 bits runs on a kernel that says aarch64.
    """

    root: Path = probe.SYSTEM
    python: str = sys.executable
    android: bool = field(default_factory=android)
    processor: str = field(default_factory=platform.machine)
    bytes_page: int = field(default_factory=lambda: os.sysconf("SC_PAGE_SIZE"))
    is_64: bool = sys.maxsize > 1 << 32

    @property
    def is_pi(self) -> bool:
        """Whether this is a Raspberry Pi."""
        return "Raspberry Pi" in self.text("proc/device-tree/model")

    def text(self, path: str) -> str:
        """Read a small file of the kernel's; empty if it is not there or not for us."""
        with contextlib.suppress(OSError):
            return (self.root / path).read_text("ascii", "replace")[:65536]
        return ""


HERE = Machine()
"""This machine."""


def told(words: Sequence[str]) -> str | None:
    """Give what a program prints; None if it is not there, fails or takes long: a phone's helpers wait for an app for ever.

    Its own children (Termux's helpers are scripts) end with it.
    """
    try:
        child = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
    except OSError:
        return None
    with child:
        try:
            text, _ = child.communicate(timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            return None
    return text.decode("utf-8", "replace") if child.returncode == 0 else None
