"""What systemd does for a socket with Accept=yes and StandardInput=socket, without systemd: one process per connection.

Run as a module this file is a second launcher, in which the worker is another user without a network and behind the units'
walls (where this one is root), and which can hang up on connections as systemd does while too many instances are about.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Self

from edge_runtime.config import load
from edge_runtime.service.placed import place
from edge_runtime.service.trial import enclosed
from edge_runtime.service.units import shown, survey

ROOT = Path(__file__).parents[2]


class Unit:
    """A socket, and a worker for each connection to it."""

    def __init__(self, path: Path, config: Path, *, stranger: bool = False, refuse: tuple[int, ...] = ()) -> None:
        """`stranger`: the worker is another user; else systemd's own emulation starts it. `refuse`: on which to hang up."""
        self.path = path
        self._argv = ["systemd-socket-activate", "--listen", str(path), "--accept", "--inetd", "--setenv=PATH"]
        self._argv.append(f"--setenv=TMPDIR={path.parent}")  # a unit has a /tmp of its own
        # The same kernels as the child that its updates are compared with has: of their bits, the last differ.
        self._argv += [f"--setenv={name}" for name in os.environ if name.startswith("OPENBLAS_")]
        self._argv += [sys.executable, "-m", "edge_runtime.trainer", "--config", str(config)]
        if stranger or refuse:
            self._argv = [sys.executable, "-m", "tests.support.unit", str(path), str(config), *map(str, refuse)]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._argv, cwd=ROOT)
        until = time.monotonic() + 60
        while not self.path.exists():
            assert self._process.poll() is None, self._argv
            assert time.monotonic() < until, "no socket"
            time.sleep(0.02)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        for pid in self.workers():
            os.kill(pid, signal.SIGKILL)
        self._process.terminate()
        self._process.wait()

    def workers(self) -> list[int]:
        """The pids of its children that live."""
        assert self._process is not None
        pid = self._process.pid
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(child) for child in found if Path(f"/proc/{child}/cmdline").read_bytes()]


def _walled(config: Path, room: Path) -> list[str]:
    """The trainer's command line: where this is root, as another user behind the units' walls and without a network."""
    placed = place(load(config))
    site = survey(placed)
    command = [site.interpreter, "-m", "edge_runtime.trainer", "--config", str(config)]
    if os.geteuid() != 0:
        return command
    (room / "holds").mkdir()
    paths = [*shown(placed, site, data=True), str(config)]
    unshare, *rest = enclosed(command, paths, room)
    return [unshare, "--net", *rest]


def main(path: str, config: Path, refuse: set[int]) -> None:
    """Listen for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    inside = "/run" if os.geteuid() == 0 else None
    room = tempfile.mkdtemp(dir=inside, prefix="door-")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    try:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        argv = _walled(config, Path(room))
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as door:
            door.bind(path)
            Path(path).chmod(0o666)
            door.listen()
            for number in itertools.count(1):
                connection, _ = door.accept()
                if number not in refuse:
                    with Path(path).with_name("journal").open("ab") as journal:
                        subprocess.Popen(argv, stdin=connection, stdout=connection, stderr=journal, env=env, cwd=room)
                connection.close()
    finally:
        shutil.rmtree(room)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), set(map(int, sys.argv[3:])))
