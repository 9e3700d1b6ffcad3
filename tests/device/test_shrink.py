"""Real workers whose memory shrinks while they train: a narrower answer, and what the kernel says of their size then."""

from __future__ import annotations

import dataclasses
import json
import queue
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.memory.limit import FILE
from edge_runtime.memory.probe import resident
from edge_runtime.spawn import command, surroundings
from tests.support.devices import Agent, Script
from tests.support.models import random_arrays
from tests.support.mosquitto import Mosquitto
from tests.support.orders import job
from wire import zoo
from wire.child import Child, Ended
from wire.job import Done, Failed, Progress, Ready
from wire.messages import Beat, Presence, Recipe
from wire.native import memory
from wire.spec import Structure
from wire.structure import cut, shell
from wire.tensor import open_blob, write_blob

MIB = 1 << 20
SPEC = zoo.by_name("digits-cnn")
KEPT = (0.2, 0.4, 0.6, 0.8, 1.0)
WIDTHS = {g.name: tuple(-(-g.size * int(k * 10) // 10) for k in KEPT) for g in SPEC.groups if g.prunable}
NESTED = Structure(4, WIDTHS, "ab" * 32)
WHOLE = Structure()


class Worker:
    """A worker whose operator has a file to write to."""

    def __init__(self, folder):
        rng = np.random.default_rng(0)
        x = rng.random((160, *SPEC.input_shape), np.float32)
        np.savez(folder / "data.npz", x=x, y=np.arange(160) % SPEC.classes)
        self.limit, self.heard = folder / FILE, queue.Queue()
        source = json.dumps({"source": "npz", "path": str(folder / "data.npz"), "validation": 0.0, "test": 0.2})
        argv = command(source, preload=True, limit=str(self.limit))
        self.child = Child("worker", argv, self.heard.put, env=surroundings())
        self.ready = self.next()

    def next(self):
        event = self.heard.get(timeout=120)
        return event if isinstance(event, Ended) else event.frame

    def begin(self, made):
        """Give it a job and wait until it trains."""
        self.child.send(made)
        while not (isinstance(said := self.next(), Progress) and said.done > 0.02):
            assert isinstance(said, Progress), said
        return said

    def end(self):
        told = []
        while isinstance(said := self.next(), Progress):
            told.append((said, resident(self.child.pid)))
        return said, told


@pytest.fixture
def worker(tmp_path):
    one = Worker(tmp_path)
    yield one
    one.child.kill()
    one.child.close()


def bound(capacity, recipe):
    return memory.predict(SPEC, NESTED.narrowed(capacity), recipe).bound


@pytest.mark.parametrize("knobs", [{}, {"widths": 1.0}], ids=["plain", "sandwich"])
def test_a_lower_budget_in_the_middle_of_an_order(tmp_path, worker, knobs):
    assert isinstance(worker.ready, Ready)
    recipe = Recipe(batch=32, clip=1.0, momentum=0.9, rate=0.01, steps=150, knobs=knobs)
    arrays, budget = random_arrays(SPEC, WHOLE, scale=0.05), bound(1, recipe)
    made = job(tmp_path / "j", SPEC, arrays, [NESTED], recipe, budget=bound(4, recipe))
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "j").iterdir() if path.is_file()}
    before = worker.begin(made)
    assert before.bytes_peak > budget, "or there would be nothing to give back"
    worker.limit.write_text(str(budget))
    done, told = worker.end()
    assert isinstance(done, Done), done
    assert done.structure == NESTED.narrowed(1)
    assert 0.0 < done.metrics["squeezed"] < 1.0
    assert done.usage.bytes_budget == budget
    assert 0 < done.usage.bytes_peak <= budget, "the kernel's high-water mark since the cut"
    after = [size - done.usage.bytes_base for said, size in told if said.done > done.metrics["squeezed"] + 0.05]
    assert after
    assert max(after) <= budget
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "j").iterdir() if path.is_file()} == files
    with open_blob(Path(done.update)) as blob:
        shapes = {name: blob.entry(name).shape for name in blob.names}
    assert shapes == {name: array.shape for name, array in cut(SPEC, arrays, done.structure).items()}


def test_the_next_order_starts_with_what_there_is(tmp_path, worker):
    """An order that no longer fits at all is given up, and the worker lives on."""
    recipe = Recipe(batch=32, clip=1.0, rate=0.01, steps=150)
    arrays = random_arrays(SPEC, WHOLE, scale=0.05)
    worker.begin(job(tmp_path / "a", SPEC, arrays, [NESTED], recipe, budget=bound(4, recipe)))
    worker.limit.write_text("1 MiB")
    failed, _ = worker.end()
    assert isinstance(failed, Failed), failed
    assert failed.reason == "memory"
    assert failed.bytes_needed == memory.predict(SPEC, NESTED.narrowed(0), recipe, 1).bound
    worker.limit.unlink()
    few = Recipe(batch=32, clip=1.0, rate=0.01, steps=5)
    worker.child.send(job(tmp_path / "b", SPEC, arrays, [NESTED], few, budget=bound(4, few)))
    done, _ = worker.end()
    assert isinstance(done, Done), done
    assert done.structure == NESTED
    assert "squeezed" not in done.metrics


def nested_order(script, recipe):
    """Make an order over all widths, each a shell of its own, and publish its blobs."""
    plain, arrays, refs = script.order(1, model=SPEC.name), random_arrays(SPEC, WHOLE, scale=0.05), []
    for capacity in range(NESTED.capacity + 1):
        path = script.folder / f"shell-{capacity}"
        refs.append(
            write_blob(path, "shell", shell(SPEC, arrays, NESTED.narrowed(capacity)), meta={"capacity": capacity})
        )
        script.publish(path, refs[-1])
    return dataclasses.replace(plain, shells=tuple(refs), structures=(NESTED,), recipe=recipe)


def test_an_operator_lowers_the_budget_of_a_running_device(tmp_path):
    """The order in hand is cut, with nothing fetched for it, and the coordinator hears what there is for the next one."""
    recipe = Recipe(batch=32, clip=1.0, momentum=0.9, rate=0.01, steps=400)
    with (
        Mosquitto(tmp_path / "broker") as broker,
        Script(broker.port, tmp_path / "script", federation="squeeze") as script,
    ):
        agent = Agent(tmp_path / "agent", broker.port, "squeeze", samples=160)
        with agent:
            born = script.wait(Presence, 60.0, lambda p: p.state == "online")
            assert born.caps.bytes_budget > bound(4, recipe)
            order = nested_order(script, recipe)
            script.send(order)
            script.wait(Beat, 90.0, lambda b: b.order == order.id and b.done > 0.01)
            spool = sorted(path.name for path in (agent.root / "state" / "spool").rglob("*"))
            (agent.root / "state" / FILE).write_text(str(bound(2, recipe)))
            again = script.wait(
                Presence, 30.0, lambda p: p.state == "online" and p.caps.bytes_budget == bound(2, recipe)
            )
            assert (again.boot, again.seq) == (born.boot, born.seq)
            reply = script.wait_update(order.id, 90.0).reply
            assert reply.structure == NESTED.narrowed(2)
            assert 0.0 < reply.metrics["squeezed"] < 1.0
            assert reply.usage.bytes_peak <= reply.usage.bytes_budget == bound(2, recipe)
            assert sorted(path.name for path in (agent.root / "state" / "spool").rglob("*")) == spool
            script.commit(order.id)
