"""Meta-gradients: on quadratics in closed form, on a small network against second derivatives by torch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime import rules
from edge_runtime.rules import loop
from edge_runtime.rules.maml import Look, Spare, meta_gradient
from tests.support.engines import make as MAKE
from tests.support.models import batch, random_arrays, small_cnn, widths
from tests.support.orders import some_masks
from wire import memory
from wire.errors import NonFinite, SpecError
from wire.messages import Recipe
from wire.spec import Axis, AxisGroup, ModelSpec, Node, Structure, TensorSpec, check

SPEC = small_cnn()
pytestmark = pytest.mark.usefixtures("every_engine")
WHOLE = Structure()


class Quadratics:
    """``f_i(w) = w' A_i w / 2 - b_i' w`` for the three batches; D' is 0, D is 1, D'' is 2."""

    def __init__(self, seed, size=5):
        rng = np.random.default_rng(seed)
        roots = rng.standard_normal((3, size, size))
        self.a = np.array([root @ root.T / size for root in roots])
        self.b = rng.standard_normal((3, size))
        self.w = rng.standard_normal(size)

    def gradient(self, i, w):
        return self.a[i] @ w - self.b[i]

    def found(self, look):
        params, grads = {"w": self.w.copy()}, {"w": np.full_like(self.w, 7.0)}

        def add(i, factor):
            grads["w"] += factor * self.gradient(i, params["w"])
            return float(params["w"] @ self.a[i] @ params["w"] / 2 - self.b[i] @ params["w"])

        spare = Spare({"w": np.empty_like(self.w)}, {"w": np.empty_like(self.w)})
        loss = meta_gradient(params, grads, add, look, spare)
        np.testing.assert_array_equal(params["w"], self.w)
        return grads["w"], loss


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.floats(0.0, 1.0), st.floats(1e-3, 10.0))
def test_quadratics_in_closed_form(seed, alpha, delta):
    """Hessian-free is exact whatever delta is, first order leaves the matrix out, and alpha of 0 is the gradient."""
    q = Quadratics(seed)
    there = q.w - alpha * q.gradient(1, q.w)
    outer = q.gradient(0, there)
    exact = (np.eye(5) - alpha * q.a[2]) @ outer
    found, loss = q.found(Look(alpha, delta))
    np.testing.assert_allclose(found, exact, rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(q.found(Look(alpha))[0], outer, rtol=1e-12, atol=1e-12)
    assert loss == pytest.approx(there @ q.a[0] @ there / 2 - q.b[0] @ there)
    np.testing.assert_array_equal(q.found(Look(0.0, delta))[0], q.gradient(0, q.w))


def test_one_number_by_hand():
    """f = w^2 on all three batches, from 1 with alpha 1/4: the step leads to 1/2, where the gradient is 1; H is 2."""
    q = Quadratics(0, 1)
    q.a, q.b, q.w = np.full((3, 1, 1), 2.0), np.zeros((3, 1)), np.ones(1)
    assert q.found(Look(0.25))[0].tolist() == [1.0]
    assert q.found(Look(0.25, 0.5))[0].tolist() == [0.5]
    assert q.found(Look(0.25, limit=1.0))[0].tolist() == [1.5], "of length 1 instead of 2, the step leads to 3/4"


def smooth():
    """linear 5 -> 7, tanh, linear -> 3: no kinks, across which a difference of gradients says nothing of a derivative."""
    tensors = (
        TensorSpec("f.weight", (Axis("a"), Axis(inner=5)), "fan", 5),
        TensorSpec("f.bias", (Axis("a"),)),
        TensorSpec("o.weight", (Axis("classes"), Axis("a")), "fan", 7),
        TensorSpec("o.bias", (Axis("classes"),)),
    )
    nodes = (
        Node("f", "linear", ("input",), {"weight": "f.weight", "bias": "f.bias"}),
        Node("t", "tanh", ("f",)),
        Node("o", "linear", ("t",), {"weight": "o.weight", "bias": "o.bias"}),
    )
    groups = (AxisGroup("a", 7), AxisGroup("classes", 3, prunable=False))
    return check(ModelSpec("smooth", (5,), 3, groups, tensors, nodes))


SMOOTH = smooth()


def trained(recipe, structure=WHOLE, micro=None, count=24, masks=None, spec=SPEC):
    engine = MAKE()
    engine.load(spec, structure, random_arrays(spec, structure, scale=0.8), masks or {})
    x, y = batch(spec, count)
    task = rules.Task(recipe, engine, x, y, 1, micro or recipe.batch, lambda *_: None, masks or {})
    return engine, rules.find(recipe.rule).train(task), task


def by_torch(recipe, task, steps, hf):
    """The paper's step with second derivatives by torch, in float64; batches drawn as the rule says that they are."""
    start = random_arrays(SMOOTH, WHOLE, scale=0.8)
    weights = {n: torch.from_numpy(a.astype(np.float64)) for n, a in start.items()}
    names, alpha = list(weights), recipe.knobs["alpha"]
    rng = np.random.default_rng([recipe.seed, 1, 2])

    def loss(values, rows):
        x, y = torch.from_numpy(task.x[rows].astype(np.float64)), torch.from_numpy(task.y[rows])
        hidden, hidden_bias, out, out_bias = values
        logits = torch.tanh(x @ hidden.T + hidden_bias) @ out.T + out_bias
        return torch.nn.functional.cross_entropy(logits, y)

    for outer_rows in list(loop.batches(task))[:steps]:
        inner_rows, curve_rows = (rng.permutation(len(task.x))[: recipe.batch] for _ in range(2))
        w = [weights[n].clone().requires_grad_() for n in names]
        inner = torch.autograd.grad(loss(w, inner_rows), w)
        there = [(p - alpha * g).detach().requires_grad_() for p, g in zip(w, inner, strict=True)]
        outer = [g.detach() for g in torch.autograd.grad(loss(there, outer_rows), there)]
        meta = outer
        if hf:
            first = torch.autograd.grad(loss(w, curve_rows), w, create_graph=True)
            along = sum((g * v).sum() for g, v in zip(first, outer, strict=True))
            meta = [v - alpha * h for v, h in zip(outer, torch.autograd.grad(along, w), strict=True)]
        weights = {n: (p - recipe.rate * g).detach() for n, p, g in zip(names, w, meta, strict=True)}
    return {n: w.numpy() for n, w in weights.items()}


@pytest.mark.parametrize("micro", [None, 3], ids=["whole", "micro"])
@pytest.mark.parametrize("hf", [0.0, 1.0], ids=["FO", "HF"])
def test_steps_of_a_network_are_the_papers(hf, micro):
    knobs = {"alpha": 0.2, "hf": hf, "delta": 0.01, "tune": 0.0}
    recipe = Recipe(rule="maml", epochs=2, batch=8, rate=0.1, seed=4, knobs=knobs)
    engine, result, task = trained(recipe, micro=micro, spec=SMOOTH)
    wanted, other = by_torch(recipe, task, 6, bool(hf)), by_torch(recipe, task, 6, not hf)
    start = random_arrays(SMOOTH, WHOLE, scale=0.8)
    for name, array in wanted.items():
        np.testing.assert_allclose(engine.params[name], array, atol=2e-5, err_msg=name)
        np.testing.assert_allclose(result.update[name].values, array - start[name], atol=2e-5, err_msg=name)
    assert max(np.abs(wanted[name] - other[name]).max() for name in wanted) > 1e-3, "H matters here"
    assert result.steps == 6


@pytest.mark.parametrize("more", [{}, {"momentum": 0.9, "clip": 0.5}], ids=str)
def test_alpha_of_zero_is_sgd(more):
    knobs = {"alpha": 0.0, "hf": 1.0}
    plain, *_ = trained(Recipe(epochs=2, batch=8, rate=0.1, knobs={"gradients": 1.0}, **more))
    found, result, _ = trained(Recipe(rule="maml", epochs=2, batch=8, rate=0.1, knobs=knobs, **more))
    for name, array in plain.params.items():
        np.testing.assert_array_equal(found.params[name], array)
    assert set(result.update) == set(plain.params)


def test_the_engine_ends_with_the_devices_own_model_and_the_update_is_the_metas():
    knobs = {"alpha": 0.2, "tune": 0.0}
    recipe = Recipe(rule="maml", epochs=2, batch=8, rate=0.1, knobs=knobs)
    meta, sent, _ = trained(recipe)
    tuned = {**knobs, "tune": 2.0}
    own, same, task = trained(Recipe(rule="maml", epochs=2, batch=8, rate=0.1, knobs=tuned))
    for name, extra in sent.update.items():
        np.testing.assert_array_equal(same.update[name].values, extra.values)
    rng = np.random.default_rng([recipe.seed, 1, 3])
    for _ in range(2):
        order = rng.permutation(24)
        for start in range(0, 24, 8):
            rows = order[start : start + 8]
            for array in meta.grads.values():
                array.fill(0.0)
            meta.forward_backward(task.x[rows], task.y[rows])
            for name in meta.params:
                meta.params[name][...] -= np.float32(0.2) * meta.grads[name]
    for name, array in meta.params.items():
        np.testing.assert_allclose(own.params[name], array, atol=1e-6, err_msg=name)
    assert own.evaluate(task.x, task.y)[0] < trained(recipe)[0].evaluate(task.x, task.y)[0]


def test_a_model_of_its_own_that_runs_away_is_named():
    """Meta-steps of rate 0 are fine, but a device is not to keep what is no number."""
    nodes = (SMOOTH.nodes[0], Node("t", "relu", ("f",)), SMOOTH.nodes[2])
    steep = check(dataclasses.replace(SMOOTH, nodes=nodes))
    fine, wild = (
        Recipe(rule="maml", epochs=1, batch=24, rate=0.0, knobs={"alpha": 1000.0, "tune": tune})
        for tune in (0.0, 100.0)
    )
    assert trained(fine, spec=steep)[1].steps == 1
    with pytest.raises(NonFinite, match="own"):
        trained(wild, spec=steep)


def test_a_width_is_trained_like_the_whole():
    structure = widths(a=(2, 6), b=(3, 12)).narrowed(0)
    _, result, _ = trained(Recipe(rule="maml", epochs=2, batch=8, rate=0.1), structure)
    shapes = {name: extra.values.shape for name, extra in result.update.items()}
    assert shapes == {name: array.shape for name, array in random_arrays(SPEC, structure).items()}


def test_no_samples_no_movement():
    _, result, _ = trained(Recipe(rule="maml"), count=0)
    assert result.steps == 0
    assert all(not extra.values.any() for extra in result.update.values())


def test_what_it_holds_is_what_is_planned_for():
    first, free = (Recipe(rule="maml", knobs={"hf": hf}) for hf in (0.0, 1.0))
    assert (memory.whole_copies(first, masked=False), memory.whole_copies(free, masked=False)) == (2, 3)
    assert memory.holds_gradients(first, first.batch)


@pytest.mark.parametrize(
    "knobs", [{"alpha": -1.0}, {"hf": 0.5}, {"delta": 0.0}, {"tune": 0.5}, {"tune": -1.0}, {"tune": 2000.0}], ids=str
)
def test_knobs_are_checked(knobs):
    with pytest.raises(SpecError, match=next(iter(knobs))):
        trained(Recipe(rule="maml", knobs=knobs))


def test_masks_are_refused():
    with pytest.raises(SpecError, match="masked"):
        trained(Recipe(rule="maml"), masks=some_masks(SPEC))
