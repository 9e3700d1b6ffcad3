"""A real agent whose owner's conditions fail and hold again, over a real broker: who stands still, who is told."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.devices import Agent, Script
from tests.support.federation import Federation
from tests.support.mosquitto import Mosquitto
from tests.support.trees import PHONE, stub, write
from tests.support.unit import Unit
from wire.messages import Ack, Beat, Order, Presence, Recipe, Refusal, Reply

SECONDS_MEMORY = 2.0
LONG = Recipe(rule="sgd", epochs=2000, batch=8)
SHORT = Recipe(rule="sgd", epochs=100, batch=4)
PLUG = "sys/class/power_supply/AC/online"
ROUTE = "proc/net/route"
HEAD = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n"


class House:
    """A phone's battery and network as files, and the agent that looks at them."""

    def __init__(
        self,
        root: Path,
        port: int,
        federation: str,
        wanted: str = "charging = true",
        home: Path | None = None,
        **changes: Any,
    ) -> None:
        self.root = root / "tree"
        self.plug(True)
        self.route("wlan0")
        write(self.root, {"sys/class/power_supply/AC/type": "Mains", "sys/class/power_supply/BAT/type": "Battery"})
        tables = f'[conditions]\nroot = "{self.root}"\nseconds_settle = 0.6\n{wanted}\n'
        self.agent = Agent((home or root) / "agent", port, federation, tables=tables, **changes)

    def plug(self, plugged: bool) -> float:
        """Plug in or out; gives when that was."""
        write(self.root, {PLUG: str(int(plugged))})
        return time.monotonic()

    def route(self, name: str) -> None:
        write(self.root, {ROUTE: f"{HEAD}{name} 00000000 0101A8C0 0003 0 0 600 00000000 0 0 0\n"})


@pytest.fixture
def make(script: Script, broker: Mosquitto, tmp_path: Path) -> Callable[..., House]:
    def made(*words: Any, **changes: Any) -> House:
        return House(tmp_path, broker.port, script.federation, *words, **changes)

    return made


def state_of(pid: int) -> str:
    """Give the letter that the kernel has for a process; empty when it holds no memory any more."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return ""
    held = any(line.startswith("VmRSS") for line in lines)
    return next(line.split()[1] for line in lines if line.startswith("State")) if held else ""


def train(script: Script, house: House, recipe: Recipe = LONG, **changes: Any) -> tuple[Order, int]:
    """Have an order trained until it visibly gets on; gives the worker as well."""
    script.lead = replace(script.lead, keepalive=1.0)
    script.say_lead()
    script.wait(Presence, where=lambda p: p.state == "online")
    order = replace(script.order(1, model="digits-cnn", recipe=recipe), **changes)
    script.send(order)
    script.wait(Beat, 60, where=lambda b: b.order == order.id and b.done > 0)
    return order, next(iter(house.agent.workers()), 0)


def test_memory_comes_back_within_two_seconds_and_the_order_is_done_later(
    script: Script, make: Callable[..., House]
) -> None:
    house = make()
    with house.agent:
        order, worker = train(script, house, SHORT)
        held = house.agent.memory("VmRSS")
        unplugged = house.plug(False)
        script.until(lambda: state_of(worker) == "")
        assert time.monotonic() - unplugged < SECONDS_MEMORY
        assert script.wait(Presence, where=lambda p: p.state == "bye").caps is None
        script.until(lambda: not house.agent.workers())
        assert house.agent.memory("VmRSS") < held + (1 << 20)
        script.send(order)  # as at a birth: it is known and waits
        house.plug(True)
        script.wait(Presence, where=lambda p: p.state == "online")
        assert script.wait_update(order.id, 60).reply.order == order.id
        assert not [m for m in script.seen if isinstance(m, Refusal)]


def test_what_flaps_only_makes_the_worker_stand_still(script: Script, make: Callable[..., House]) -> None:
    house = make("charging = true\nseconds_still = 30")
    with house.agent:
        _, worker = train(script, house)
        for _ in range(3):
            house.plug(False)
            script.until(lambda: state_of(worker) == "T")
            house.plug(True)
            script.until(lambda: state_of(worker) in ("R", "S"))
        assert house.agent.workers() == [worker]
        assert not [m for m in script.seen if isinstance(m, Presence) and m.state == "bye"]


def test_an_order_is_not_taken_while_a_condition_fails(script: Script, make: Callable[..., House]) -> None:
    house = make("charging = true\nbattery_min = 40", mode="warm")
    write(house.root, {"sys/class/power_supply/BAT/capacity": "12"})
    with house.agent:
        script.wait(Presence, where=lambda p: p.state == "bye")
        script.until(lambda: not house.agent.workers())
        order = script.order(1)
        script.send(order)
        refusal = script.wait(Refusal)
        assert (refusal.order, refusal.reason) == (order.id, "busy")
        assert refusal.detail == "not now: battery at 12 %, wanted: 40 % or more"
        script.send(Ack(order.id, "unwanted"))
        write(house.root, {"sys/class/power_supply/BAT/capacity": "80"})
        born = script.wait(Presence, 20, where=lambda p: p.state == "online")
        assert born.caps is not None
        following = script.order(2)
        script.send(following)
        script.wait_update(following.id)


def test_an_order_whose_time_runs_out_is_given_back(script: Script, make: Callable[..., House]) -> None:
    house = make()
    with house.agent:
        order, worker = train(script, house, seconds=12.0)
        house.plug(False)
        script.until(lambda: state_of(worker) == "")
        refusal = script.wait(Refusal)  # what was spent on it would have to be spent again
        assert (refusal.order, refusal.reason) == (order.id, "busy")
        assert refusal.detail == "given back, no time is left to wait: unplugged"


def test_nothing_large_goes_out_over_a_network_that_costs(script: Script, make: Callable[..., House]) -> None:
    """What is held back waits for the network alone: an answer is worth nothing once its round is over."""
    house = make("unmetered = true\ncharging = true")
    with house.agent:
        script.wait(Presence, where=lambda p: p.state == "online")
        script.acks = False
        order = script.order(1, model="digits-cnn")
        script.send(order)
        reply = script.wait(Reply)
        house.route("wwan0")
        house.plug(False)
        script.wait(Presence, where=lambda p: p.state == "bye")
        sent = script.uploads[order.id].sent
        script.send(Ack(order.id, "more", script.uploads[order.id].have))
        script.turn(0.4)
        assert script.uploads[order.id].sent == sent
        script.acks = True
        house.route("wlan0")
        assert script.wait_update(order.id).reply.update == reply.update


def test_a_trainer_behind_a_socket_leaves_within_two_seconds(script: Script, make: Callable[..., House]) -> None:
    """It is another user's and no child of ours: it cannot be made to stand still, and ends when it is hung up on."""
    with tempfile.TemporaryDirectory(prefix="door-") as folder:
        Path(folder).chmod(0o755)
        door = Path(folder) / "door"
        house = make(more=f'socket = "{door}"', home=Path(folder))
        with house.agent, Unit(door, house.agent.config, stranger=True) as unit:
            house.agent.root.chmod(0o755)
            order, _ = train(script, house, SHORT)
            (worker,) = unit.workers()
            unplugged = house.plug(False)
            script.until(lambda: state_of(worker) == "")
            assert time.monotonic() - unplugged < SECONDS_MEMORY
            script.wait(Presence, where=lambda p: p.state == "bye")
            house.plug(True)
            assert script.wait_update(order.id, 60).reply.order == order.id


