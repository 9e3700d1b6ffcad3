"""The worker's door: two byte streams, and how files get through them.

A child of the agent has pipes, is the same user, and opens the files that a job names. A worker that a service manager
starts for each connection to a socket (`systemd/edge-trainer@.service`) may open no file of the agent's: there a job's
files travel with it as open descriptors, to be read or to be written, and nothing else of the agent's can be reached.
Nothing is copied. The frames are the same in both (`wire.job`).
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import stat
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, cast

from edge_runtime import exits
from wire.child import Ended, Said
from wire.errors import Malformed, PeerError, StoreError, WorkerLost
from wire.job import Done, Job, Ready, read_frame, write_frame

FILES_MAX = 72
"""Descriptors beside one job: 64 shells, a model, masks, the state, two to be written; the kernel takes 253."""
UNSEEN = -9
"""Exit code of a worker whose end cannot be seen: one that says no word was killed, and mostly because memory ran out."""
_SECONDS_SEND = 10
_TIME = "ll" if socket.SO_SNDTIMEO == 21 else "qq"
"""32-bit systems with 64-bit times (Debian 13's armhf) have another number for the option, and another form."""
_SECONDS_BETWEEN = 0.01
"""Between two frames of a worker behind a socket: a stranger that talks without end must not fill the agent's memory."""
_ANSWERS = ("update", "keep")
_HUNG_UP = "it hung up without a word (journalctl -u 'edge-trainer@*' says why)"


class Visit:
    """The agent's end: one connection to the socket of a trainer's unit, and with it one worker. Has `Child`'s face.

    The agent's files are made readable to those who hold a descriptor; their folder must be closed to others.

    Attributes:
        name: For its events.
        pid: No process id, those of others are not to be seen: a number below 0 that no other visit has.
        bytes_held: What the worker says that it holds; 0 before its first word.
    """

    def __init__(self, name: str, path: str, post: Callable[[Said | Ended], None]) -> None:
        """Connect; a failure is an event like any other end."""
        self.name = name
        self.pid = -time.monotonic_ns()
        self.bytes_held = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Not settimeout, which would be the feeder's as well: both use one connection.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack(_TIME, _SECONDS_SEND, 0))
        try:
            self._socket.connect(path)
        except OSError as error:
            problem = (
                f"{path}: {error.strerror or error}; is edge-trainer.socket started, and may this user write to it?"
            )
            post(Ended(name, self.pid, UNSEEN, problem))
            return
        stream = self._socket.dup()
        threading.Thread(target=self._feed, args=(stream, post), name=f"feed-{name}", daemon=True).start()

    def send(self, job: Job) -> None:
        """Hand a job and its files over.

        Raises:
            WorkerLost: It no longer reads.
            StoreError: A file cannot be opened.
        """
        sealed, files = seal(job)
        try:
            write_frame(cast("IO[bytes]", _Outlet(self._socket, files)), sealed)
        except OSError as error:
            raise WorkerLost(f"{self.name} no longer reads: {error}") from None
        finally:
            for file in files:
                os.close(file)

    def kill(self) -> None:
        """Hang up: the worker ends itself when it sees that, whatever it is doing."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Hang up and forget it; there is nothing to reap."""
        self.kill()
        self._socket.close()

    def _feed(self, stream: socket.socket, post: Callable[[Said | Ended], None]) -> None:
        problem = _HUNG_UP
        try:
            with stream, stream.makefile("rb") as frames:
                while (frame := read_frame(frames)) is not None:
                    if isinstance(frame, Ready):
                        self.bytes_held = frame.bytes_base
                    elif isinstance(frame, Done):
                        self.bytes_held = max(self.bytes_held, frame.usage.bytes_base)
                    post(Said(self.name, self.pid, frame))
                    time.sleep(_SECONDS_BETWEEN)
        except (PeerError, OSError) as error:
            problem = str(error)
            self.kill()
        post(Ended(self.name, self.pid, UNSEEN, problem))


def seal(job: Job) -> tuple[Job, list[int]]:
    """Open a job's files; gives the job with places in place of names, and the descriptors, which are the caller's to close.

    What the worker is to write is made here, empty, since a worker cannot make files in the agent's folder.

    Raises:
        StoreError: A file cannot be opened.
    """
    files: list[int] = []
    out = Path(job.out)
    try:
        for path in (job.spec, job.masks, job.keep, *job.shells):
            if path:
                file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                files.append(file)
                os.fchmod(file, stat.S_IMODE(os.fstat(file).st_mode) | 0o444)
        for end in _ANSWERS:
            path = str(out / f"{job.order.id}.{end}")
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            files.append(file)
            os.fchmod(file, 0o622)
    except OSError as error:
        for file in files:
            os.close(file)
        raise StoreError(f"{error.filename}: {error.strerror}") from error
    held = [bool(path) for path in (job.spec, job.masks, job.keep)]
    places = iter(range(len(files)))
    spec, masks, keep = (str(next(places)) if there else "" for there in held)
    shells = tuple(str(next(places)) for _ in job.shells)
    return replace(job, spec=spec, masks=masks, keep=keep, shells=shells, out=str(next(places))), files


def landed(done: Done, job: Job) -> Done:
    """Name the files that a worker behind a socket has written: they are where we made them, whatever it calls them."""
    update, keep = (str(Path(job.out) / f"{job.order.id}.{end}") for end in _ANSWERS)
    return replace(done, update=update if done.update else "", keep=keep if done.keep else "")


class _Outlet:
    """As much of a stream as `write_frame` takes; the files go with the first byte."""

    def __init__(self, door: socket.socket, files: list[int]) -> None:
        self._door = door
        self._files = list(files)

    def write(self, data: memoryview) -> int:
        files, self._files = self._files, []
        return socket.send_fds(self._door, [data], files) if files else self._door.send(data)

    def flush(self) -> None:
        """Nothing is held back."""


class Pipe:
    """The worker's end where the agent is its parent: a job's files are the agent's own."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def take(self) -> Job | None:
        """Wait for the next job; None at the end.

        Raises:
            Malformed: Something else came.
        """
        return _job(read_frame(self._stream))


class Reception:
    """The worker's end of a connection: a job's files come as descriptors and are opened again by their numbers.

    A thread sleeps until the agent hangs up, and then ends this process in the middle of whatever it does.
    """

    def __init__(self, door: socket.socket) -> None:
        self._door = door
        self._files: list[int] = []
        self._folder = Path(tempfile.mkdtemp(prefix="job-"))
        threading.Thread(target=_leave_with, args=(door, self._folder), name="hang-up", daemon=True).start()

    def take(self) -> Job | None:
        """Wait for the next job; None at the end. What the last one brought is closed.

        Raises:
            Malformed: Something else came, or its files did not.
        """
        self._close()
        job = _job(read_frame(cast("IO[bytes]", self)))
        if job is not None:
            return unseal(job, self._files, self._folder)
        shutil.rmtree(self._folder, ignore_errors=True)  # the thread does so as well
        return None

    def read(self, length: int) -> bytes:
        """Receive at most so many bytes, and whatever files come with them.

        Raises:
            Malformed: More files than a job has.
        """
        data, files, flags, _ = socket.recv_fds(self._door, length, FILES_MAX)
        self._files += files
        if flags & socket.MSG_CTRUNC or len(self._files) > FILES_MAX:
            raise Malformed(f"more than {FILES_MAX} files with one job")
        return data

    def _close(self) -> None:
        while self._files:
            os.close(self._files.pop())
        for path in self._folder.glob("*"):
            path.unlink(missing_ok=True)


def unseal(job: Job, files: list[int], folder: Path) -> Job:
    """Name a job's files as this process sees them.

    Args:
        job: With places in place of names.
        files: Descriptors by place.
        folder: An empty one of this process: the files to be written are links in it.

    Raises:
        Malformed: There is no file in such a place.
    """

    def number(place: str) -> int:
        return int(place) if place.isascii() and place.isdecimal() and len(place) <= 2 else len(files)

    def named(place: str) -> str:
        if not place:
            return ""
        if number(place) >= len(files):
            raise Malformed(f"a job without its files: it names place {place!r} of {len(files)}")
        return f"/proc/self/fd/{files[number(place)]}"

    for place, end in enumerate(_ANSWERS, number(job.out)):
        (folder / f"{job.order.id}.{end}").symlink_to(named(str(place)))
    shells = tuple(named(place) for place in job.shells)
    return replace(
        job, spec=named(job.spec), masks=named(job.masks), keep=named(job.keep), shells=shells, out=str(folder)
    )


def entrance(number: int = 0) -> Pipe | Reception:
    """Give the worker's end of the door that this process was started with.

    Args:
        number: Descriptor: standard input is a pipe for a child, the connection for a unit. Taken over as a copy.
    """
    copy = os.dup(number)
    if stat.S_ISSOCK(os.fstat(copy).st_mode):
        return Reception(socket.socket(fileno=copy))
    return Pipe(os.fdopen(copy, "rb"))


def say(agent: IO[bytes], message: Any) -> None:
    """Write one frame to the agent. One that has hung up is no failure: nobody waits for this process any more, so it ends."""
    try:
        write_frame(agent, message)
    except (BrokenPipeError, ConnectionResetError):
        raise SystemExit(exits.WORKER_OK) from None


def _job(frame: Any) -> Job | None:
    if frame is None or isinstance(frame, Job):
        return frame
    raise Malformed(f"a worker was sent a {type(frame).__name__}")


def _leave_with(door: socket.socket, folder: Path) -> None:
    watch = select.poll()
    watch.register(door, select.POLLRDHUP)
    watch.poll()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)
