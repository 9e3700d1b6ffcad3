"""Predicted against measured memory of real workers, over models, batches, ways to hold weights, and recipes.

`python -m tests bench memory --json`. Every case of the grid is a copy of a warm worker (`tests.bench._forked`), every other
a fresh worker. It does the same order twice or more, each going on from the state of the one before; its peak is the highest,
by the kernel's own account, above the base that it had before the first. An error may be 15 % of the peak or 4 MiB, whichever
is more, and a bound that is exceeded misses its target. The grid takes about ten minutes where nothing else runs; cases are
told on standard error as they are done.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import queue
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np

from edge_runtime.spawn import command, surroundings
from tests.bench import Row, outcome
from tests.bench._forked import Forked
from tests.support.models import random_arrays
from tests.support.orders import job, masked_job, some_masks
from tests.support.sequences import windows
from wire import memory, prices, zoo
from wire.child import Child, Ended
from wire.job import Done, Failed, Job, Ready
from wire.masked import maskable
from wire.messages import Recipe
from wire.spec import ModelSpec, Structure
from wire.structure import cut, masked

MIB = 1 << 20
KEPT = (0.2, 0.4, 0.6, 0.8, 1.0)
MODELS = (*zoo.MODELS, "har-lstm")
BATCHES = (1, 8, 32, 128)
KINDS = ("dense", "narrow", "masked")
"""Whole, 0.4 of the channels of every layer, a tenth of the weights of whatever can be masked; `both` is the latter two."""

UPDATES = {"sgd": Recipe(), "momentum": Recipe(momentum=0.9)}
LEFT_OUT = {
    ("resnet-18", 128, "narrow"),
    ("resnet-18", 128, "masked"),
    ("mobilenet-v3-small", 128, "masked"),
}
"""A minute a case and more; their smaller batches are there."""

SHARE, LEAST = 0.15, 4 << 20
"""What an error may be: a share of the measured peak, or so many bytes where that is more."""

BOTH_WAYS = (("lenet-5", 32, "dense"), ("conv-2", 8, "narrow"), ("conv-2", 8, "masked"), ("har-lstm", 8, "dense"))
RECIPES = {
    "clip": Recipe(clip=1.0),
    "sandwich": Recipe(clip=1.0, knobs={"widths": 1.0}),
}
"""What the grid has not: gradients that are held, and widths that are trained together."""


MASKED = {
    "sgd": {},
    "momentum": {"momentum": 0.9},
    "importance, all rounds": {"rule": "importance"},
    "importance, largest, one round": {"rule": "importance", "knobs": {"window": 1.0, "send": 1.0}},
    "dpf": {"rule": "dpf"},
}
"""What masked orders are measured with; the largest are as many as are kept."""
DENSITIES = (0.2, 0.05)


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One case of the grid; the density is that of a masked one."""

    model: str
    batch: int
    kind: str
    update: str = "sgd"
    engine: str = "torch"
    density: float = 0.1

    @property
    def name(self) -> str:
        """Name it in a row."""
        return f"{self.model}, batch {self.batch}, {self.kind}, {self.update}"

    def spec(self) -> ModelSpec:
        """Build its model."""
        return windows() if self.model == "har-lstm" else zoo.by_name(self.model)

    def recipe(self) -> Recipe:
        """Give how it trains."""
        return dataclasses.replace(UPDATES[self.update], batch=self.batch, steps=2, rate=1e-3)

    def predicted(self, structure: Structure) -> memory.Prediction:
        """Give what is predicted of its order."""
        return prices.training(self.engine)(self.spec(), structure, self.recipe())

    def order(self, spec: ModelSpec) -> tuple[Structure, Callable[[Path, int], Job]]:
        """Give the part that is trained, and what makes its job in a folder, with the round's number."""
        arrays, recipe = random_arrays(spec, Structure(), scale=0.05), self.recipe()
        structure = nested(spec, KEPT.index(0.4)) if self.kind in ("narrow", "both") else Structure()
        if self.kind in ("masked", "both"):
            masks = some_masks(spec, self.density, names=maskable(spec), width=structure)
            arrays, structure = cut(spec, arrays, structure), masked(masks, structure)
            bound = self.predicted(structure).bound
            return structure, functools.partial(_masked_job, (spec, structure), arrays, masks, recipe, bound)
        return structure, lambda at, turn: job(at, spec, arrays, [structure], recipe, number=turn)


