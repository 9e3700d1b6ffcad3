"""Commands in a process that files' modes hold for, also where the tests are root's."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

_DROP = 24  # PR_CAPBSET_DROP
_PASSING_MODES = (1, 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a module with its words; it may read and write what the modes let the owner of its files."""
    return subprocess.run(
        [sys.executable, "-m", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=_let_go,
    )


def _let_go() -> None:
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        for capability in _PASSING_MODES:
            if libc.prctl(_DROP, capability, 0, 0, 0):
                raise OSError(ctypes.get_errno(), "prctl")
