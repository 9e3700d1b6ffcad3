"""Making an engine ready: the first use of each kind of layer pages in code and builds kernels, which no order is to pay."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from edge_runtime import rules
from edge_runtime.engines import Make, open_engine
from wire import zoo
from wire.messages import Recipe
from wire.spec import Structure, tensor_shapes


@functools.cache
def warm(name: str, threads: int, timings: Path | None = None) -> Make:
    """Load an engine and train one tiny step; see `edge_runtime.engines.open_engine`. Done once in a process."""
    make = open_engine(name, threads, timings)
    spec, whole = zoo.by_name("lenet-5"), Structure()
    engine = make()
    engine.load(spec, whole, {t: np.zeros(shape, np.float32) for t, shape in tensor_shapes(spec, whole).items()})
    x, y = np.zeros((32, *spec.input_shape), np.float32), np.zeros(32, np.int64)
    engine.evaluate(x, y)
    rules.find("sgd").train(rules.Task(Recipe(clip=1.0), engine, x, y, 0, len(x), lambda *_: None))
    return make
