"""The proximal rule against a loop written from the local objective, with torch's own gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edge_runtime import rules
from edge_runtime.engines import Update
from edge_runtime.engines.update import Adam, apply_adam
from edge_runtime.rules import loop
from tests.support.by_torch import small_cnn_forward
from tests.support.engines import make as MAKE
from tests.support.models import batch, random_arrays, small_cnn
from tests.support.orders import some_masks
from wire import memory
from wire.errors import SpecError
from wire.messages import Recipe
from wire.spec import Structure

SPEC = small_cnn()
pytestmark = pytest.mark.usefixtures("every_engine")
WHOLE = Structure()
MU = {"mu": 0.5}


def trained(recipe, micro=None, masks=None):
    engine = MAKE()
    engine.load(SPEC, WHOLE, random_arrays(SPEC, WHOLE), masks or {})
    x, y = batch(SPEC, 21)
    task = rules.Task(recipe, engine, x, y, 1, micro or recipe.batch, lambda *_: None, masks or {})
    result = rules.find(recipe.rule).train(task)
    return {name: engine.read(name) for name in engine.params}, result, task


def oracle(recipe, task, masks=None):
    """``v = momentum v + clipped gradient + decay w + mu (w - w_t); w -= rate v``, in float64."""
    received = {n: torch.from_numpy(a.astype(np.float64)) for n, a in random_arrays(SPEC, WHOLE).items()}
    for name, mask in (masks or {}).items():
        received[name] *= torch.from_numpy(mask)
    weights = {n: w.clone().requires_grad_() for n, w in received.items()}
    velocity = {n: torch.zeros_like(w) for n, w in received.items()}
    for rows in loop.batches(task):
        logits = small_cnn_forward(weights, torch.from_numpy(task.x[rows].astype(np.float64)))
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(task.y[rows]))
        grads = torch.autograd.grad(loss, list(weights.values()))
        length = torch.sqrt(sum((g**2).sum() for g in grads))
        factor = min(1.0, recipe.clip / float(length)) if recipe.clip else 1.0
        with torch.no_grad():
            for (name, w), g in zip(weights.items(), grads, strict=True):
                pulled = factor * g + recipe.decay * w + recipe.knobs["mu"] * (w - received[name])
                velocity[name] = recipe.momentum * velocity[name] + pulled
                w.sub_(recipe.rate * velocity[name])
                if name in (masks or {}):
                    w.mul_(torch.from_numpy(masks[name]))
    return {name: w.detach().numpy() for name, w in weights.items()}


@pytest.mark.parametrize("micro", [None, 3], ids=["whole", "micro"])
@pytest.mark.parametrize("clip", [0.0, 0.3])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_are_those_of_the_objective(momentum, clip, micro):
    recipe = Recipe(
        rule="prox", epochs=3, batch=8, rate=0.1, momentum=momentum, decay=0.01, clip=clip, seed=3, knobs=MU
    )
    found, result, task = trained(recipe, micro)
    for name, array in oracle(recipe, task).items():
        np.testing.assert_allclose(found[name], array.reshape(-1), atol=5e-6, err_msg=name)
    assert result.steps == 9


@pytest.mark.parametrize("density", [0.3, 0.8])
def test_masked_weights_are_pulled_too(density):
    masks = some_masks(SPEC, density)
    recipe = Recipe(rule="prox", epochs=3, batch=8, rate=0.1, momentum=0.9, knobs=MU)
    found, _, task = trained(recipe, masks=masks)
    for name, array in oracle(recipe, task, masks).items():
        wanted = array[masks[name]] if name in masks else array.reshape(-1)
        np.testing.assert_allclose(found[name], wanted, atol=5e-6, err_msg=name)


@pytest.mark.parametrize("more", [{}, {"clip": 0.5}, {"momentum": 0.9}], ids=str)
def test_without_a_pull_it_is_sgd_to_the_bit(more):
    plain, *_ = trained(Recipe(epochs=2, batch=8, rate=0.1, **more))
    for knobs in ({}, {"mu": 0.0}):
        found, *_ = trained(Recipe(rule="prox", epochs=2, batch=8, rate=0.1, knobs=knobs, **more))
        for name, array in plain.items():
            np.testing.assert_array_equal(found[name], array)


def test_a_strong_pull_keeps_it_near():
    start = {name: array.reshape(-1) for name, array in random_arrays(SPEC, WHOLE).items()}

    def moved(mu):
        found, *_ = trained(Recipe(rule="prox", epochs=20, batch=21, rate=0.05, knobs={"mu": mu}))
        return sum(float(((found[n] - a) ** 2).sum()) for n, a in start.items())

    distances = [moved(mu) for mu in (0.0, 1.0, 10.0)]
    assert distances[0] > 1.5 * distances[1] > 6 * distances[2] > 0


def test_adam_is_drawn_like_plain_sgd():
    """The pull is a part of the gradient: moving by g towards an anchor is moving by ``g + mu (w - anchor)``."""
    rng = np.random.default_rng(0)
    w, g, anchor = ({"w": rng.standard_normal(40_000).astype(np.float32)} for _ in range(3))
    one, two = ({"w": w["w"].copy()} for _ in range(2))
    zeros = [{"w": np.zeros(40_000, np.float32)} for _ in range(4)]
    apply_adam(one, {"w": g["w"].copy()}, Update(0.1, pull=0.5, anchor=anchor), Adam(zeros[0], zeros[1]))
    apply_adam(two, {"w": g["w"] + 0.5 * (w["w"] - anchor["w"])}, Update(0.1), Adam(zeros[2], zeros[3]))
    np.testing.assert_allclose(one["w"], two["w"], atol=1e-6)
    assert abs(one["w"] - w["w"]).max() > 0.09


def test_what_it_holds_is_what_is_planned_for():
    plain, pulled = (Recipe(rule="prox", momentum=0.9, knobs=knobs) for knobs in ({}, MU))
    assert (memory.copies(plain), memory.copies(pulled)) == (1, 2)
    assert rules.find("prox").copies(pulled) == 2
    assert memory.predict(SPEC, WHOLE, pulled).peak > memory.predict(SPEC, WHOLE, plain).peak


def test_the_knob_is_checked():
    with pytest.raises(SpecError, match="mu"):
        trained(Recipe(rule="prox", knobs={"mu": -1.0}))
