"""Every shell script of the repository is clean to shellcheck."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tests.house.walk import ROOT

_LEAVE = {".venv", "venv", "build", "dist", "node_modules"}
_KNOWN = {"check", "demo", ".ci/run", ".ci/environment", "edge_runtime/termux/finish.sh"}


def scripts() -> list[Path]:
    """Everything named .sh or begun as a script for sh, and what such scripts source."""
    found = [ROOT / ".ci/environment"]
    for folder, folders, names in os.walk(ROOT):
        inside = Path(folder).relative_to(ROOT)
        folders[:] = [name for name in folders if name not in _LEAVE and (name == ".ci" or not name.startswith("."))]
        found += [ROOT / inside / name for name in names if _is_shell(ROOT / inside / name)]
    return sorted(found)


def _is_shell(path: Path) -> bool:
    if path.suffix == ".sh":
        return True
    if path.suffix or not path.is_file():
        return False
    with path.open("rb") as file:
        first = file.readline(100)
    return first.startswith(b"#!") and first.rstrip().endswith((b"/sh", b"bash", b"dash"))


def test_every_script_is_found() -> None:
    assert {str(path.relative_to(ROOT)) for path in scripts()} >= _KNOWN


def test_shellcheck_finds_nothing() -> None:
    program = shutil.which("shellcheck")
    assert program is not None, "this test needs shellcheck: sudo apt-get install shellcheck"
    words = [program, "-s", "sh", *map(str, scripts())]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    bad = subprocess.run(
        [program, "-s", "sh", "-"], input="#!/bin/sh\necho $x\n", capture_output=True, text=True, check=False
    )
    assert bad.returncode == 1, "it does find something where there is something"
