"""Real worker processes: what they measure, how they end, and that the same order gives the same bytes in any of them."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.spawn import command, surroundings
from tests.support.models import random_arrays
from tests.support.orders import job
from wire import prices, zoo
from wire.child import Child, Ended
from wire.job import Done, Failed, Progress, Ready
from wire.messages import Recipe
from wire.spec import Structure

MIB = 1 << 20
DIGITS_CNN = zoo.by_name("digits-cnn")
KEPT = (0.2, 0.4, 0.6, 0.8, 1.0)
WIDTHS = {g.name: tuple(-(-g.size * int(k * 10) // 10) for k in KEPT) for g in DIGITS_CNN.groups if g.prunable}
NESTED = Structure(4, WIDTHS, "ab" * 32)
WHOLE = Structure()


class Worker:
    """A worker under test and everything it says."""

    def __init__(self, data, *, preload=False, test=0.2, engine="native"):
        self.heard = queue.Queue()
        source = json.dumps({"source": "npz", "path": str(data), "validation": 0.0, "test": test})
        argv = command(source, engine=engine, preload=preload)
        self.child = Child("worker", argv, self.heard.put, env=surroundings())

    def next(self, seconds=60.0):
        event = self.heard.get(timeout=seconds)
        return event if isinstance(event, Ended) else event.frame

    def do(self, order):
        self.child.send(order)
        told = []
        while isinstance(frame := self.next(), Progress):
            told.append(frame)
        return frame, told


@pytest.fixture
def worker(tmp_path):
    started = []

    def start(data=None, **options):
        if data is None:
            data = save(tmp_path / "data.npz", DIGITS_CNN)
        started.append(Worker(data, **options))
        return started[-1]

    yield start
    for one in started:
        one.child.kill()
        one.child.close()


def save(path, spec, count=160):
    rng = np.random.default_rng(0)
    x = rng.random((count, *spec.input_shape), np.float32)
    np.savez(path, x=x, y=np.arange(count) % spec.classes)
    return path


def order(folder, structure=NESTED, **options):
    recipe = options.pop("recipe", Recipe(batch=32, clip=1.0, knobs={"widths": 1.0}))
    arrays = random_arrays(DIGITS_CNN, WHOLE, scale=0.05)
    return job(folder, DIGITS_CNN, arrays, [structure], recipe, **options)


def test_the_same_order_gives_the_same_bytes_in_any_process(tmp_path, worker):
    digests = set()
    for attempt in range(2):
        one = worker()
        assert isinstance(one.next(), Ready)
        for again in range(2):
            done, _ = one.do(order(tmp_path / f"{attempt}{again}"))
            assert isinstance(done, Done), done
            digests.add((done.update_ref.digest, done.keep_digest))
    assert len(digests) == 1


@pytest.mark.parametrize(("engine", "least", "most", "apart"), [("native", 24, 60, 12), ("torch", 120, 400, 20)])
def test_measured_peaks_stay_below_the_bound_and_grow_with_the_width(tmp_path, worker, engine, least, most, apart):
    peaks = {}
    one = worker(preload=True, engine=engine)
    ready = one.next()
    assert isinstance(ready, Ready)
    assert (ready.samples, ready.classes, ready.input_shape) == (128, 10, (1, 8, 8))
    assert ready.engine == engine
    assert least * MIB < ready.bytes_base < most * MIB
    for capacity in (0, 2, 4):
        structure = NESTED.narrowed(capacity)
        recipe = Recipe(batch=32, clip=1.0, knobs={"widths": 1.0})
        budget = prices.training(engine)(DIGITS_CNN, structure, recipe).bound
        done, _ = one.do(order(tmp_path / str(capacity), structure, budget=budget))
        assert isinstance(done, Done), done
        assert done.usage.micro_batch == 32
        assert done.usage.bytes_budget == budget
        assert 0 < done.usage.bytes_peak <= budget
        peaks[capacity] = done.usage.bytes_peak
    assert peaks[4] - peaks[0] >= apart * MIB
    assert peaks[0] < peaks[2] < peaks[4]


def test_a_half_budget_gets_smaller_micro_batches_and_then_a_refusal(tmp_path, worker):
    one = worker()
    one.next()
    recipe = Recipe(batch=128, clip=1.0)
    full = prices.training("native")(DIGITS_CNN, NESTED, recipe).bound
    done, _ = one.do(order(tmp_path / "a", recipe=recipe, budget=full - 1))
    assert isinstance(done, Done), done
    assert done.usage.micro_batch == 64
    failed, _ = one.do(order(tmp_path / "b", recipe=recipe, budget=full // 2))
    assert isinstance(failed, Failed)
    assert failed.reason == "memory"
    assert failed.bytes_needed <= prices.training("native")(DIGITS_CNN, NESTED, recipe, 1).bound
    assert failed.bytes_needed > full // 2
    assert isinstance(one.do(order(tmp_path / "c", recipe=recipe))[0], Done)


def test_the_wall_stops_what_the_plan_let_through(tmp_path, worker):
    conv = zoo.by_name("conv-2")
    one = worker(save(tmp_path / "big.npz", conv, 80))
    one.next()
    # A micro-batch that is given is not questioned; the budget and the wall's slack are less than this order takes.
    made = job(
        tmp_path / "j", conv, random_arrays(conv, WHOLE, scale=0.02), [WHOLE], Recipe(batch=32, clip=1.0),
        budget=4 * MIB, micro=32,
    )  # fmt: skip
    said, _ = one.do(made)
    if isinstance(said, Failed):
        assert said.reason == "oom"
        assert said.bytes_peak < 70 * MIB
        said = one.next()
    assert isinstance(said, Ended)
    assert said.code == 3 or said.code < 0


def test_an_engineless_rule_loads_no_torch(tmp_path, worker):
    one = worker()
    ready = one.next()
    assert isinstance(ready, Ready)
    assert ready.bytes_base < 80 * MIB
    done, _ = one.do(order(tmp_path / "j", recipe=Recipe(rule="still")))
    assert isinstance(done, Done), done
    assert "libtorch" not in Path(f"/proc/{one.child.pid}/maps").read_text()


def test_progress_comes_with_the_observed_peak(tmp_path, worker):
    one = worker()
    one.next()
    started = time.monotonic()
    done, told = one.do(order(tmp_path / "j", recipe=Recipe(epochs=40, batch=8, clip=1.0)))
    assert isinstance(done, Done), done
    assert told[0] == Progress(0.0, None, 0)
    assert 2 <= len(told) <= 2 + (time.monotonic() - started) / 0.2
    assert [p.done for p in told] == sorted(p.done for p in told)
    assert told[-1].bytes_peak > 10 * MIB
    assert told[-1].loss > 0


def test_evaluation_in_a_process(tmp_path, worker):
    one = worker(test=1.0)
    assert one.next().samples == 0
    structures = [NESTED.narrowed(k) for k in range(5)]
    made = job(tmp_path / "j", DIGITS_CNN, random_arrays(DIGITS_CNN, WHOLE, scale=0.05), structures, verb="evaluate")
    done, _ = one.do(made)
    assert isinstance(done, Done), done
    assert {f"{what}.{k}" for what in ("accuracy", "loss") for k in range(5)} == set(done.metrics)
    assert done.samples == 160


def test_end_of_input_is_the_end(worker):
    one = worker()
    one.next()
    one.child.close()
    ended = one.next()
    assert isinstance(ended, Ended)
    assert (ended.code, ended.problem) == (0, "")


def test_a_kill_is_an_event(tmp_path, worker):
    one = worker()
    one.next()
    one.child.send(order(tmp_path / "j", recipe=Recipe(epochs=1000, batch=8, clip=1.0)))
    assert isinstance(one.next(), Progress)
    os.kill(one.child.pid, signal.SIGKILL)
    while isinstance(said := one.next(), Progress):
        pass
    assert isinstance(said, Ended)
    assert said.code == -signal.SIGKILL


def test_data_that_are_not_there_are_an_answer(tmp_path, worker):
    one = worker(tmp_path / "nothing.npz")
    failed = one.next()
    assert isinstance(failed, Failed)
    assert (failed.reason, "nothing.npz" in failed.detail) == ("data", True)
    assert one.next().code == 2


def test_ctrl_c_is_the_agents_business(worker):
    one = worker()
    one.next()
    os.kill(one.child.pid, signal.SIGINT)
    one.child.close()
    assert one.next().code == 0


def test_a_worker_dies_with_its_parent(tmp_path):
    code = """
