"""What an agent costs while it waits, and how its own life begins and ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.devices import Agent, Script
from tests.support.mosquitto import Mosquitto
from wire.messages import Ack, Presence, Recipe

MIB = 1 << 20
HEAVY = ("numpy", "torch", "psutil", "sqlite3", "cryptography", "click", "ssl", "asyncio")


@pytest.fixture
def make(script: Script, broker: Mosquitto, tmp_path: Path) -> Callable[..., Agent]:
    def made(**changes: Any) -> Agent:
        return Agent(tmp_path / "agent", broker.port, script.federation, **changes)

    return made


def online(script: Script, after: int = 0) -> Presence:
    return script.wait(Presence, where=lambda p: p.state == "online" and p.seq > after)


def test_an_idle_agent_is_small(script: Script, make: Callable[..., Agent], tmp_path: Path) -> None:
    """As installed, that is with compiled modules: a first life writes them."""
    env = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path / "compiled")}
    with make(mode="spawn", env=env) as agent:
        first = online(script)
        agent.stop()
    with make(mode="spawn", env=env) as agent:
        online(script, first.seq)
        cpu = agent.cpu()
        order = script.order(1)
        script.send(order)
        script.wait_update(order.id)
        script.commit(order.id)
        script.until(lambda: not agent.workers())
        assert agent.memory("VmRSS") <= 24 * MIB
        assert cpu < 0.5
        before = agent.cpu()
        script.turn(1.0)
        assert agent.cpu() - before <= 0.05


def test_the_agent_loads_nothing_heavy() -> None:
    """What `edge-runtime run` imports, in the order in which it does."""
    code = (
        "import sys, json\n"
        "from edge_runtime import cli, config, frugal\n"
        "with frugal.without_openssl():\n"
        "    from edge_runtime import agent\n"
        f"print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))\n"
        "import ssl, hashlib\n"
        "assert ssl.create_default_context() is not None\n"
        "assert hashlib.sha256(b'abc').hexdigest()[:8] == 'ba7816bf'\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout) == []


def test_no_numpy_even_without_the_diet() -> None:
    code = "import sys, edge_runtime.agent; print([m for m in ('numpy', 'torch', 'psutil', 'sqlite3') if m in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_leaves_in_peace_and_takes_its_worker_along(script: Script, make: Callable[..., Agent], number: int) -> None:
    with make() as agent:
        born = online(script)
        slow = script.order(1, recipe=Recipe(rule="sgd", epochs=100_000, batch=8))
        script.send(slow)
        script.until(lambda: "round 1" in agent.log.read_text())
        (worker,) = agent.workers()
        assert agent.stop(number) == 0
        assert script.wait(Presence, where=lambda p: p.state == "bye").boot == born.boot
        script.until(lambda: not Path(f"/proc/{worker}").exists())


def test_its_death_is_known_at_once_and_takes_its_worker_along(script: Script, make: Callable[..., Agent]) -> None:
    with make() as agent:
        born = online(script)
        (worker,) = agent.workers()
        agent.kill()
        began = time.monotonic()
        assert script.wait(Presence, where=lambda p: p.state == "lost").boot == born.boot
        assert time.monotonic() - began < 1.0
        script.until(lambda: not Path(f"/proc/{worker}").exists() or "Z" in _state(worker))


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_workers_stay_or_go_by_mode(script: Script, make: Callable[..., Agent]) -> None:
    with make(mode="auto", more="seconds_warm = 0.3") as agent:
        online(script)
        script.until(lambda: not agent.workers())
        order = script.order(1)
        script.send(order)
        script.wait_update(order.id)
        script.until(lambda: not agent.workers())
        assert len([m for m in script.seen if isinstance(m, Presence)]) == 0  # the worker's return is no news


def test_a_warm_worker_that_is_killed_comes_back(script: Script, make: Callable[..., Agent]) -> None:
    with make(mode="warm") as agent:
        online(script)
        (worker,) = agent.workers()
        os.kill(worker, signal.SIGKILL)
        script.until(lambda: agent.workers() not in ([], [worker]))
        order = script.order(1)
        script.send(order)
        script.wait_update(order.id)


def test_a_worker_that_dies_before_its_first_word_is_tried_again(script: Script, make: Callable[..., Agent]) -> None:
    with make() as agent:
        script.until(lambda: bool(agent.workers()))
        os.kill(agent.workers()[0], signal.SIGKILL)
        online(script)


def test_an_order_that_ends_before_the_first_worker_has_said_a_word_leaves_no_device_that_nobody_knows(
    script: Script, make: Callable[..., Agent]
) -> None:
    """Both waited for it at the broker. The order took the worker that was to tell what this device brings along."""
    with make() as agent:
        first = online(script)
        order = script.order(1)
        script.send(order)
        script.wait_update(order.id)
        script.commit(order.id)
        script.until(lambda: not list((agent.root / "state" / "out").iterdir()))
    late = replace(order, id="f" * 16, round=2)
    script.send(late)
    script.send(Ack(late.id, "unwanted"))
    with make():
        online(script, first.seq)


def test_without_data_it_says_what_to_do_and_ends(make: Callable[..., Agent]) -> None:
    agent = make()
    agent.start()
    agent.kill()
    (agent.root / "data.npz").write_bytes(b"no data")
    argv = [sys.executable, "-m", "edge_runtime.cli", "run", "--config", str(agent.config)]
    told = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 6
    assert str(agent.root / "data.npz") in told.stderr.splitlines()[-1]


def test_two_agents_over_one_folder_are_an_error(script: Script, make: Callable[..., Agent]) -> None:
    with make() as agent:
        online(script)
        argv = [sys.executable, "-m", "edge_runtime.cli", "run", "--config", str(agent.config)]
        told = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
        assert told.returncode == 2
        assert "another agent runs over this folder" in told.stderr


def test_it_starts_before_its_broker_and_tells_systemd(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear, Mosquitto(tmp_path / "broker") as broker:
        ear.bind(str(tmp_path / "ear"))
        ear.settimeout(20)
        broker.kill()
        env = {"NOTIFY_SOCKET": str(tmp_path / "ear"), "WATCHDOG_USEC": "400000"}
        with Agent(tmp_path / "agent", broker.port, env=env) as agent:
            heard = {ear.recv(100) for _ in range(3)}
            assert b"WATCHDOG=1" in heard
            until = time.monotonic() + 20
            while "no broker" not in agent.log.read_text():
                assert time.monotonic() < until
                time.sleep(0.02)
            broker.start()
            with Script(broker.port, tmp_path / "script") as script:
                online(script)
                while b"READY=1" not in heard:
                    heard.add(ear.recv(100))