@pytest.mark.parametrize(
    ("priority", "nice", "policy", "disk"), [("idle", 19, 5, 3 << 13), ("low", 10, 0, 2 << 13 | 7)]
)
def test_a_worker_steps_aside(
    script: Script, make: Callable[..., House], priority: str, nice: int, policy: int, disk: int
) -> None:
    house = make("", priority=priority, more="threads = 2")
    with house.agent:
        _, worker = train(script, house)
        tasks = [int(task.name) for task in Path(f"/proc/{worker}/task").iterdir()]
        for task in tasks:
            fields = Path(f"/proc/{worker}/task/{task}/stat").read_text().rpartition(")")[2].split()
            assert (int(fields[16]), int(fields[38])) == (nice, policy)
            assert disk_class(task) == disk
        assert os.getpriority(os.PRIO_PROCESS, house.agent.pid) == os.getpriority(os.PRIO_PROCESS, 0)


def test_a_phone_is_asked_through_termux_and_nobody_waits_for_it(
    script: Script, make: Callable[..., House], tmp_path: Path
) -> None:
    answer, name = tmp_path / "answer", "termux-battery-status"
    answer.write_text(json.dumps(PHONE))
    first = f"while [ ! -e {tmp_path}/ready ]; do sleep 0.05; done"
    environ = stub(tmp_path / "bin", name, f"{first}; if [ -e {tmp_path}/hang ]; then sleep 60; fi; cat {answer}")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    with make("charging = true", env={**environ, "PATH": path}).agent as agent:
        script.lead = replace(script.lead, keepalive=1.0)
        script.say_lead()
        script.until(lambda: "termux" in agent.log.read_text())  # at first nothing is known
        (tmp_path / "ready").touch()
        script.wait(Presence, where=lambda p: p.state == "online")
        (tmp_path / "hang").touch()
        order = script.order(1)
        script.send(order)
        script.wait_update(order.id)


def test_a_real_coordinator_asks_others_and_waits_for_whom_it_has_asked(tmp_path: Path) -> None:
    """Away before the run: no round begins without it. Away in the middle of one: it is heard, and the answer comes later."""
    tree = write(tmp_path / "tree", {PLUG: "0", "sys/class/power_supply/AC/type": "Mains"})
    write(tree, {"sys/class/power_supply/BAT/type": "Battery"})
    wanted = {
        "device-1": f'[conditions]\ncharging = true\nroot = "{tree}"\nseconds_settle = 0.5\nseconds_still = 0.2\n'
    }
    recipe: dict[str, object] = {"epochs": 10, "batch": 4}
    with Federation(
        tmp_path, model="digits-cnn", devices=2, rounds=1, seconds=120, recipe=recipe, tables=wanted
    ) as federation:
        federation.start()
        logs = {name: tmp_path / f"{name}.log" for name in ("coordinator", "device-0", "device-1")}

        def said(name: str, words: str) -> None:
            federation.wait(lambda _: logs[name].exists() and words in logs[name].read_text())

        said("device-0", "connected")
        said("device-1", "no orders until all hold again: unplugged")
        assert not federation.view().rounds
        write(tree, {PLUG: "1"})
        federation.wait(lambda view: set(view.rounds[1].orders) == {"device-0", "device-1"} if view.rounds else False)
        said("device-1", "round 1: train")
        write(tree, {PLUG: "0"})
        said("coordinator", "device device-1 is bye")
        write(tree, {PLUG: "1"})
        view = federation.wait_finished(90)
        assert (view.rounds[1].outcome, set(view.rounds[1].replies)) == ("closed", {"device-0", "device-1"})


def disk_class(task: int) -> int:
    """Give what the kernel has: ionice prints it in words."""
    import ctypes
    import platform

    number = {"x86_64": 252, "aarch64": 31}[platform.machine()]
    return int(ctypes.CDLL(None).syscall(number, 1, task))
