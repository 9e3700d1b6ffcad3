"""PruneFL's Raspberry Pi 3 experiment in its modern form: in half a gigabyte a dense VGG-11 dies, pruned ones train.

The paper's own (LeNet-300-100 dies at its first mini-batch, its sparse form does not) says nothing any more: that model takes
14 MiB. The same line runs today between a VGG-11 with a classifier of 4096 units, by SGD with momentum, and what pruning
leaves of it, with torch; without, the whole of it trains there too. 512 MiB less 75 for a system are the worker's, from its
first instruction to its last, enforced by the kernel.
"""

from __future__ import annotations

import dataclasses
import json
import queue
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from coordinator import fitting
from edge_runtime.spawn import command, surroundings
from tests.bench.memory import nested
from tests.support.models import random_arrays
from tests.support.mosquitto import proc_memory
from tests.support.orders import job, masked_job, some_masks
from wire import builders, memory, prices, zoo
from wire.child import Child, Ended
from wire.job import Done, Failed, Job, Progress, Ready
from wire.messages import Recipe
from wire.spec import ModelSpec, Structure, parameter_count

MIB = 1 << 20
LIMIT = (512 - 75) * MIB
WHOLE = Structure()
DENSITY = 0.1
RECIPE = Recipe(rule="sgd", batch=10, rate=0.001, momentum=0.9)
SAMPLES = 20


@pytest.fixture(scope="module")
def vgg() -> ModelSpec:
    convs = (
        builders.Conv(c, pool=2 * p) for c, p in ((64, 1), (128, 1), (256, 0), (256, 1), *2 * ((512, 0), (512, 1)))
    )
    spec = builders.cnn("vgg-11-4096", (3, 32, 32), 10, tuple(convs), (4096, 4096))
    assert spec.nodes[:-5] == zoo.by_name("vgg-11").nodes[:-5], "the convolutions are those of the zoo's"
    assert parameter_count(spec, WHOLE) == 28_144_010
    return spec


@pytest.fixture(scope="module")
def weights(vgg: ModelSpec) -> dict[str, np.ndarray]:
    return random_arrays(vgg, WHOLE, scale=0.02)


