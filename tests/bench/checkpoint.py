"""What recomputation saves and costs next to smaller passes, and how well both are predicted.

`python -m tests bench checkpoint --json`. Memory is measured in a fresh worker for each way, above its base; a bound that is
exceeded misses its target. Times are of one thread's processor, of ways that take turns in one process, next to the whole
batch at once; the prediction of time is only there to order ways, so that what is held against a target is the order.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edge_runtime import rules
from edge_runtime.engines import open_engine
from edge_runtime.memory.guard import settle_allocator
from tests.bench import Row, outcome
from tests.bench._paired import take_turns
from tests.bench.memory import MIB, Measuring
from tests.support.models import random_arrays
from tests.support.orders import job
from wire import memory, zoo
from wire.builders import Conv, cnn
from wire.effort import effort
from wire.messages import Recipe
from wire.passes import options
from wire.segments import Cuts
from wire.spec import ModelSpec, Structure

WHOLE = Structure()
ROUNDS = 3
CLEAR = 1.2
"""Ways whose predicted times are at least this many times apart are to be in the order that is measured."""


def models() -> dict[str, tuple[ModelSpec, int]]:
    """Give models and batches: blocks, a chain without norms, and a deep chain of batch norms."""
    norms = cnn("norms", (3, 32, 32), 10, tuple(Conv(16, norm="batch") for _ in range(8)), (32,))
    return {"8 norms": (norms, 32), "vgg-11": (zoo.by_name("vgg-11"), 16), "resnet-18": (zoo.by_name("resnet-18"), 8)}


def run() -> dict[str, object]:
    """Measure and give the result in the bench shape."""
    rows: list[Row] = []
    for name, (spec, batch) in models().items():
        rows += _memory(name, spec, batch)
        rows += _time(name, spec, batch)
    return outcome("checkpoint", rows)


def _ways(spec: ModelSpec, batch: int) -> dict[str, tuple[int, Cuts]]:
    found = options(spec, WHOLE)
    return {
        "the whole batch at once": (batch, ()),
        "run again, least": (batch, found[0]),
        "run again, most": (batch, found[-1]),
        "micro-batches of half": (batch // 2, ()),
        "micro-batches of one": (1, ()),
    }


def _memory(name: str, spec: ModelSpec, batch: int) -> Iterator[Row]:
    recipe = Recipe(batch=batch, steps=2, rate=1e-4)
    arrays = random_arrays(spec, WHOLE, scale=0.02)
    for way, (micro, cuts) in _ways(spec, batch).items():
        found = memory.predict(spec, WHOLE, recipe, micro, cuts=cuts)
        with tempfile.TemporaryDirectory() as folder:
            made = job(Path(folder) / "order", spec, arrays, [WHOLE], recipe, micro=micro)
            data = Path(folder) / "data.npz"
            x = np.random.default_rng(0).random((batch + 16, *spec.input_shape), np.float32)
            np.savez(data, x=x, y=np.arange(len(x)) % spec.classes)
            with Measuring(data) as worker:
                measured = worker.peak(dataclasses.replace(made, cuts=cuts))
        case = f"{name}, batch {batch}, {way}"
        yield Row(case, "peak", measured / MIB, "MiB", "lower", found.bound / MIB)
        yield Row(case, "predicted peak", found.peak / MIB, "MiB", "lower")


def _time(name: str, spec: ModelSpec, batch: int) -> Iterator[Row]:
    settle_allocator()  # as a worker does
    engine = open_engine("torch")()
    arrays, took = random_arrays(spec, WHOLE, scale=0.02), effort(spec, WHOLE)
    x = np.random.default_rng(0).random((batch, *spec.input_shape), np.float32)
    y = np.arange(batch, dtype=np.int64) % spec.classes
    recipe = Recipe(batch=batch, steps=1, rate=1e-6)

    def step(micro: int, cuts: Cuts) -> None:
        engine.load(spec, WHOLE, arrays)
        engine.recompute(cuts)
        rules.find("sgd").train(rules.Task(recipe, engine, x, y, 0, micro, lambda *_: None))

    ways = _ways(spec, batch)
    times = take_turns({way: functools.partial(step, *manner) for way, manner in ways.items()}, ROUNDS, 0.0)
    first = next(iter(ways))
    ratios = {way: statistics.median(a / b for a, b in zip(times[way], times[first], strict=True)) for way in ways}
    predicted = {way: took.step(batch, *manner) / took.step(batch, batch) for way, manner in ways.items()}
    for way in ways:
        case = f"{name}, batch {batch}, {way}"
        yield Row(case, "time of a step", ratios[way], "of the whole batch at once", "lower")
        yield Row(case, "predicted over measured time", predicted[way] / ratios[way], "", "higher")
    clear = [(a, b) for a, b in itertools.permutations(ways, 2) if predicted[b] > CLEAR * predicted[a]]
    wrong = sum(ratios[b] < ratios[a] for a, b in clear)
    yield Row(name, f"of {len(clear)} clear pairs of ways, predicted in the wrong order", wrong, "pairs", "lower", 0.0)
