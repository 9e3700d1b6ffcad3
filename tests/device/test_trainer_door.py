"""The worker behind an activation socket: real orders through a real AF_UNIX socket, started for each connection."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.devices import Agent, Script, tensors
from tests.support.mosquitto import Mosquitto
from tests.support.unit import Unit
from wire.messages import Ack, Beat, Cancel, Presence, Recipe, Refusal
from wire.service import NOBODY_YET

LESSON = Recipe(rule="sgd", epochs=2, batch=8, rate=0.1)
LONG = Recipe(rule="sgd", epochs=4000, batch=8)


@pytest.fixture
def home() -> Iterator[Path]:
    """A folder that others can look into; pytest's own are closed to them."""
    with tempfile.TemporaryDirectory(prefix="door-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def make(script: Script, broker: Mosquitto, home: Path) -> Iterator[Callable[..., tuple[Agent, Unit]]]:
    """An agent that knows no worker but a socket's, and the socket, both started."""
    running: list[Any] = []

    def made(mode: str = "auto", **unit: Any) -> tuple[Agent, Unit]:
        path = home / "door"
        agent = Agent(home / "agent", broker.port, script.federation, mode=mode, more=f'socket = "{path}"')
        agent.start()
        agent.root.chmod(0o755)  # the configuration and the data are the owner's, the state folder the agent's alone
        running.append(agent)
        running.append(Unit(path, agent.config, **unit).__enter__())
        return agent, running[-1]

    yield made
    for one in reversed(running):
        one.__exit__()
    for log in (home / "agent/agent.log", home / "journal"):
        print(log.read_text()[-3000:] if log.exists() else "")


def born(script: Script) -> Presence:
    return script.wait(Presence, where=lambda p: p.state == "online")


def trained(script: Script, number: int) -> dict[str, Any]:
    order = script.order(number, model="digits-cnn", recipe=LESSON)
    script.send(order)
    upload = script.wait_update(order.id, 60)
    assert upload.reply.update is not None
    assert hashlib.sha256(upload.data).hexdigest() == upload.reply.update.digest
    script.commit(order.id)
    return tensors(upload.data, script.folder)


@pytest.mark.parametrize("stranger", [False, True], ids=["systemd-socket-activate", "another-user"])
def test_orders_are_trained_as_by_a_child(
    script: Script, broker: Mosquitto, make: Callable[..., tuple[Agent, Unit]], tmp_path: Path, stranger: bool
) -> None:
    agent, _ = make(stranger=stranger)
    born(script)
    assert agent.workers() == [], "the agent has no child of its own"
    found = [trained(script, number) for number in (1, 2)]  # the second one brings the state that the first one left
    kept = agent.root / "state/keep" / script.federation / "sgd"
    script.until(lambda: not list((agent.root / "state/out").glob("*.*")))
    assert hashlib.sha256(kept.read_bytes()).hexdigest()
    assert (agent.root / "state").stat().st_mode & 0o77 == 0
    assert agent.stop() == 0
    with (
        Script(broker.port, tmp_path / "twin-script", federation="twin-" + script.federation[-50:]) as twin,
        Agent(tmp_path / "twin", broker.port, twin.federation),
    ):
        born(twin)
        for number, ours in enumerate(found, 1):
            theirs = trained(twin, number)
            assert {n: a.tobytes() for n, a in ours.items()} == {n: a.tobytes() for n, a in theirs.items()}


def test_a_worker_that_is_killed_is_a_refusal_and_the_next_order_is_done(
    script: Script, make: Callable[..., tuple[Agent, Unit]]
) -> None:
    _, unit = make()
    born(script)
    slow = script.order(1, model="digits-cnn", recipe=LONG)
    script.send(slow)
    script.wait(Beat, where=lambda b: b.order == slow.id and b.done > 0)
    os.kill(unit.workers()[0], signal.SIGKILL)
    refusal = script.wait(Refusal)
    assert (refusal.order, refusal.reason) == (slow.id, "oom")
    assert refusal.bytes_needed > 0, "the peak that was seen before the end"
    assert "journalctl" in refusal.detail
    script.send(Ack(slow.id, "unwanted"))
    trained(script, 2)


def test_a_worker_leaves_with_the_agent_and_when_its_order_is_cancelled(
    script: Script, make: Callable[..., tuple[Agent, Unit]]
) -> None:
    agent, unit = make()
    born(script)
    for number, leave in ((1, lambda o: script.send(Cancel(o.id))), (2, lambda _: agent.kill())):
        slow = script.order(number, model="digits-cnn", recipe=LONG)
        script.send(slow)
        script.wait(Beat, where=lambda b, slow=slow: b.order == slow.id and b.done > 0)
        assert len(unit.workers()) == 1
        since = time.monotonic()
        leave(slow)
        script.until(lambda: not unit.workers())
        assert time.monotonic() - since < 2.0


def test_an_instance_that_is_not_gone_yet_costs_a_wait_and_not_the_order(
    script: Script, make: Callable[..., tuple[Agent, Unit]], home: Path
) -> None:
    """While two are about systemd hangs up on a third: on the second and third connection here, of which an order waits."""
    make(mode="spawn", refuse=(2, 3))
    born(script)
    order = script.order(1)
    since = time.monotonic()
    script.send(order)
    script.wait_update(order.id, 60)
    assert time.monotonic() - since > 1.0, "the two waits"
    assert "refus" not in (home / "agent/agent.log").read_text()


def test_what_is_wrong_with_the_configuration_reaches_the_agent(broker: Mosquitto, tmp_path: Path) -> None:
    with Agent(tmp_path / "agent", broker.port, "none", more=f'socket = "{tmp_path / "door"}"') as agent:
        (tmp_path / "other.toml").write_text(agent.config.read_text().replace("[worker]", "[wurker]"))
        with Unit(tmp_path / "door", tmp_path / "other.toml"):
            assert agent.process is not None
            assert agent.process.wait(20) == 6
    assert "wurker" in agent.log.read_text()


def test_nobody_listens_is_said_and_tried_again(script: Script, broker: Mosquitto, tmp_path: Path) -> None:
    with Agent(tmp_path / "agent", broker.port, script.federation, more=f'socket = "{tmp_path / "door"}"') as agent:
        script.until(lambda: "is edge-trainer.socket started" in agent.log.read_text())
        with Unit(tmp_path / "door", agent.config):
            born(script)


def test_the_stranger_is_one(broker: Mosquitto, home: Path) -> None:
    """What the launcher of these tests promises: another user without a network, where this one is root."""
    if os.geteuid() == 0:
        agent = Agent(home / "agent", broker.port).start()
        agent.kill()
        with Unit(home / "door", agent.config, stranger=True) as unit, socket.socket(socket.AF_UNIX) as door:
            door.connect(str(home / "door"))
            door.settimeout(30)
            assert door.recv(1) == b"\0", "its first word is about the data"
            (pid,) = unit.workers()
            status = Path(f"/proc/{pid}/status").read_text()
            assert f"Uid:\t{NOBODY_YET}\t{NOBODY_YET}" in status
            assert "CapEff:\t0000000000000000" in status
            networks = [
                line.split(":")[0].strip() for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]
            ]
            assert networks == ["lo"]
            assert not list(Path(f"/proc/{pid}/root{home}/agent").glob("state*"))
