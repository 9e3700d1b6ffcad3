"""What closing a round takes of the coordinator's memory and time: with ten answers, and with a hundred.

``python -m tests bench join --json``. A fresh process makes a model of 4.8 million weights, plans a round and closes it from
updates that lie in a spool, as a coordinator's child does. The figure is its high-water mark above what it held before it
closed, in models (the bytes of all weights). An update's pages are the kernel's, yet they count while they are mapped.

The targets are what `coordinator.blocks.aggregate` promises: one sum, which becomes the new model, and one answer; with a
quarter of a model for all that is small. Where a method holds a momentum, its new one takes the answer's place.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from coordinator.algorithm import DeviceView, State, rng_of
from coordinator.algorithms import by_name
from coordinator.answers import Answers
from coordinator.blocks.initial import initial_weights
from tests.bench import Row, outcome
from tests.support.mosquitto import proc_memory
from wire.builders import mlp
from wire.messages import BlobRef, Reply, Usage
from wire.spec import ModelSpec, Structure, parameter_count, tensor_shapes
from wire.spool import Spool
from wire.tensor import write_blob

MODELS = {"fedavg": 2.25, "heterofl": 2.25, "fedmp": 2.25, "nestfl": 2.25, "fledge": 2.25}
"""Algorithm to the models that closing a round may take."""
FEW, MANY = 10, 100
_RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Has glibc give freed arrays back at once; what it kept would hide in what the process held before."""
_BUDGETS = (1 << 40, 48 << 20, 24 << 20)
"""Bytes that the devices have, in turns; the second and third cannot hold the whole model."""


def run() -> dict[str, object]:
    """Measure and give the result in the bench shape."""
    rows: list[Row] = []
    for name, most in MODELS.items():
        few, many = (_child(name, count) for count in (FEW, MANY))
        rows.append(Row(name, f"peak with {FEW} answers", few["models"], "models", "lower", most))
        rows.append(Row(name, f"peak with {MANY} answers", many["models"], "models", "lower", most))
        more = many["models"] - few["models"]
        rows.append(Row(name, f"peak with {MANY}, less with {FEW}", more, "models", "lower", 0.1))
        rows.append(Row(name, f"time for each of {MANY} answers", 1e3 * many["seconds"] / MANY, "ms", "lower"))
    return outcome("join", rows)


def _child(name: str, count: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="join-") as folder:
        command = [sys.executable, "-m", "tests.bench.join", name, str(count), folder]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **_RETURNED})
    found: dict[str, float] = json.loads(done.stdout)
    return found


def measure(name: str, count: int, folder: Path) -> dict[str, float]:
    """Close a round of `count` answers; gives the peak in models, and the seconds."""
    spec, algorithm = mlp("wide", (784,), 10, (2000, 1600)), by_name(name)
    views = tuple(DeviceView(f"d{i:03}", _BUDGETS[i % len(_BUDGETS)], samples=50) for i in range(3 * count))
    state, drafts = algorithm.plan(algorithm.init(spec, initial_weights(spec, 0), {}), 1, views, rng_of(0, 1))
    spool = Spool(folder)
    known: dict[int, BlobRef] = {}  # by capacity: all answers of a width are one file
    replies = []
    for draft in drafts[:count]:
        structure = draft.structure
        if structure.capacity not in known:
            known[structure.capacity] = _written(spool, spec, structure)
        update = known[structure.capacity]
        replies.append(Reply("ab" * 8, draft.device, "cd" * 8, structure, update, "", 50, {}, Usage()))
    if len(replies) != count:
        raise AssertionError(f"{name}: {len(replies)} drafts for {count} answers")
    del drafts, views
    return _closed(name, state, Answers(spool, spec, tuple(replies)))


def _closed(name: str, state: State, answers: Answers) -> dict[str, float]:
    Path("/proc/self/clear_refs").write_text("5", "ascii")  # the high-water mark starts anew
    before, began = proc_memory(os.getpid(), "VmRSS"), time.perf_counter()
    after = by_name(name).close(state, answers)
    seconds, peak = time.perf_counter() - began, proc_memory(os.getpid())
    if all(np.array_equal(after.weights[key], array) for key, array in state.weights.items()):
        raise AssertionError("the round has changed nothing")
    return {"models": (peak - before) / (4 * parameter_count(state.spec, Structure())), "seconds": seconds}


def _written(spool: Spool, spec: ModelSpec, structure: Structure) -> BlobRef:
    rng = np.random.default_rng(1)
    update = {key: 0.01 * rng.standard_normal(s, np.float32) for key, s in tensor_shapes(spec, structure).items()}
    path = spool.root / ".update"
    write_blob(path, "update", update)
    return spool.add_file(path)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))))
