"""How a worker keeps to its budget: what says that memory has run out, what is left in it, and what is timed at all."""

from __future__ import annotations

import dataclasses
import os
import resource
import subprocess
import sys
from typing import Any

import pytest

from edge_runtime import holding
from edge_runtime.engines import Choice
from edge_runtime.memory import guard
from edge_runtime.spawn import surroundings
from tests.support.models import random_arrays
from tests.support.orders import masked_job, some_masks
from wire import memory, zoo
from wire.errors import BudgetExceeded
from wire.job import Job
from wire.messages import Recipe
from wire.spec import ModelSpec, Structure
from wire.structure import masked

MIB = 1 << 20
MODEL = "lenet-5"
Asked = tuple[ModelSpec, dict[str, Any], Job]


@pytest.mark.parametrize(
    "text",
    [
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to",
        "could not create a primitive",
        "could not create a memory object",
        "could not create a primitive descriptor for the convolution forward propagation primitive",
        "could not execute a primitive",
        "std::bad_alloc",
        "Resource temporarily unavailable",
    ],
)
def test_libraries_say_in_many_words_that_memory_has_run_out(text: str) -> None:
    assert guard.starved(RuntimeError(text))


@pytest.mark.parametrize(
    "text", ["mat1 and mat2 shapes cannot be multiplied (32x400 and 120x84)", "could not open a file", ""]
)
def test_other_errors_are_no_want_of_memory(text: str) -> None:
    assert not guard.starved(RuntimeError(text))


def test_what_earlier_orders_have_left_is_taken_from_the_next_ones_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"VmRSS": 200 * MIB, "VmData": 300 * MIB, "VmHWM": 200 * MIB}
    walls = []
    monkeypatch.setattr(guard, "_field", said.__getitem__)
    monkeypatch.setattr(guard.resource, "setrlimit", lambda _, limits: walls.append(limits[0]))
    gauge = guard.Gauge()
    gauge.rested()
    assert gauge.bytes_left == 0, "no engine yet: nothing to compare with"
    gauge.begin("torch")
    gauge.enclose(40 * MIB)
    said |= {"VmRSS": 206 * MIB, "VmData": 330 * MIB}
    gauge.rested()
    gauge.begin("torch")
    gauge.enclose(40 * MIB)
    gauge.enclose(1)
    gauge.enclose(0)
    assert gauge.bytes_left == 6 * MIB
    slack, none = guard.WALL_SLACK, resource.getrlimit(resource.RLIMIT_DATA)[1]
    assert walls == [340 * MIB + slack, 364 * MIB + slack, 330 * MIB + 1 + slack, none]


FITS = """
import numpy as np
from edge_runtime import rules
from edge_runtime.memory import guard
from edge_runtime.warm import warm
from wire import memory, zoo
from wire.messages import Recipe
from wire.spec import Structure, tensor_shapes
guard.settle_allocator()
make, gauge, whole = warm("torch", 1), guard.Gauge(), Structure()
engine, spec, recipe = make(), zoo.by_name("mobilenet-v3-small"), Recipe(batch=16, clip=1.0, steps=2)
gauge.begin("torch")
gauge.enclose(memory.predict(spec, whole, recipe, 16).bound)
engine.load(spec, whole, {t: np.zeros(s, np.float32) for t, s in tensor_shapes(spec, whole).items()})
x, y = np.zeros((32, *spec.input_shape), np.float32), np.zeros(32, np.int64)
rules.find("sgd").train(rules.Task(recipe, engine, x, y, 0, len(x), lambda *_: None))
print("fine", gauge.peak())
"""


def test_the_wall_ends_no_order_that_fits() -> None:
    """What oneDNN maps for dozens of different kernels and hardly touches was more than the wall left."""
    env = {**os.environ, **surroundings()}
    done = subprocess.run(
        [sys.executable, "-c", FITS], env=env, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stdout.startswith("fine"), done.stderr


class _Loading:
    """As much of an engine as is loaded; it refuses what `refuses` says."""

    def __init__(self, *, refuses: bool = False) -> None:
        self.refuses = refuses
        self.choices: list[Choice] = []

    def load(self, _: ModelSpec, __: Structure, ___: object, ____: object, choice: Choice) -> None:
        self.choices.append(choice)
        if self.refuses and not choice.ways:
            raise BudgetExceeded("no layout")


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    spec = zoo.by_name(MODEL)
    masks = some_masks(spec, 0.3) | some_masks(spec, 0.9, names={"fc3.weight"})
    folder = tmp_path_factory.mktemp("job")
    return spec, masks, masked_job(folder, spec, random_arrays(spec, Structure()), masks, Recipe(batch=32, clip=1.0))


def choices(asked: Asked, engine: _Loading, budget: int, left: int = 0) -> list[Choice]:
    spec, masks, job = asked
    job = dataclasses.replace(job, bytes_budget=budget)
    loading: Any = engine  # a stand-in
    holding.load(loading, (spec, job.order.structures[0]), masks, job, 32, pinned=False, bytes_left=left)
    return engine.choices


def test_ways_are_timed_only_where_two_steps_fit_beside_what_is_left(
    asked: Asked,
) -> None:
    """They are timed beside each other: that took a worker over a budget which held one step."""
    spec, masks, job = asked
    found = memory.predict(spec, masked(masks), job.order.recipe, 32)
    two = found.bound + int(memory.MARGIN * found.peak)
    (timed,) = choices(asked, _Loading(), two)
    assert timed.ways == {}
    for budget, left in ((two - 1, 0), (two, 1), (found.bound, 0)):
        (held,) = choices(asked, _Loading(), budget, left)
        assert set(held.ways) == set(masks), "nothing is timed"
    assert choices(asked, _Loading(), 0)[0].ways == {}, "without a budget all may be"


def test_what_is_not_timed_is_held_by_its_density_as_far_as_that_fits(
    asked: Asked,
) -> None:
    spec, masks, job = asked
    thick = frozenset({"fc3.weight"})
    dense = holding.price(job, spec, masked(masks), 32, thick).bound
    assert dense > holding.price(job, spec, masked(masks), 32).bound
    (held,) = choices(asked, _Loading(), dense)
    assert {name for name, way in held.ways.items() if way == "dense"} == thick
    (held,) = choices(asked, _Loading(), dense - 1)
    assert set(held.ways.values()) == {"sparse"}
    assert not held.allows(thick)


def test_a_layer_that_has_no_layout_here_needs_to_fit_but_once(
    asked: Asked,
) -> None:
    first, second = choices(asked, _Loading(refuses=True), 1 << 30)
    assert (first.ways, bool(second.ways)) == ({}, True)
