"""The group lasso against its definition: numeric derivatives, strengths by hand, and an order written out."""

import math

import numpy as np
import pytest

from edge_runtime import rules
from edge_runtime.rules import grouplasso, sgd
from tests.support.engines import make as MAKE
from tests.support.models import batch, linear, random_arrays, small_cnn
from wire import memory
from wire.errors import SpecError
from wire.messages import Recipe
from wire.spec import Structure

pytestmark = pytest.mark.usefixtures("every_engine")
SPEC = small_cnn()
WEIGHTS = random_arrays(SPEC, Structure())


def naive_penalty(params):
    """Equation 2 in plain loops: outputs of all weights but the last, inputs of all but the first."""
    names = [name for name, array in params.items() if array.ndim > 1]
    total = 0.0
    for name in names:
        w = params[name].astype(np.float64)
        if name != names[-1]:
            total += sum(math.sqrt((w[k] ** 2).sum()) for k in range(w.shape[0]))
        if name != names[0]:
            total += sum(math.sqrt((w[:, c] ** 2).sum()) for c in range(w.shape[1]))
    return total


def order(recipe, rule=grouplasso, count=21, micro=None, spec=SPEC, **more):
    engine = MAKE()
    engine.load(spec, Structure(), random_arrays(spec, Structure()))
    x, y = batch(spec, count)
    task = rules.Task(recipe, engine, x, y, 1, micro or recipe.batch, lambda *_: None, **more)
    return engine, rule.train(task)


def recipe_of(**knobs):
    values = {"rule": "grouplasso", "batch": 8, "rate": 0.1, "epochs": 2, "seed": 3}
    return Recipe(**values, knobs=knobs)


def test_the_penalty_by_hand_and_by_loops():
    params = {
        "a": np.array([[3.0, 0.0], [4.0, 0.0]], np.float32),
        "n": np.ones(2, np.float32),
        "b": np.array([[1.0, 2.0], [1.0, 2.0], [1.0, 1.0]], np.float32),
    }
    # a is the first: its outputs 3 and 4. b is the last: its inputs sqrt(3) and 3. Nothing of n, which is no weight.
    assert grouplasso.penalty(params) == pytest.approx(3 + 4 + math.sqrt(3) + 3)
    assert grouplasso.penalty(WEIGHTS) == pytest.approx(naive_penalty(WEIGHTS), rel=1e-6)
    assert grouplasso.penalty({"o": np.ones((2, 3), np.float32)}) == 0.0  # one layer: samples in, classes out


def test_the_gradient_is_the_numeric_derivative():
    grads = {name: np.zeros_like(array) for name, array in WEIGHTS.items()}
    grouplasso.add_pull(WEIGHTS, grads, 0.5)
    rng = np.random.default_rng(0)
    step = 1e-6
    for name, array in WEIGHTS.items():
        if array.ndim == 1:
            assert not grads[name].any()
            continue
        for place in rng.choice(array.size, 12, replace=False):
            sides = []
            for sign in (1, -1):
                moved = {n: a.astype(np.float64) for n, a in WEIGHTS.items()}
                moved[name].reshape(-1)[place] += sign * step
                sides.append(naive_penalty(moved))
            wanted = 0.5 * (sides[0] - sides[1]) / (2 * step)
            assert grads[name].reshape(-1)[place] == pytest.approx(wanted, abs=1e-5)


def test_a_channel_that_is_zero_is_not_pulled():
    params = {"a": np.zeros((2, 3), np.float32), "b": np.array([[2.0, 0.0]], np.float32)}
    grads = {name: np.ones_like(array) for name, array in params.items()}
    grouplasso.add_pull(params, grads, 0.5)
    assert (grads["a"] == 1).all()
    assert grads["b"].tolist() == [[1.5, 1.0]]


def test_the_strength_by_hand():
    assert grouplasso.strength_of(0.2, 2.0, 10.0) == pytest.approx(0.05)  # 0.05 * 10 = 0.5 is a fifth of 2.5
    assert grouplasso.strength_of(0.0, 2.0, 10.0) == 0.0
    assert grouplasso.strength_of(0.5, 2.0, 0.0) == 0.0