def run() -> dict[str, object]:
    """Measure and give the result in the bench shape."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        rows = _start(folder)
        measured = list(grid(folder))
        for case, found, peak in measured:
            rows += case_rows(case.name, found, peak)
        both, special = list(_both_ways(folder)), list(_special_rows(folder))
        sparse = list(_masked_rows(folder))
    wide, narrow = (
        row.value
        for kept in ("1", "0.2")
        for row in special
        if (row.case, row.measure) == (f"digits-cnn, batch 32, width {kept}, sandwich", "peak")
    )
    rows += [*both, *special, *sparse, *_summary(measured)]
    shares = [row.value / row.target for row in rows if row.measure == "peak" and row.target is not None]
    rows += [
        Row("all", "largest share of a bound that was used", max(shares), "of the bound", "lower", 1.0),
        Row("digits-cnn", "widest less narrowest, measured", wide - narrow, "MiB", "higher", 20.0),
    ]
    return outcome("memory", rows)


Measured = tuple[Case, memory.Prediction, int]


def _cases() -> list[Case]:
    every = itertools.product(MODELS, BATCHES, KINDS, UPDATES)
    return [Case(*words) for words in every if words[:3] not in LEFT_OUT]


def grid(folder: Path, cases: Sequence[Case] | None = None) -> Iterator[Measured]:
    """Measure cases of one engine, as many at a time as there are cores: memory is each worker's own."""
    cores = len(os.sched_getaffinity(0))
    waiting: queue.SimpleQueue[Forked] = queue.SimpleQueue()
    cases = _cases() if cases is None else cases

    def one(numbered: tuple[int, Case]) -> Measured:
        number, case = numbered
        began, worker = time.monotonic(), waiting.get()
        try:
            found = _forked(worker, folder / f"grid-{number}", case)
        finally:
            waiting.put(worker)
        told = f"predicted {found[1].peak / MIB:.1f} MiB, measured {found[2] / MIB:.1f}"
        print(f"{number + 1}/{len(cases)} {case.name}: {told}, {time.monotonic() - began:.1f} s", file=sys.stderr)
        return found

    with ExitStack() as stack, ThreadPoolExecutor(cores) as pool:
        for _ in range(cores):
            waiting.put(stack.enter_context(Forked(cases[0].engine)))
        yield from pool.map(one, enumerate(cases))


def _forked(worker: Forked, folder: Path, case: Case, orders: int = 2) -> Measured:
    spec = case.spec()
    structure, make = case.order(spec)
    folder.mkdir()
    data = _data(folder / "data.npz", spec, 2 * case.batch + 16)
    jobs = [make(folder / str(number), number) for number in range(1, orders + 1)]
    peaks = worker.peaks(_source(data), jobs)
    shutil.rmtree(folder)
    return case, case.predicted(structure), max(peaks)


def case_rows(
    case: str, found: memory.Prediction, measured: int, allowed: tuple[float, int] = (SHARE, LEAST)
) -> list[Row]:
    """Give what was measured of a case; its error may be a share of the peak or so many bytes, whichever is more."""
    error, (share, least) = abs(found.peak - measured), allowed
    return [
        Row(case, "peak", measured / MIB, "MiB", "lower", found.bound / MIB),
        Row(case, "predicted peak", found.peak / MIB, "MiB", "lower"),
        Row(case, "error of the prediction", 100 * error / measured, "%", "lower"),
        Row(case, "error of the prediction", error / MIB, "MiB", "lower", max(share * measured, least) / MIB),
    ]


def _summary(measured: Sequence[Measured]) -> Iterator[Row]:
    """Give the mean error of the cases to which a share applies, and beside it that of all, where little may be much in %."""
    errors = [(abs(found.peak - peak) / peak, peak) for _, found, peak in measured]
    large = [error for error, peak in errors if peak >= LEAST]
    allowed = [abs(found.peak - peak) / max(SHARE * peak, LEAST) for _, found, peak in measured]
    yield Row("grid", "cases", len(measured), "cases", "higher")
    yield Row("grid", "mean error, peaks of 4 MiB and more", 100 * statistics.mean(large), "%", "lower", 8.0)
    yield Row("grid", "mean error, all peaks", 100 * statistics.mean(error for error, _ in errors), "%", "lower")
    yield Row("grid", "largest error, of what is allowed", max(allowed), "of it", "lower", 1.0)


def _both_ways(folder: Path) -> Iterator[Row]:
    """Measure cases in copies and in fresh workers: how far the first can be taken for the second."""
    with Forked() as worker:
        for number, words in enumerate(BOTH_WAYS):
            case = Case(*words)
            spec = case.spec()
            _, make = case.order(spec)
            copied = _forked(worker, folder / f"copy-{number}", case)[2]
            fresh = _peak(folder / f"fresh-{number}", spec, case.recipe(), make, 2)
            yield Row(case.name, "copied less fresh worker", abs(copied - fresh) / MIB, "MiB", "lower", LEAST / MIB)


def _special_rows(folder: Path) -> Iterator[Row]:
    """Measure recipes that the grid has not, in fresh workers and the widest and the narrowest width."""
    for number, (name, (model, batch), capacity) in enumerate(
        itertools.product(RECIPES, (("conv-2", 32), ("digits-cnn", 32)), (0, len(KEPT) - 1))
    ):
        spec = zoo.by_name(model)
        structure, recipe = nested(spec, capacity), dataclasses.replace(RECIPES[name], batch=batch)
        measured = _measure(folder / f"special-{number}", spec, structure, recipe)
        case = f"{model}, batch {batch}, width {KEPT[capacity]:g}, {name}"
        yield from case_rows(case, memory.predict(spec, structure, recipe), measured)