import json, queue, sys, time
from edge_runtime.spawn import command
from wire.child import Child
heard = queue.Queue()
child = Child("w", command(json.dumps({"source": "digits"})), heard.put)
heard.get(timeout=30)
print(child.pid, flush=True)
heard.get()
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    parent.stdout.close()
    assert Path(f"/proc/{pid}").exists()
    parent.kill()
    parent.wait()
    until = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and state(pid) != "Z":
        assert time.monotonic() < until
        time.sleep(0.02)


def state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


def test_a_worker_whose_agent_is_gone_before_its_first_word_ends_without_one(tmp_path):
    """An agent that is killed while its worker starts cannot take it along: the kernel was not asked to yet."""
    for source, place in (("digits", ""), ("npz", str(tmp_path / "nowhere.npz"))):
        argv = [sys.executable, "-m", *command(json.dumps({"source": source, "path": place}), engine="native")]
        worker = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert worker.stdout is not None
        worker.stdout.close()
        with worker:
            assert worker.stderr is not None
            assert (worker.stderr.read(), worker.wait(20.0)) == (b"", 0)


def test_the_worker_offers_itself_to_the_oom_killer(worker):
    one = worker()
    one.next()
    assert int(Path(f"/proc/{one.child.pid}/oom_score_adj").read_text()) == 800
