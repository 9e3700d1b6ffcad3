"""The losses of a recipe: by hand, against torch's own gradients and finite differences, dense and masked, fused or not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.engines import Choice, Update, losses
from tests.support.engines import make as MAKE
from tests.support.models import batch, linear, random_arrays, small_cnn
from wire.errors import Unsupported
from wire.spec import Structure, tensor_shapes
from wire.zoo import mlp

pytestmark = pytest.mark.usefixtures("every_engine")
WHOLE = Structure()
LOSSES = ("cross_entropy", "binary_cross_entropy", "mean_squared_error", "sum")
CHOICES = {
    "dense": None,
    "held dense": Choice(ways={"": "dense"}),
    "sparse": Choice(ways={"": "sparse"}),
    "mixed": Choice(ways={"": "sparse", "fc2.weight": "dense"}),
}


def naive(logits, targets, loss):
    """The loss in double precision, a class at a time; targets are distributions."""
    total = 0.0
    for row, target in zip(np.float64(logits), np.float64(targets), strict=True):
        if loss == "sum":
            total += sum(row)
        elif loss == "cross_entropy":
            whole = math.log(sum(math.exp(z) for z in row))
            total += sum(t * (whole - z) for z, t in zip(row, target, strict=True)) / len(logits)
        elif loss == "mean_squared_error":
            total += sum((z - t) ** 2 for z, t in zip(row, target, strict=True)) / len(row) / len(logits)
        else:
            odds = [1 / (1 + math.exp(-z)) for z in row]
            each = [-t * math.log(p) - (1 - t) * math.log(1 - p) for p, t in zip(odds, target, strict=True)]
            total += sum(each) / len(row) / len(logits)
    return total


def loaded(spec, choice=None, skip=(), seed=0):
    engine = MAKE()
    rng = np.random.default_rng(5)
    masks = {
        name: rng.random(shape) < 0.5
        for name, shape in tensor_shapes(spec, WHOLE).items()
        if choice is not None and name.endswith("weight") and name not in skip
    }
    engine.load(spec, WHOLE, random_arrays(spec, WHOLE, seed), masks, choice)
    return engine


def test_two_classes_by_hand():
    engine = MAKE()
    engine.load(linear(), WHOLE, {name: np.zeros(s, np.float32) for name, s in tensor_shapes(linear(), WHOLE).items()})
    x, y = np.array([[1, 0, 2]], np.float32), np.array([1])
    # Both sigmoids are one half: -log(1/2) for each class, and a gradient of (1/2 - t) / 2.
    assert engine.forward_backward(x, y, loss="binary_cross_entropy") == pytest.approx(math.log(2))
    np.testing.assert_allclose(engine.grads["o.bias"], [0.25, -0.25])
    np.testing.assert_allclose(engine.grads["o.weight"], [[0.25, 0, 0.5], [-0.25, 0, -0.5]])
    engine.params["o.bias"][:] = [3, 4]
    assert engine.forward_backward(x, y, loss="sum", scale=2.0) == 7.0
    np.testing.assert_allclose(engine.grads["o.bias"], [2.25, 1.75])  # gradients add up
    # From (0, 1) that is (3, 3) away: the mean of the squares is 9, its gradient twice the way over two classes.
    assert engine.forward_backward(x, y, loss="mean_squared_error") == 9.0
    np.testing.assert_allclose(engine.grads["o.bias"], [5.25, 4.75])


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(LOSSES),
    st.integers(1, 5),
    st.integers(2, 6),
    st.floats(0.125, 2),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_values_and_gradients_meet_torch_and_the_definition(loss, count, classes, scale, soft, seed):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(0, 3, (count, classes)).astype(np.float32)).requires_grad_()
    labels = rng.integers(0, classes, count)
    rows = (
        rng.dirichlet(np.ones(classes), count).astype(np.float32) if soft else np.eye(classes, dtype=np.float32)[labels]
    )
    target = torch.from_numpy(rows if soft else labels)
    value = losses.value(logits, target, loss)
    assert value.item() == pytest.approx(naive(logits.detach().numpy(), rows, loss), rel=1e-4, abs=1e-5)
    torch.autograd.backward(value * scale)
    by_hand = losses.gradient(logits.detach(), target, loss, scale)
    np.testing.assert_allclose(by_hand.numpy(), logits.grad.numpy(), atol=2e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_meet_finite_differences(loss):
    spec = small_cnn()
    engine = loaded(spec)
    x, y = batch(spec, 5)
    hot = np.eye(spec.classes)[y]
    engine.forward_backward(x, y, loss=loss)
    rng = np.random.default_rng(0)
    for name, array in engine.params.items():
        where = tuple(int(rng.integers(0, n)) for n in array.shape)
        before, seen = array[where], []
        for step in (2e-3, -2e-3):
            array[where] = before + step
            seen.append(naive(engine.forward(x), hot, loss))
        array[where] = before
        wide = 5 * spec.classes if loss == "sum" else 1
        assert (seen[0] - seen[1]) / 4e-3 == pytest.approx(engine.grads[name][where], abs=2e-3 * wide), name


@pytest.mark.parametrize("skip", [(), ("out.weight",)], ids=["straight", "autograd"])
@pytest.mark.parametrize("way", CHOICES)
@pytest.mark.parametrize("loss", LOSSES)
def test_fused_masked_and_dense_move_alike(loss, way, skip):
    spec = mlp("line", (20,), 4, (15, 10))
    x, y = batch(spec, 7)
    engine, twin = loaded(spec, CHOICES[way], skip), loaded(spec, CHOICES[way], skip)
    start = {name: engine.read(name) for name in engine.params}
    lost = engine.forward_backward(x, y, update=Update(0.125), loss=loss)
    assert twin.forward_backward(x, y, loss=loss) == pytest.approx(lost, rel=1e-5)
    assert lost == pytest.approx(naive(twin.logits, np.eye(4)[y], loss), rel=1e-4)
    np.testing.assert_array_equal(engine.logits, twin.logits)
    for name in twin.params:
        twin.params[name] -= np.float32(0.125) * twin.grads[name]
        np.testing.assert_allclose(engine.read(name), twin.read(name), atol=1e-6, err_msg=name)
        assert np.abs(engine.read(name) - start[name]).max() > 1e-4, name


@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_of_means_add_up(loss):
    spec = small_cnn()
    whole, parts = loaded(spec), loaded(spec)
    x, y = batch(spec, 10)
    lost = whole.forward_backward(x, y, loss=loss)
    total = 0.0
    for start in range(0, 10, 4):
        rows = slice(start, start + 4)
        share = 1.0 if loss == "sum" else len(x[rows]) / 10
        total += share * parts.forward_backward(x[rows], y[rows], scale=share, loss=loss)
    assert total == pytest.approx(lost, rel=1e-4)
    for name, grad in whole.grads.items():
        np.testing.assert_allclose(parts.grads[name], grad, atol=1e-5)


@pytest.mark.parametrize("choice", [None, CHOICES["sparse"]], ids=["autograd", "straight"])
def test_another_loss_is_refused_and_moves_nothing(choice):
    spec = mlp("line", (20,), 4, (15,))
    engine = loaded(spec, choice)
    before = {name: engine.read(name) for name in engine.params}
    with pytest.raises(Unsupported, match="'hinge'"):
        engine.forward_backward(*batch(spec, 3), update=Update(0.5), loss="hinge")
    for name, values in before.items():
        np.testing.assert_array_equal(engine.read(name), values)
    with pytest.raises(Unsupported, match="'hinge'"):
        losses.gradient(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), "hinge", 1.0)
