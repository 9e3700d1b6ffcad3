"""Weights that several nodes use: the gradient so far waits for the next share, and is counted."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch.nn.functional as F
from torch import nn

from edge_runtime.engines import Update, open_engine
from edge_runtime.models.export import export
from tests.support.models import random_arrays
from tests.support.tracked import peak_of_step
from tests.unit.test_export_lies import Made
from wire import memory
from wire.messages import Recipe
from wire.native import memory as native
from wire.spec import Structure
from wire.walk import Walk, arrays, most, several

WHOLE = Structure()
SIDE = 256
LOSS = 1 << 10
"""What labels, odds and the loss take, which the walk leaves out."""


def linear(uses):
    def how(m, x):
        value = F.relu(m.first(x))
        for _ in range(uses):
            value = F.relu(m.again(value))
        return m.last(value)

    layers = {"first": nn.Linear(8, SIDE), "again": nn.Linear(SIDE, SIDE), "last": nn.Linear(SIDE, 3)}
    return export(Made(how, **layers), (8,)).spec


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("uses", [1, 2, 3])
def test_the_walk_has_every_gradient_that_torch_makes(uses, keep):
    spec = linear(uses)
    walk = Walk(spec, WHOLE, 2, backward=True)
    found, seen = most(walk, arrays(walk, inside=False)), peak_of_step(spec, WHOLE, 2, keep=keep)
    assert seen - LOSS <= found <= 1.05 * seen
    assert sorted(several(spec.nodes)) == ([] if uses == 1 else ["again.bias", "again.weight"])


def test_the_native_engine_takes_for_a_fused_step_what_is_predicted():
    spec, engine, recipe = linear(2), open_engine("native")(), Recipe(batch=2)
    assert not memory.holds_gradients(recipe, 2)
    engine.load(spec, WHOLE, random_arrays(spec, WHOLE, scale=0.05))
    x, y = np.zeros((2, 8), np.float32), np.zeros(2, np.int64)
    held = engine.bytes_of_weights()
    tracemalloc.start()
    try:
        engine.forward_backward(x, y, update=Update(0.1))
        (_, peak) = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held + peak <= native.predict(spec, WHOLE, recipe).peak
