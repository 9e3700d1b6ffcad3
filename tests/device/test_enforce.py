"""Real agents whose workers run out of memory, are killed or crash: the order is done smaller, and the agent lives on."""

from __future__ import annotations

import dataclasses
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_runtime.retry import TRIES
from tests.bench import enforce
from tests.bench.memory import nested
from tests.support.devices import Agent, Script
from tests.support.models import random_arrays
from tests.support.mosquitto import Mosquitto, proc_memory
from tests.support.orders import job
from wire import zoo
from wire.messages import Beat, Order, Presence, Recipe, Refusal, Reply
from wire.spec import Structure

MIB = 1 << 20
MODEL = "digits-cnn"


@pytest.fixture
def script(broker: Mosquitto, tmp_path: Path) -> Iterator[Script]:
    with Script(broker.port, tmp_path / "script", federation=tmp_path.name[-60:], keepalive=0.5) as running:
        running.acks = False
        yield running


@pytest.fixture
def agent(script: Script, broker: Mosquitto, tmp_path: Path) -> Iterator[Agent]:
    made = Agent(tmp_path / "agent", broker.port, script.federation, mode="warm", samples=320)
    with made:
        script.wait(Presence, 60.0, lambda p: p.state == "online")
        pid = made.pid
        yield made
        print(made.log.read_text()[-3000:])
        assert (made.pid, made.process is not None and made.process.poll()) == (pid, None), "the agent has died"


def training(script: Script, order: Order) -> None:
    script.wait(Beat, 60.0, lambda b: b.order == order.id and b.done > 0.0)


def worker_of(script: Script, agent: Agent) -> int:
    script.until(lambda: len(agent.workers()) == 1)
    return agent.workers()[0]


def big(script: Script, number: int = 1, steps: int = 12) -> Order:
    recipe = Recipe(rule="sgd", batch=256, clip=1.0, steps=steps, rate=0.01)
    return script.order(number, model=MODEL, recipe=recipe)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_dies_is_followed_by_one_that_takes_less(script: Script, agent: Agent, number: int) -> None:
    order = big(script)
    script.send(order)
    training(script, order)
    first = worker_of(script, agent)
    os.kill(first, number)
    reply = script.wait(Reply, 60.0)
    assert reply.order == order.id
    assert reply.structure == order.structures[0]
    assert 0 < reply.usage.micro_batch < 256
    assert worker_of(script, agent) != first


def test_a_worker_that_really_gets_no_memory_is_followed_by_one_that_takes_less(script: Script, agent: Agent) -> None:
    """A limit that nobody has foreseen: torch raises, or crashes; both are the same to the agent."""
    worker = worker_of(script, agent)
    mapped = proc_memory(worker, "VmData") + 24 * MIB
    resource.prlimit(worker, resource.RLIMIT_DATA, (mapped, mapped))
    order = big(script, steps=3)
    script.send(order)
    reply = script.wait(Reply, 90.0)
    assert reply.usage.micro_batch < 256
    assert "something smaller is tried" in agent.log.read_text()
    assert worker_of(script, agent) != worker


def test_one_that_dies_again_and_again_is_an_oom_with_the_peak_and_the_next_order_is_done(
    script: Script, agent: Agent
) -> None:
    order, killed, peak = big(script, steps=2000), set(), 0
    script.send(order)
    while not any(isinstance(m, Refusal) for m in script.seen):
        beat = script.wait(Beat, 60.0, lambda b: b.order == order.id and b.bytes_peak > 0 and b.done > 0.0)
        peak = max(peak, beat.bytes_peak)
        for worker in set(agent.workers()) - killed:
            os.kill(worker, signal.SIGKILL)
            killed.add(worker)
        script.until(lambda: any(isinstance(m, Refusal) for m in script.seen) or bool(set(agent.workers()) - killed))
        script.seen = [m for m in script.seen if not isinstance(m, Beat)]
    refusal = script.wait(Refusal)
    assert (refusal.order, refusal.reason) == (order.id, "oom")
    assert refusal.bytes_needed >= peak > MIB
    assert 2 <= len(killed) <= TRIES
    script.commit(order.id)
    following = big(script, 2, steps=2)
    script.send(following)
    assert script.wait(Reply, 60.0).usage.micro_batch == 256, "the next order begins as large as fits"


def test_an_order_of_nested_widths_is_done_narrower(script: Script, agent: Agent, tmp_path: Path) -> None:
    spec = zoo.by_name(MODEL)
    recipe = Recipe(rule="sgd", batch=1, clip=1.0, steps=400, rate=0.001)
    made = job(tmp_path / "job", spec, random_arrays(spec, Structure(), scale=0.05), [nested(spec, 4)], recipe)
    order = dataclasses.replace(made.order, device="d0", seconds=60.0)
    for path, ref in zip((made.spec, *made.shells), (order.spec, *order.shells), strict=True):
        script.publish(Path(path), ref)
    script.send(order)
    training(script, order)
    os.kill(worker_of(script, agent), signal.SIGSEGV)
    reply = script.wait(Reply, 90.0)
    assert reply.structure == order.structures[0].narrowed(reply.structure.capacity)
    assert reply.structure.capacity < 4


def test_orders_with_random_budgets_stay_within_them() -> None:
    drawn = [case for case in enforce.cases(40, 7) if case.device == "d1"][:12]
    rows, told = enforce.measured(drawn)
    assert len(told) == 12
    values = {row.measure: row for row in rows}
    assert [row for row in values.values() if not row.holds] == []
    assert values["finished"].value >= 8
