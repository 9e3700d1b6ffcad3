"""The native engine's losses against torch's: values, gradients, what is no number, and what does not fit."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.engines import losses as by_torch
from edge_runtime.engines.native import losses
from wire.errors import DataError, Unsupported
from wire.messages import Loss

LOSSES = get_args(Loss)
TYPES = {np.float32: (torch.float32, 1e-5), np.float64: (torch.float64, 1e-12)}


def settled(logits, target, loss, scale=1.0):
    out = np.full_like(logits, np.nan)
    before = logits.copy()
    value = losses.settle(logits, target, loss, scale, out)
    np.testing.assert_array_equal(logits, before)
    assert isinstance(value, float)
    assert out.dtype == logits.dtype
    return value, out


def reference(logits, target, loss, scale=1.0):
    """Value and gradient in double precision by the torch engine's loss and autograd."""
    leaf = torch.from_numpy(logits.astype(np.float64)).requires_grad_()
    goal = torch.from_numpy(target if target.dtype == np.int64 else target.astype(np.float64))
    value = by_torch.value(leaf, goal, loss)
    torch.autograd.backward(value * scale)
    return value.item(), leaf.grad.numpy()


@pytest.mark.parametrize("dtype", TYPES)
@settings(max_examples=50, deadline=None)
@given(
    loss=st.sampled_from(LOSSES),
    soft=st.booleans(),
    shape=st.tuples(st.integers(1, 33), st.integers(1, 12)),
    spread=st.sampled_from([0.1, 3.0, 60.0]),
    scale=st.sampled_from([1.0, 0.25, 3.0]),
    seed=st.integers(0, 1 << 16),
)
def test_value_and_gradient_are_torchs(dtype, loss, soft, shape, spread, scale, seed):
    count, classes = shape
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, spread, (count, classes)).astype(dtype)
    target = rng.integers(0, classes, count)
    if soft:  # rows need not add up to one
        target = (rng.dirichlet(np.ones(classes), count) * rng.uniform(0.5, 2, (count, 1))).astype(dtype)
    value, out = settled(logits, target, loss, scale)
    wanted, gradient = reference(logits, target, loss, scale)
    near = TYPES[dtype][1]
    # A sum of logits may come out next to nothing.
    assert value == pytest.approx(wanted, rel=near, abs=near * max(1.0, float(np.abs(logits).max())))
    np.testing.assert_allclose(out, gradient, rtol=0, atol=near * max(np.abs(gradient).max(), 1e-3 * scale / out.size))
    if dtype == np.float32:  # the torch engine's own, for models without autograd
        by_hand = by_torch.gradient(torch.from_numpy(logits), torch.from_numpy(target), loss, scale)
        np.testing.assert_allclose(out, by_hand.numpy(), rtol=0, atol=1e-6 * scale * max(1.0, spread))


@pytest.mark.parametrize("dtype", TYPES)
def test_by_hand(dtype):
    logits, labels = np.array([[0, 0], [3, 4]], dtype), np.array([1, 0])
    value, out = settled(logits, labels, "mean_squared_error", 2.0)
    assert value == (0 + 1 + 4 + 16) / 4
    assert out.tolist() == [[0, -1], [2, 4]]
    value, out = settled(logits[:1], labels[:1], "cross_entropy")
    assert value == pytest.approx(math.log(2))
    np.testing.assert_allclose(out, [[0.5, -0.5]], rtol=1e-6)
    value, out = settled(logits[:1], labels[:1], "binary_cross_entropy")
    assert value == pytest.approx(math.log(2))
    np.testing.assert_allclose(out, [[0.25, -0.25]], rtol=1e-6)
    value, out = settled(logits, labels, "sum", 0.5)
    assert value == 7
    assert out.tolist() == [[0.5, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy"])
def test_logits_far_out_lose_nothing(loss, dtype):
    logits, labels = np.array([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], dtype), np.array([0, 0])
    value, out = settled(logits, labels, loss)
    wanted = 2e4 / 2 if loss == "cross_entropy" else (2e4 + 2 * math.log(2)) / 6
    assert value == pytest.approx(wanted, rel=1e-6)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out, reference(logits, labels, loss)[1], atol=1e-7)
    small, _ = settled(np.array([[30.0, 0.0]], np.float64), np.array([0]), "cross_entropy")
    assert small == pytest.approx(math.exp(-30), rel=1e-3)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_none_in_both_engines(loss, odd):
    rng = np.random.default_rng(1)
    for _ in range(30):
        logits = rng.normal(0, 2, (4, 5)).astype(np.float32)
        logits[rng.integers(4), rng.integers(5)] = odd
        labels = rng.integers(0, 5, 4)
        value, out = settled(logits, labels, loss)
        wanted, gradient = reference(logits, labels, loss)
        np.testing.assert_allclose(value, wanted, rtol=1e-5)
        np.testing.assert_allclose(out, gradient, rtol=0, atol=1e-5)


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "sum"])
def test_targets_that_do_not_fit_are_named_and_nothing_is_written(loss):
    logits = np.zeros((2, 3), np.float32)
    for labels in ([0, 3], [-1, 0], [0, -100], [1 << 40, 0]):
        out = np.full_like(logits, 7)
        with pytest.raises(DataError, match="none of the model's 3 classes"):
            losses.settle(logits, np.array(labels), loss, 1.0, out)
        assert (out == 7).all()
    for target in (np.zeros(3, np.int64), np.zeros((2, 1), np.int64), np.zeros((2, 4), np.float32)):
        with pytest.raises(DataError, match="targets of shape"):
            losses.settle(logits, target, loss, 1.0, np.empty_like(logits))


def test_a_sum_knows_no_labels_and_another_loss_is_refused():
    logits = np.ones((2, 3), np.float32)
    assert losses.settle(logits, np.array([9, -9]), "sum", 1.0, np.empty_like(logits)) == 6
    with pytest.raises(Unsupported, match="'hinge'; known are cross_entropy, binary_cross_entropy, sum, mean_squared"):
        losses.settle(logits, np.array([0, 0]), "hinge", 1.0, np.empty_like(logits))


@settings(max_examples=80, deadline=None)
@given(count=st.integers(1, 40), classes=st.integers(1, 70), odd=st.booleans(), seed=st.integers(0, 1 << 16))
def test_a_score_is_torchs_with_ties_and_what_is_no_number(count, classes, odd, seed):
    rng = np.random.default_rng(seed)
    logits = rng.integers(-2, 3, (count, classes)).astype(np.float32)
    if odd:
        logits[rng.random(logits.shape) < 0.05] = rng.choice([np.nan, np.inf, -np.inf])
    labels = rng.integers(0, classes, count)
    lost, right = losses.scored(logits, labels)
    there = torch.from_numpy(logits)
    wanted = F.cross_entropy(there.double(), torch.from_numpy(labels), reduction="sum").item()
    np.testing.assert_allclose(lost, wanted, rtol=1e-5, atol=1e-5)
    assert right == int((there.argmax(1) == torch.from_numpy(labels)).sum())
    assert isinstance(right, int)


def test_a_score_of_labels_that_are_no_class_is_refused():
    with pytest.raises(DataError, match="none of the model's 2 classes"):
        losses.scored(np.zeros((1, 2), np.float32), np.array([-1]))
    with pytest.raises(DataError, match="targets of shape"):
        losses.scored(np.zeros((1, 2), np.float32), np.array([0, 0]))
    assert losses.scored(np.zeros((1, 2), np.float32), np.array([0])) == (pytest.approx(math.log(2)), 1)
