"""A real agent with a certificate at a real coordinator: small, without what makes keys, renewed before its time is over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.export import standing_of
from edge_runtime.identity import read
from tests.support.fleet import Fleet
from tests.support.messages import a_reply
from tests.support.mosquitto import proc_memory, quiet_for, wait_for, wait_until
from wire import codec, topics
from wire.link import Message
from wire.messages import Ack, Presence

MIB = 1 << 20
SPY = """
import json, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: open(sys.argv[1], "w").write(json.dumps(sorted(sys.modules))))
from edge_runtime.cli import main
sys.exit(main(["run", "--config", sys.argv[2]]))
"""
"""`edge-runtime run` that writes down what it has loaded, when it is asked."""


class Running:
    """An agent as a process."""

    def __init__(self, fleet: Fleet, name: str, env: dict[str, str] | None = None) -> None:
        self.root = fleet.root / name
        self.modules = self.root / "modules"
        with (self.root / "log").open("ab") as log:
            argv = [sys.executable, "-c", SPY, str(self.modules), str(self.root / "device.toml")]
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)

    @property
    def log(self) -> str:
        return (self.root / "log").read_text()

    def private(self) -> int:
        """Bytes that only this process has, as the kernel counts them."""
        lines = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) * 1024

    def loaded(self) -> set[str]:
        """The modules of the process as it is now."""
        self.modules.unlink(missing_ok=True)
        self.process.send_signal(signal.SIGUSR1)
        wait_until(lambda: self.modules.exists() and self.modules.read_text().endswith("]"))
        return set(json.loads(self.modules.read_text()))

    def children(self) -> str:
        return Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()

    def said(self, text: str, count: int = 1, seconds: float = 30.0) -> None:
        until = time.monotonic() + seconds
        while self.log.count(text) < count:
            assert time.monotonic() < until, f"not within {seconds} s: {count} x {text!r}:\n{self.log}"
            time.sleep(0.02)


@contextmanager
def agent(fleet: Fleet, name: str, env: dict[str, str] | None = None) -> Iterator[Running]:
    root = fleet.root / name
    if not (root / "data.npz").exists():
        if not (root / "device.toml").exists():
            fleet.enroll(name)
        np.savez(root / "data.npz", x=np.zeros((40, 64), np.float32), y=np.arange(40) % 10, classes=10)
        text = (root / "device.toml").read_text()
        mine = f'source = "npz"\npath = "{root / "data.npz"}"'
        text = "\n".join(mine if line.startswith("source =") else line for line in text.splitlines())
        (root / "device.toml").write_text(text + '\n[worker]\nmode = "spawn"\n')
    running = Running(fleet, name, env)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Fleet]]:
    made = []

    def start(**settings: Any) -> Fleet:
        made.append(Fleet(tmp_path / "fleet", **settings).start())
        return made[-1]

    yield start
    for fleet in made:
        fleet.stop(signal.SIGKILL)


def test_an_idle_agent_over_tls_loads_nothing_that_makes_keys(make: Callable[..., Fleet], tmp_path: Path) -> None:
    fleet = make()
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path / "compiled")}
    with agent(fleet, "pi", env) as first:
        first.said("connected to mqtts://")
    with agent(fleet, "pi", env) as running:
        running.said("connected to mqtts://", 2)
        wait_until(lambda: running.children() == "", 20)
        loaded = running.loaded()
        assert {"ssl", "edge_runtime.agent", "edge_runtime.renewal"} <= loaded
        heavy = ("cryptography", "numpy", "torch", "psutil", "sqlite3", "click", "asyncio", "cffi", "_cffi_backend")
        assert {name for name in loaded if name.partition(".")[0] in heavy} == set()
        assert "edge_runtime.csr" not in loaded
        maps = Path(f"/proc/{running.process.pid}/maps").read_text()
        assert "cryptography" not in maps
        # It gives its code back when it has said that it is here, which is after its worker has ended.
        wait_until(lambda: proc_memory(running.process.pid, "VmRSS") <= 24 * MIB, 10)
        rss, private = proc_memory(running.process.pid, "VmRSS"), running.private()
        assert rss <= 24 * MIB
        assert private <= 14 * MIB


def test_a_certificate_is_renewed_before_it_ends_and_the_agent_goes_on_with_it(make: Callable[..., Fleet]) -> None:
    fleet = make(seconds=6.0)
    with agent(fleet, "pi") as running:
        path = fleet.root / "pi" / "state" / "keys" / "device.pem"
        running.said("connected to mqtts://")
        first, began = path.read_bytes(), read(path)
        assert began is not None
        running.said("the certificate is renewed", 1)
        assert path.read_bytes() != first
        assert path.stat().st_mode & 0o177 == 0
        running.said("connected to mqtts://", 2)  # with the new one
        assert time.time() < began.ends, "in time"
        running.said("the certificate is renewed", 2)
        wait_until(lambda: time.time() > began.ends, 20)
        connected = running.log.count("connected to mqtts://")
        fleet.stop(signal.SIGKILL)  # nobody who is still connected is asked for a certificate: so let all come back
        fleet.start()
        running.said("connected to mqtts://", connected + 1)
        assert "level=warning" not in "\n".join(x for x in running.log.splitlines() if "certificate is not" in x)
        assert "edge_runtime.csr" not in running.loaded()
        assert sorted(p.name for p in path.parent.iterdir()) == ["ca.pem", "device.pem"]
        assert len(fleet.register.devices["pi"]) <= 4


@pytest.mark.parametrize("away", [False, True], ids=["running", "away"])
def test_a_device_that_is_taken_back_leaves_the_round_at_once(make: Callable[..., Fleet], away: bool) -> None:
    """A round of all waits for a device that is silent until its deadline, in 600 s; taken back, it is waited for no longer.

    So it is when that was done while the coordinator was away; and its next life says the same.
    """
    fleet = make(devices=2, rounds=2)
    with agent(fleet, "pi-2") as two, fleet.inside(["e1/f/s/pi-2"]) as ear:
        assert codec.decode(wait_for(ear, Message, 30).payload, Presence).state == "online"
        two.process.send_signal(signal.SIGSTOP)
        with agent(fleet, "pi-1") as one:
            one.said("the answer counts")
            time.sleep(0.3)
            assert standing_of(fleet.state).done == 0, fleet.log
            if away:
                fleet.stop(signal.SIGKILL)
            told = fleet.run("revoke", "pi-2")
            assert told.returncode == 0, told.stderr
            if away:
                fleet.start()
            wait_until(lambda: standing_of(fleet.state).done == 1, 15)
            decided = standing_of(fleet.state).round
            assert decided is not None
            assert (decided.phase, decided.seats["pi-2"].state) == ("closed", "refused")
        two.process.send_signal(signal.SIGCONT)
        two.said("taken back, or past its end")
        assert ("device pi-2 is taken back" in fleet.log) is not away
    fleet.stop(signal.SIGKILL)
    fleet.start()
    fleet.enroll("pi-2")  # another device, and not even that one is asked for what the first one owed
    late = a_reply("pi-2", decided.seats["pi-2"].order)
    with fleet.linked("pi-2", ["e1/f/d/pi-2/ack"]) as link:
        quiet_for(link, Message, 0.4)  # a broker that was away has put nobody out, and kept what was sent
        link.publish(topics.up("f", "pi-2", "reply"), codec.encode(late))
        assert codec.decode(wait_for(link, Message, 10).payload, Ack) == Ack(late.order, "unwanted")
    assert (standing_of(fleet.state).round, fleet.log.count("going on with round 1")) == (decided, away)


def test_a_running_agent_goes_on_when_its_device_is_enrolled_again(make: Callable[..., Fleet]) -> None:
    fleet = make()
    with agent(fleet, "pi") as running:
        running.said("connected to mqtts://")
        assert not fleet.enroll("pi").written
        running.said("connected to mqtts://", 2)
    assert len(fleet.register.revoked) == 1


def test_an_agent_whose_certificate_has_ended_says_so_and_makes_no_keys(make: Callable[..., Fleet]) -> None:
    fleet = make(seconds=3.0)
    ends = time.time() + fleet.enroll("pi").seconds
    wait_until(lambda: time.time() > ends + 1)
    with agent(fleet, "pi") as running:
        running.said("has ended, by this device's clock")
        running.said("is this device's certificate taken back, or past its end?")
        folder = fleet.root / "pi" / "state" / "keys"
        assert sorted(path.name for path in folder.iterdir()) == ["ca.pem", "device.pem"]
        assert running.process.poll() is None


def test_renewal_without_the_package_for_keys_says_so_and_goes_on(make: Callable[..., Fleet], tmp_path: Path) -> None:
    fleet = make(seconds=6.0)
    (tmp_path / "none" / "cryptography").mkdir(parents=True)
    (tmp_path / "none" / "cryptography" / "__init__.py").write_text("raise ImportError('not here')\n")
    fleet.enroll("pi")
    with agent(fleet, "pi", {**os.environ, "PYTHONPATH": str(tmp_path / "none")}) as running:
        running.said("connected to mqtts://")
        running.said("pip install 'nestling[enroll]'")
        running.said("the certificate is not renewed: the process for a new key ended with 2")
        assert running.process.poll() is None
