"""Adam in blocks against torch's own, and a first step by hand."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

from edge_runtime.engines import Update
from edge_runtime.engines.update import BLOCK, Adam, apply_adam

SHAPES = {"small": (3,), "matrix": (7, 5), "long": (2 * BLOCK + 11,)}


def zeros():
    return {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}


def normal(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: (scale * rng.standard_normal(shape)).astype(np.float32) for name, shape in SHAPES.items()}


def test_first_step_by_hand():
    # Without its correction the first mean is 0.1 g and the second 0.001 g^2; with it, g and g^2: a step of the rate.
    w, g = np.array([1.0, 1.0, 1.0], np.float32), np.array([4.0, -0.5, 0.0], np.float32)
    state = Adam({"w": np.zeros(3, np.float32)}, {"w": np.zeros(3, np.float32)})
    apply_adam({"w": w}, {"w": g}, Update(0.25), state)
    np.testing.assert_allclose(w, [0.75, 1.25, 1.0], atol=1e-6)
    np.testing.assert_allclose(state.first["w"], [0.4, -0.05, 0.0], atol=1e-6)
    np.testing.assert_allclose(state.second["w"], [0.016, 0.00025, 0.0], atol=1e-8)
    assert state.steps == 1


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_twelve_steps_are_those_of_torch(decay):
    params, state = normal(1), Adam(zeros(), zeros())
    leaves = {name: torch.from_numpy(array.copy()).requires_grad_() for name, array in params.items()}
    theirs = torch.optim.Adam(leaves.values(), lr=0.01, weight_decay=decay)
    for step in range(12):
        grads = normal(10 + step, scale=10.0 ** (step % 5 - 3))
        for name, leaf in leaves.items():
            leaf.grad = torch.from_numpy(grads[name].copy())
        theirs.step()
        apply_adam(params, grads, Update(0.01, decay=decay), state)
        for name, leaf in leaves.items():
            np.testing.assert_allclose(params[name], leaf.detach().numpy(), atol=1e-6, rtol=1e-6)
    assert state.steps == 12
    kept = theirs.state[leaves["matrix"]]
    np.testing.assert_allclose(state.first["matrix"], kept["exp_avg"].numpy(), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(state.second["matrix"], kept["exp_avg_sq"].numpy(), rtol=1e-5, atol=1e-7)


def test_no_array_is_made_that_is_as_long_as_a_tensor():
    shape = {"w": np.zeros(64 * BLOCK, np.float32)}
    params, grads = ({"w": np.ones(64 * BLOCK, np.float32)} for _ in range(2))
    state = Adam(shape, {"w": np.zeros(64 * BLOCK, np.float32)})
    tracemalloc.start()
    apply_adam(params, grads, Update(0.1, decay=0.1), state)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * BLOCK * 4
