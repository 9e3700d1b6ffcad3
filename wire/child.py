"""A child process that speaks job frames: orders into its stdin, answers out of its stdout.

The feeder thread does nothing but read frames and hand them to `post`, usually a link's own queue, so that the owner thread
sees a child's word as one more event. The child dies with its parent: it asks the kernel for that itself
(`die_with_parent`) and also ends when its stdin does.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from wire.errors import PeerError, WorkerLost
from wire.job import FRAME_BYTES, read_frame, write_frame

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Said:
    """A child sent a frame.

    Attributes:
        child: Name given to `Child`.
        pid: Of that very process, since a name may be used again.
        frame: What it said.
    """

    child: str
    pid: int
    frame: Any


@dataclass(frozen=True, slots=True)
class Ended:
    """A child is gone.

    Attributes:
        child: Name given to `Child`.
        pid: Of that very process.
        code: Exit code; negative for a signal.
        problem: What broke the stream, if anything did.
    """

    child: str
    pid: int
    code: int
    problem: str = ""


class Child:
    """One child process and its two streams. Cost: one thread that sleeps in read.

    Attributes:
        name: For its events.
        pid: Of its process.
        frozen: It stands still.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        post: Callable[[Said | Ended], None],
        *,
        log: IO[bytes] | None = None,
        env: Mapping[str, str] | None = None,
        also: tuple[type[Any], ...] = (),
        limit: int = FRAME_BYTES,
    ) -> None:
        """Start `python -m argv...` in the interpreter that runs this.

        Args:
            name: For its events.
            argv: Module and arguments.
            post: Takes its events, from the feeder thread.
            log: Takes its stderr; default: shared with this process.
            env: What to add to its environment.
            also: Dataclasses that it may send besides the frames of a worker.
            limit: Bytes that a frame may have, either way.
        """
        self.name = name
        self.frozen = False
        self._also = also
        self._limit = limit
        self._process = subprocess.Popen(
            [sys.executable, "-m", *argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, **env} if env else None,
        )
        self.pid = self._process.pid
        threading.Thread(target=self._feed, args=(post,), name=f"feed-{name}", daemon=True).start()

    def send(self, message: Any) -> None:
        """Write one frame to the child.

        Raises:
            WorkerLost: It no longer reads.
            TooLarge: The frame is longer than frames may be.
        """
        stdin = self._process.stdin
        if stdin is None or stdin.closed:
            raise WorkerLost(f"{self.name} is closed")
        try:
            write_frame(stdin, message, self._limit)
        except (OSError, ValueError) as error:
            raise WorkerLost(f"{self.name} no longer reads: {error}") from None

    def kill(self) -> None:
        """End it at once; `Ended` follows."""
        self._process.kill()

    def freeze(self) -> None:
        """Let it stand still where it is, with all that it holds; `thaw` or `kill` end that."""
        self._process.send_signal(signal.SIGSTOP)
        self.frozen = True

    def thaw(self) -> None:
        """Let it go on."""
        self._process.send_signal(signal.SIGCONT)
        self.frozen = False

    def let_go(self) -> None:
        """Forget it without waiting for its end, which comes when its input ends or after `kill`; the feeder sees to it."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def close(self, seconds: float = 2.0) -> None:
        """Let it end by itself, kill it if it does not, and reap it."""
        if self._process.stdin is not None:
            try:
                self._process.stdin.close()
            except OSError:
                self._process.kill()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _feed(self, post: Callable[[Said | Ended], None]) -> None:
        problem = ""
        stdout = self._process.stdout
        try:
            while stdout is not None:
                frame = read_frame(stdout, self._also, self._limit)
                if frame is None:
                    break
                post(Said(self.name, self.pid, frame))
        except (PeerError, OSError) as error:
            problem = str(error)
            self._process.kill()
        if stdout is not None:
            stdout.close()
        post(Ended(self.name, self.pid, self._process.wait(), problem))


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent ends; harmless where the kernel cannot.

    Args:
        parent: The parent's pid as it was at the start; if it is gone already, this process ends now.
    """
    if sys.platform.startswith(("linux", "android")):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def surroundings(threads: int = 1) -> dict[str, str]:
    """Give the environment variables to add: the libraries read their thread counts when they are loaded, not later."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return dict.fromkeys(names, str(threads))
