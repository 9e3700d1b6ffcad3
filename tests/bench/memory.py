"""Predicted against measured memory of real workers, over models, widths, batches and recipes.

`python -m tests bench memory --json`. Every case is a fresh worker that does the same order three times; its peak is
the highest of the three, above the base that it had before the first. A bound that is exceeded misses its target.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import queue
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np

from edge_runtime.spawn import command, surroundings
from tests.bench import Row, outcome
from tests.support.models import random_arrays
from tests.support.orders import job, masked_job, some_masks
from wire import memory, zoo
from wire.child import Child, Ended
from wire.job import Done, Failed, Job, Ready
from wire.messages import Recipe
from wire.spec import ModelSpec, Structure
from wire.structure import masked

MIB = 1 << 20
KEPT = (0.2, 0.4, 0.6, 0.8, 1.0)
CASES = {
    "lenet-300-100": ((1, 128), (0, 4)),
    "lenet-5": ((32, 128), (0, 4)),
    "conv-2": ((8, 128), (0, 2, 4)),
    "digits-cnn": ((16, 32, 256), (0, 1, 2, 3, 4)),
}
"""Model to batches and capacities."""

RECIPES = {
    "clip": Recipe(clip=1.0),
    "fused": Recipe(),
    "momentum": Recipe(clip=1.0, momentum=0.9),
    "sandwich": Recipe(clip=1.0, knobs={"widths": 1.0}),
}


MASKED = {
    "sgd": {},
    "momentum": {"momentum": 0.9},
    "importance, all rounds": {"rule": "importance"},
    "importance, largest, one round": {"rule": "importance", "knobs": {"window": 1.0, "send": 1.0}},
    "dpf": {"rule": "dpf"},
}
"""What masked orders are measured with; the largest are as many as are kept."""
DENSITIES = (0.2, 0.05)


def run() -> dict[str, object]:
    """Measure and give the result in the bench shape."""
    rows: list[Row] = []
    errors, shares, peaks = [], [], {}
    with tempfile.TemporaryDirectory() as folder:
        rows += _start(Path(folder))
        for number, (model, batch, capacity, recipe) in enumerate(_cases()):
            spec = zoo.by_name(model)
            structure = nested(spec, capacity)
            asked = Recipe(**{**_fields(RECIPES[recipe]), "batch": batch})
            found = memory.predict(spec, structure, asked)
            measured = _measure(Path(folder) / str(number), spec, structure, asked)
            case = f"{model}, batch {batch}, width {KEPT[capacity]:g}, {recipe}"
            rows.append(Row(case, "peak", measured / MIB, "MiB", "lower", found.bound / MIB))
            rows.append(Row(case, "predicted peak", found.peak / MIB, "MiB", "lower"))
            errors.append(abs(found.peak - measured) / MIB)
            shares.append(measured / found.bound)
            peaks[case] = measured
        sparse = list(_masked_rows(Path(folder)))
        rows += sparse
        shares += [row.value / row.target for row in sparse if row.target is not None]
    wide, narrow = (peaks[f"digits-cnn, batch 32, width {kept}, sandwich"] for kept in ("1", "0.2"))
    rows += [
        Row("all", "mean absolute error of the prediction", statistics.mean(errors), "MiB", "lower", 3.0),
        Row("all", "largest share of a bound that was used", max(shares), "of the bound", "lower", 1.0),
        Row("digits-cnn", "widest less narrowest, measured", (wide - narrow) / MIB, "MiB", "higher", 20.0),
    ]
    return outcome("memory", rows)


def _cases() -> Iterator[tuple[str, int, int, str]]:
    for model, (batches, capacities) in CASES.items():
        for batch, capacity in itertools.product(batches, capacities):
            yield model, batch, capacity, "clip"
    for recipe in ("fused", "momentum", "sandwich"):
        for model, capacity in itertools.product(("conv-2", "digits-cnn"), (0, 4)):
            yield model, 32, capacity, recipe


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
        make = functools.partial(_masked_job, spec, arrays, masks, recipe, found.bound)
        measured = _peak(place, spec, recipe, make)
        case = f"conv-2, density {density:g}, batch 20, {name}"
        yield Row(case, "peak", measured / MIB, "MiB", "lower", found.bound / MIB)
        yield Row(case, "predicted peak", found.peak / MIB, "MiB", "lower")


def _masked_job(
    spec: ModelSpec, arrays: dict[str, Any], masks: dict[str, Any], recipe: Recipe, bound: int, place: Path, turn: int
) -> Job:
    """Grant what is predicted, as an agent does: a worker without a budget also times what is dense."""
    made: Job = masked_job(place, spec, arrays, masks, recipe, number=turn, budget=bound)
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


@contextmanager
def _worker(data: Path, preload: bool) -> Iterator[tuple[Child, queue.Queue[object], Ready]]:
    heard: queue.Queue[object] = queue.Queue()
    source = json.dumps({"source": "npz", "path": str(data), "validation": 0.0, "test": 0.1})
    child = Child("worker", command(source, preload=preload), heard.put, env=surroundings())
    try:
        ready = _frame(heard)
        assert isinstance(ready, Ready), ready
        yield child, heard, ready
    finally:
        child.kill()
        child.close()


class Measuring:
    """One worker that nothing limits, for what orders take then."""

    def __init__(self, data: Path) -> None:
        self._worker = _worker(data, preload=True)

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


def _peak(folder: Path, spec: ModelSpec, recipe: Recipe, make: Callable[[Path, int], Job]) -> int:
    """Have a fresh worker do three orders, each going on from the state of the one before; give the highest peak."""
    folder.mkdir()
    peak, keep = 0, ""
    with _worker(_data(folder / "data.npz", spec, 3 * recipe.batch + 16), preload=True) as (child, heard, _):
        for number in range(1, 4):
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


def _fields(recipe: Recipe) -> dict[str, object]:
    return {name: getattr(recipe, name) for name in Recipe.__dataclass_fields__}