@pytest.fixture(scope="module")
def dense(vgg: ModelSpec, weights: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Job:
    return job(tmp_path_factory.mktemp("dense"), vgg, weights, [WHOLE], RECIPE)


class Worker:
    """A worker in half a gigabyte, or without a limit."""

    def __init__(self, data: Path, limit: int, engine: str) -> None:
        heard: queue.Queue = queue.Queue()
        source = json.dumps({"source": "npz", "path": str(data), "validation": 0.0, "test": 0.0})
        self.heard = heard
        self.child = Child("worker", command(source, engine=engine, preload=True), heard.put, env=surroundings())
        resource.prlimit(self.child.pid, resource.RLIMIT_DATA, (limit, limit))
        ready = self.next()
        assert isinstance(ready, Ready), ready
        self.budget = LIMIT - ready.bytes_base

    def next(self):
        event = self.heard.get(timeout=100.0)
        return event if isinstance(event, Ended) else event.frame

    def do(self, order: Job):
        self.child.send(order)
        while isinstance(frame := self.next(), Progress):
            pass
        return frame


@pytest.fixture
def start(vgg: ModelSpec, tmp_path: Path) -> Iterator[object]:
    rng, started = np.random.default_rng(0), []
    x = rng.random((SAMPLES, *vgg.input_shape), np.float32)
    np.savez(tmp_path / "data.npz", x=x, y=np.arange(SAMPLES) % vgg.classes)

    def worker(limit: int = LIMIT, engine: str = "torch") -> Worker:
        started.append(Worker(tmp_path / "data.npz", limit, engine))
        return started[-1]

    yield worker
    for one in started:
        one.child.kill()
        one.child.close()


def test_dense_is_refused_before_anything_is_taken(start, vgg: ModelSpec, dense: Job) -> None:
    worker = start()
    before = proc_memory(worker.child.pid, "VmHWM")
    said = worker.do(dataclasses.replace(dense, bytes_budget=worker.budget))
    assert isinstance(said, Failed), said
    assert said.reason == "memory"
    assert said.bytes_needed == memory.predict(vgg, WHOLE, RECIPE).bound > worker.budget
    assert proc_memory(worker.child.pid, "VmHWM") - before < 8 * MIB


def test_dense_dies_if_it_is_forced(start, dense: Job) -> None:
    """A micro-batch that is given is not questioned, and no budget is set: what stands is the kernel's limit alone."""
    worker = start()
    said = worker.do(dataclasses.replace(dense, micro_batch=RECIPE.batch))
    if isinstance(said, Failed):
        print(f"\n{said.reason} at {said.bytes_peak / MIB:.0f} MiB above base: {said.detail[:200]}")
        assert said.reason == "oom"
        said = worker.next()
    assert isinstance(said, Ended), said
    print(f"\nended with {said.code}")
    assert said.code == 3 or said.code < 0


def test_dense_lives_where_there_is_more_and_takes_what_was_predicted(start, vgg: ModelSpec, dense: Job) -> None:
    """The control: nothing but the limit kills it, and by memory that it really needs."""
    worker = start(resource.RLIM_INFINITY)
    said = worker.do(dataclasses.replace(dense, micro_batch=RECIPE.batch))
    assert isinstance(said, Done), said
    told(said)
    predicted = memory.predict(vgg, WHOLE, RECIPE)
    assert worker.budget < said.usage.bytes_peak <= predicted.bound
    assert abs(predicted.peak - said.usage.bytes_peak) <= 0.15 * said.usage.bytes_peak


def test_a_tenth_of_the_weights_trains(start, vgg: ModelSpec, weights: dict[str, np.ndarray], tmp_path: Path) -> None:
    masks = some_masks(vgg, DENSITY)
    worker = start()
    made = masked_job(tmp_path / "sparse", vgg, weights, masks, RECIPE, budget=worker.budget)
    kept = sum(made.order.structures[0].kept.values())
    assert kept == pytest.approx(DENSITY * 28.1e6, rel=0.01)
    said = worker.do(made)
    assert isinstance(said, Done), said
    told(said)
    assert said.usage.micro_batch == RECIPE.batch
    assert 0 < said.usage.bytes_peak <= worker.budget


def test_a_narrow_width_trains(start, vgg: ModelSpec, weights: dict[str, np.ndarray], tmp_path: Path) -> None:
    worker = start()
    widths = nested(vgg, 4)
    fits = fitting.fit(vgg, [widths.narrowed(c) for c in range(5)], RECIPE, fitting.Means(worker.budget))
    assert fits is not None
    assert 0 < fits.capacity < 4, "the whole is refused, and it need not be the narrowest"
    made = job(tmp_path / "narrow", vgg, weights, [widths.narrowed(fits.capacity)], RECIPE, budget=worker.budget)
    said = worker.do(made)
    assert isinstance(said, Done), said
    told(said)
    assert 0 < said.usage.bytes_peak <= min(worker.budget, fits.bytes_bound)


def told(done: Done) -> None:
    """Print the figures (pytest -s), and hold that what came of it is numbers, and not few."""
    usage = done.usage
    print(
        f"\nbase {usage.bytes_base / MIB:.0f} MiB, peak above it {usage.bytes_peak / MIB:.0f} of"
        f" {usage.bytes_budget / MIB:.0f} MiB, {usage.seconds:.1f} s, loss {done.metrics['loss']:.3f}"
    )
    assert np.isfinite(done.metrics["loss"])
    assert done.update_ref is not None
    assert done.update_ref.size > MIB


def test_without_torch_the_whole_trains(start, vgg: ModelSpec, dense: Job) -> None:
    worker = start(engine="native")
    said = worker.do(dataclasses.replace(dense, bytes_budget=worker.budget))
    assert isinstance(said, Done), said
    told(said)
    predicted = prices.training("native")(vgg, WHOLE, RECIPE)
    assert said.usage.bytes_peak <= predicted.bound <= worker.budget
    assert abs(predicted.peak - said.usage.bytes_peak) <= 0.05 * said.usage.bytes_peak