def _masked_rows(folder: Path) -> Iterator[Row]:
    """Measure masked Conv-2, under each rule that holds something of its own."""
    spec = zoo.by_name("conv-2")
    arrays = random_arrays(spec, Structure(), scale=0.05)
    for number, (density, (name, fields)) in enumerate(itertools.product(DENSITIES, MASKED.items())):
        masks = some_masks(spec, density)
        structure = masked(masks)
        recipe = Recipe(**{"batch": 20, "steps": 3, "rate": 1e-3, **fields})
        if recipe.knobs:
            most = {f"top.{tensor}": float(kept) for tensor, kept in structure.kept.items()}
            recipe = dataclasses.replace(recipe, knobs={**recipe.knobs, **most})
        found = memory.predict(spec, structure, recipe)
        place = folder / f"masked-{number}"
        make = functools.partial(_masked_job, (spec, structure), arrays, masks, recipe, found.bound)
        measured = _peak(place, spec, recipe, make)
        case = f"conv-2, density {density:g}, batch 20, {name}"
        yield Row(case, "peak", measured / MIB, "MiB", "lower", found.bound / MIB)
        yield Row(case, "predicted peak", found.peak / MIB, "MiB", "lower")


def _masked_job(
    model: tuple[ModelSpec, Structure],
    arrays: Mapping[str, Any],
    masks: Mapping[str, Any],
    recipe: Recipe,
    bound: int,
    place: Path,
    turn: int,
) -> Job:
    """Grant what is predicted, as an agent does: a worker without a budget also times what is dense."""
    spec, width = model
    made: Job = masked_job(place, spec, arrays, masks, recipe, width=width, number=turn, budget=bound)
    return made


def _start(folder: Path) -> list[Row]:
    """Measure what a worker is before its first order, without and with an engine."""
    rows = []
    data = _data(folder / "start.npz", zoo.by_name("digits-mlp"), 64)
    for case, preload in (("worker without an engine", False), ("worker with torch", True)):
        with _worker(data, preload) as (child, _, ready):
            ticks = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        seconds = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
        rows.append(Row(case, "resident at rest", ready.bytes_base / MIB, "MiB", "lower"))
        rows.append(Row(case, "time of the processor until ready", seconds, "s", "lower"))
    return rows


def _source(data: Path) -> dict[str, object]:
    return {"source": "npz", "path": str(data), "validation": 0.0, "test": 0.1}


@contextmanager
def _worker(data: Path, preload: bool, engine: str = "torch") -> Iterator[tuple[Child, queue.Queue[object], Ready]]:
    heard: queue.Queue[object] = queue.Queue()
    child = Child(
        "worker", command(json.dumps(_source(data)), engine=engine, preload=preload), heard.put, env=surroundings()
    )
    try:
        ready = _frame(heard)
        assert isinstance(ready, Ready), ready
        yield child, heard, ready
    finally:
        child.kill()
        child.close()


class Measuring:
    """One worker that nothing limits, for what orders take then."""

    def __init__(self, data: Path, engine: str = "torch") -> None:
        self._worker = _worker(data, preload=True, engine=engine)

    def __enter__(self) -> Self:
        self._child, self._heard, _ = self._worker.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.__exit__(None, None, None)

    def peak(self, made: Job) -> int:
        """Give the measured peak of a job, above base."""
        self._child.send(made)
        while not isinstance(frame := _frame(self._heard), Done):
            assert not isinstance(frame, Failed), frame
        return frame.usage.bytes_peak


def _frame(heard: queue.Queue[object]) -> object:
    event = heard.get(timeout=120)
    assert not isinstance(event, Ended), event
    return event.frame  # type: ignore[attr-defined] # the other event that a child has


def _measure(folder: Path, spec: ModelSpec, structure: Structure, recipe: Recipe) -> int:
    arrays = random_arrays(spec, Structure(), scale=0.05)
    return _peak(folder, spec, recipe, lambda at, turn: job(at, spec, arrays, [structure], recipe, number=turn))


def _peak(folder: Path, spec: ModelSpec, recipe: Recipe, make: Callable[[Path, int], Job], orders: int = 3) -> int:
    """Have a fresh worker do orders, each going on from the state of the one before; give the highest peak."""
    folder.mkdir()
    peak, keep = 0, ""
    with _worker(_data(folder / "data.npz", spec, 3 * recipe.batch + 16), preload=True) as (child, heard, _):
        for number in range(1, orders + 1):
            child.send(dataclasses.replace(make(folder / str(number), number), keep=keep))
            while not isinstance(frame := _frame(heard), Done):
                assert not isinstance(frame, Failed), frame
            peak, keep = max(peak, frame.usage.bytes_peak), frame.keep
    return peak


def _data(path: Path, spec: ModelSpec, count: int) -> Path:
    rng = np.random.default_rng(0)
    x = rng.random((count, *spec.input_shape), np.float32)
    np.savez(path, x=x, y=np.arange(count) % spec.classes)
    return path


def nested(spec: ModelSpec, capacity: int) -> Structure:
    """Give one of five nested widths."""
    widths = {
        g.name: tuple(memory.uniform(spec, kept).widths[g.name][0] for kept in KEPT) for g in spec.groups if g.prunable
    }
    return Structure(capacity, widths, "ab" * 32)
