"""Making an engine ready: the first use of each kind of layer pages in code and builds kernels, which no order is to pay.

Loading torch runs through 80 MiB of its code once, to make itself known to Python, and never again: that is given back before
the first steps page in what orders use. With the native engine it is numpy and Python's own start, 9 MiB.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from edge_runtime import rules
from edge_runtime.engines import Make, available, open_engine
from edge_runtime.frugal import give_back, loading, take_back
from wire import zoo
from wire.messages import Recipe
from wire.prices import NATIVE
from wire.spec import Structure, tensor_shapes

_MODELS = ("digits-cnn", "lenet-5")
"""Their layers differ enough in size for a matrix product and a convolution to be done in more than one way."""


@functools.cache
def warm(name: str, threads: int, timings: Path | None = None) -> Make:
    """Load an engine and train tiny steps; see `edge_runtime.engines.open_engine`. Done once in a process."""
    name = name or next(iter(available()), "")
    if name != NATIVE:
        take_back()
    with loading():
        make = open_engine(name, threads, timings)
    give_back("" if name == NATIVE else name)
    for model in _MODELS[:1] if name == NATIVE else _MODELS:
        spec, whole = zoo.by_name(model), Structure()
        engine = make()
        engine.load(spec, whole, {t: np.zeros(shape, np.float32) for t, shape in tensor_shapes(spec, whole).items()})
        x, y = np.zeros((32, *spec.input_shape), np.float32), np.zeros(32, np.int64)
        engine.evaluate(x, y)
        rules.find("sgd").train(rules.Task(Recipe(clip=1.0), engine, x, y, 0, len(x), lambda *_: None))
    return make
