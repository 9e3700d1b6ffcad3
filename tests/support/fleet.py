"""A real `coordinator start --listen` with keys, and devices that are enrolled at it for real."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from coordinator.keys import register
from coordinator.keys.access import KEYS, way_in
from coordinator.keys.command import invite
from coordinator.keys.register import Register
from edge_runtime.enrol import Enrolled, Wanted, enroll
from tests.support.mosquitto import wait_for, wait_until
from wire.invitation import Invitation
from wire.link import Address, Down, Up
from wire.link.mqtt import MqttLink


def free_pair() -> int:
    """A port that is free, and the one above it too."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port = int(one.getsockname()[1])
            try:
                two.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


def refused(address: Address, client: str = "x") -> str:
    """Why a broker does not let somebody in; fails when it does."""
    link = MqttLink(address, client, session_seconds=0, keepalive=10)
    link.start()
    try:
        return wait_for(link, Down).why
    finally:
        link.stop()


class Fleet:
    """One coordinator process with its broker; it waits for more devices than there are, unless `devices` says otherwise."""

    def __init__(self, root: Path, *, seconds: float = 3600.0, devices: int = 99, rounds: int = 3) -> None:
        self.root = root
        self.state = root / "coordinator"
        self.port = free_pair()
        self.process: subprocess.Popen[bytes] | None = None
        root.mkdir(parents=True, exist_ok=True)
        (root / "run.toml").write_text(
            f'algo = "fedavg"\nmodel = "linear"\nrounds = {rounds}\nfederation = "f"\nstate = "{self.state}"\n'
            f'[broker]\nlisten = "127.0.0.1:{self.port}"\nseconds_certificate = {seconds}\n[round]\ndevices = {devices}\n'
            f'keepalive = 20.0\n[recipe]\nrule = "still"\n'
        )

    @property
    def log(self) -> str:
        return (self.root / "log").read_text()

    @property
    def register(self) -> Register:
        found = register.load(self.state / KEYS)
        assert found is not None
        return found

    def start(self, *more: str) -> Self:
        argv = [sys.executable, "-m", "coordinator", "start", "--config", str(self.root / "run.toml"), *more]
        with (self.root / "log").open("ab") as log:
            began = log.tell()
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_until(lambda: "on a device:" in self.log[began:] or self.process.poll() is not None, 20)
        assert self.process.poll() is None, self.log
        return self

    def stop(self, number: int = signal.SIGTERM) -> None:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.process.wait(10)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop(signal.SIGKILL)

    def invite(self, name: str, seconds: float = 60.0) -> Invitation:
        return invite(self.state, name, seconds)[0]

    def enroll(self, name: str, invitation: Invitation | None = None) -> Enrolled:
        folder = self.root / name
        token = (invitation or self.invite(name)).encode()
        return enroll(Wanted(token, folder / "device.toml", folder / "state"))

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "coordinator", *words, "--state", str(self.state)]
        return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)

    def address(self, name: str, port: int = 0) -> Address:
        keys = self.root / name / "state" / "keys"
        return Address("127.0.0.1", port or self.port, True, "", "", str(keys / "ca.pem"), str(keys / "device.pem"))

    def cert(self, name: str) -> Path:
        return Path(self.address(name).cert)

    @contextmanager
    def linked(self, name: str, topics: list[str] | None = None, client: str = "x") -> Iterator[MqttLink]:
        """A client that holds a device's certificate."""
        with up(self.address(name), client, topics) as link:
            yield link

    @contextmanager
    def inside(self, topics: list[str] | None = None) -> Iterator[MqttLink]:
        """A client that may do what the coordinator may."""
        with up(Address.parse(way_in(self.state)), f"test-{os.getpid()}", topics) as link:
            yield link


@contextmanager
def up(address: Address, client: str, topics: list[str] | None = None) -> Iterator[MqttLink]:
    link = MqttLink(address, client, session_seconds=0, keepalive=10)
    try:
        link.subscribe(topics or [])
        link.start()
        wait_for(link, Up)
        yield link
    finally:
        link.stop()
