"""What a step takes beside activations: gradients of a weight that is used again, and what a loss makes of many classes."""

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


@pytest.mark.parametrize("keep", [True, False])
def test_the_walk_has_what_a_loss_makes_of_many_classes(keep):
    spec = export(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 20_000)), (8,)).spec
    walk = Walk(spec, WHOLE, 32, backward=True)
    found, seen = most(walk, arrays(walk, inside=False)), peak_of_step(spec, WHOLE, 32, keep=keep)
    assert seen - LOSS <= found <= seen + LOSS


@pytest.mark.parametrize(("engine", "predict"), [("torch", memory.predict), ("native", native.predict)])
def test_logits_are_counted_as_often_as_they_are_held(engine, predict):
    batch, classes = 64, 20_000
    spec = export(nn.Sequential(nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, classes)), (8,)).spec
    held = (
        5 if engine == "torch" else 4
    )  # of the step before, of this one, its gradient; torch has the odds' beside, twice
    assert predict(spec, WHOLE, Recipe(batch=batch)).peak > held * 4 * batch * classes