def test_the_first_batch_settles_the_strength():
    recipe = Recipe(rule="grouplasso", batch=21, rate=0.1, knobs={"share": 0.25})
    _, trained = order(recipe)
    engine = MAKE()
    engine.load(SPEC, Structure(), WEIGHTS)
    loss = engine.forward_backward(*batch(SPEC, 21))
    found = trained.metrics
    assert found["penalty"] == pytest.approx(naive_penalty(WEIGHTS), rel=1e-6)
    assert found["lambda"] * found["penalty"] / (loss + found["lambda"] * found["penalty"]) == pytest.approx(0.25)
    _, given = order(Recipe(rule="grouplasso", batch=21, rate=0.1, knobs={"lambda": 0.3, "share": 0.25}))
    assert given.metrics["lambda"] == 0.3


@pytest.mark.parametrize(("momentum", "clip"), [(0.0, 0.0), (0.9, 0.5)])
@pytest.mark.parametrize("micro", [8, 3])
def test_an_order_is_sgd_on_the_whole_loss(momentum, clip, micro):
    recipe = Recipe(
        rule="grouplasso", batch=8, rate=0.1, epochs=2, momentum=momentum, clip=clip, seed=3, knobs={"lambda": 0.02}
    )
    engine, trained = order(recipe, micro=micro)
    x, y = batch(SPEC, 21)
    rng = np.random.default_rng([3, 1])
    twin = MAKE()
    twin.load(SPEC, Structure(), WEIGHTS)
    velocity = {n: np.zeros_like(a) for n, a in WEIGHTS.items()}
    for _ in range(2):
        passed = rng.permutation(21)
        for start in range(0, 21, 8):
            rows = passed[start : start + 8]
            for grad in twin.grads.values():
                grad.fill(0)
            twin.forward_backward(x[rows], y[rows])
            names = [n for n, a in twin.params.items() if a.ndim > 1]
            pulled = {n: g.astype(np.float64) for n, g in twin.grads.items()}
            for n in names:
                w = twin.params[n].astype(np.float64)
                for k in range(w.shape[0]) if n != names[-1] else ():
                    pulled[n][k] += 0.02 * w[k] / np.sqrt((w[k] ** 2).sum())
                for c in range(w.shape[1]) if n != names[0] else ():
                    pulled[n][:, c] += 0.02 * w[:, c] / np.sqrt((w[:, c] ** 2).sum())
            length = math.sqrt(sum((g**2).sum() for g in pulled.values()))
            factor = min(1.0, clip / length) if clip else 1.0
            for n, p in twin.params.items():
                velocity[n] = momentum * velocity[n] + factor * pulled[n]
                p[...] = p - (0.1 * velocity[n]).astype(np.float32)
    for name, param in twin.params.items():
        np.testing.assert_allclose(engine.params[name], param, atol=3e-6, err_msg=name)
    assert trained.steps == 6


def test_without_strength_it_is_plain_sgd():
    for knobs in ({}, {"share": 0.0}):
        engine, trained = order(recipe_of(**knobs))
        plain, _ = order(Recipe(batch=8, rate=0.1, epochs=2, seed=3, clip=1e9), rule=sgd)
        for name, param in plain.params.items():
            np.testing.assert_allclose(engine.params[name], param, atol=1e-6)
        assert trained.metrics["lambda"] == 0.0


def test_a_strong_pull_empties_channels():
    engine, _ = order(Recipe(rule="grouplasso", batch=21, rate=0.01, epochs=300, knobs={"lambda": 0.3}))
    rows = np.abs(engine.params["f.weight"]).max(axis=1)
    assert (rows < 0.02).sum() > 6


def test_the_planner_counts_its_gradients():
    recipe = recipe_of(share=0.2)
    assert memory.holds_gradients(recipe, recipe.batch)
    assert grouplasso.copies(recipe) == memory.copies(recipe)


def test_what_it_cannot_do_is_named():
    for knobs in ({"lambda": -1.0}, {"share": 1.0}, {"share": -0.1}):
        with pytest.raises(SpecError, match="knob"):
            order(recipe_of(**knobs))
    with pytest.raises(SpecError, match="masked"):
        order(recipe_of(), masks={"f.weight": np.ones((12, 54), bool)})
    assert order(recipe_of(share=0.2), count=0)[1].metrics == {}
    assert order(recipe_of(share=0.2), spec=linear())[1].metrics["lambda"] == 0.0
