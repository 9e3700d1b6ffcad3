"""A real mosquitto on a free port that can be killed and started again, and a way to wait on a link."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

from coordinator import broker
from wire.link import Address, Farewell, Link, Published, Up, Will
from wire.link.mqtt import MqttLink

T = TypeVar("T")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Mosquitto:
    """The same configuration as `coordinator start` writes; it ends with the process that started it."""

    def __init__(self, folder: Path, access: str = "allow_anonymous true", port: int | None = None) -> None:
        self.folder = folder
        self.port = port or free_port()
        self.access = access
        self.process: subprocess.Popen[bytes] | None = None
        program = broker.find_mosquitto()
        assert program is not None, "these tests need mosquitto: " + broker.INSTALL
        self._program = program

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.process = broker._run_mosquitto(self._program, self.folder, "127.0.0.1", self.port, self.access)
        assert self.process is not None, broker._last_words(self.folder)
        return self

    def kill(self) -> None:
        """End it without a word: what it only had in memory is lost."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """End it in peace: it writes its store."""
        if self.process is not None:
            broker._end(self.process)

    def pause(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def memory(self, key: str = "VmHWM") -> int:
        """Bytes, as the kernel counts them."""
        return proc_memory(self.pid, key)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def proc_memory(pid: int, key: str = "VmHWM") -> int:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {key} of {pid}")


def wait_for(link: Link, kind: type[T], seconds: float = 10.0, *, where: Callable[[T], bool] = lambda _: True) -> T:
    """Take events until one is of this kind; the others are dropped (and deliveries among them are done)."""
    seen: list[Any] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        event: Any = link.next(min(0.2, max(0.0, until - time.monotonic())))
        if event is None:
            continue
        if hasattr(event, "token"):
            link.done(event)
        if isinstance(event, kind) and where(event):
            return event
        seen.append(event)
    raise AssertionError(f"no {kind.__name__} within {seconds} s; saw {str(seen)[:2000]}")


def quiet_for(link: Link, kind: type[T], seconds: float) -> list[T]:
    """Take events for a while and give those of this kind."""
    found = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        event: Any = link.next(max(0.0, until - time.monotonic()))
        if isinstance(event, kind):
            found.append(event)
    return found


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"not within {seconds} s"
        time.sleep(0.01)


@contextmanager
def connected(
    broker: Mosquitto,
    name: str,
    topics: list[str] | None = None,
    *,
    will: Will | None = None,
    farewell: Farewell | None = None,
    keepalive: float = 10,
) -> Iterator[MqttLink]:
    link = MqttLink(Address.parse(broker.url), name, session_seconds=60, keepalive=keepalive, will=will)
    try:
        link.subscribe(topics or [])
        link.start()
        wait_for(link, Up)
        link.publish("ready", b"")  # one connection is served in order: with this receipt the subscriptions stand
        early: list[Any] = []
        while not isinstance(event := link.next(5.0), Published):
            early.append(event)
        for event in early:
            link.post(event)
        link.bytes_sent = 0
        yield link
    finally:
        link.stop(farewell)
