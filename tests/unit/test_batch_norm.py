"""Batch norm and dropout, the two ops that do otherwise in training: what moves, what does not, and the same bits again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.engines import Update
from edge_runtime.engines.update import Adam, apply, apply_adam
from edge_runtime.rules import Task, find
from edge_runtime.worker import perform
from tests.support.engines import make as MAKE
from tests.support.models import RANKING, batch, random_arrays
from tests.support.orders import dataset, job
from tests.support.sequences import normed
from wire.job import Done
from wire.messages import Recipe
from wire.spec import NORM_EPSILON, Axis, AxisGroup, ModelSpec, Node, Structure, TensorSpec, check, statistics
from wire.tensor import open_blob

pytestmark = pytest.mark.usefixtures("every_engine")
WHOLE = Structure()
STATISTICS = {"n.mean", "n.variance"}
NARROW = Structure(0, {"a": (2, 4)}, RANKING)
WIDE = NARROW.narrowed(1)


def arrays_of(spec):
    arrays = random_arrays(spec, WHOLE)
    return arrays | {"n.mean": np.zeros(4, np.float32), "n.variance": np.ones(4, np.float32)}


def loaded(spec, structure=WIDE, arrays=None):
    engine = MAKE()
    engine.load(spec, structure, arrays or arrays_of(spec))
    return engine


def test_statistics_of_two_steps_by_hand():
    spec = normed()
    engine = loaded(spec)
    assert statistics(spec) == STATISTICS
    mean, variance = np.zeros(4), np.ones(4)
    for seed in range(2):
        x, y = batch(spec, 5, seed)
        z = x.astype(np.float64) @ engine.params["a.weight"].T + engine.params["a.bias"]
        # A tenth of what is new: the batch's mean, and its variance over n - 1.
        mean = 0.9 * mean + 0.1 * z.mean(0)
        variance = 0.9 * variance + 0.1 * z.var(0) * 5 / 4
        engine.forward_backward(x, y, update=Update(0.1))
        np.testing.assert_allclose(engine.params["n.mean"], mean, atol=1e-6)
        np.testing.assert_allclose(engine.params["n.variance"], variance, atol=1e-6)


def formula(engine, x, mean, variance):
    p = engine.params
    z = x.astype(np.float64) @ p["a.weight"].T + p["a.bias"]
    z = (z - mean(z)) / np.sqrt(variance(z) + NORM_EPSILON) * p["n.weight"] + p["n.bias"]
    return np.maximum(z, 0) @ p["o.weight"].T + p["o.bias"]


def test_training_norms_by_the_batch_and_evaluation_by_what_was_seen():
    spec = normed()
    engine = loaded(spec)
    x, y = batch(spec, 5)
    engine.forward_backward(x, y)
    np.testing.assert_allclose(engine.logits, formula(engine, x, lambda z: z.mean(0), lambda z: z.var(0)), atol=1e-5)
    seen = [engine.params[name].copy() for name in sorted(STATISTICS)]
    by_seen = formula(engine, x, lambda _: seen[0], lambda _: seen[1])
    np.testing.assert_allclose(engine.forward(x), by_seen, atol=1e-5)
    assert np.abs(by_seen - engine.logits).max() > 0.1
    engine.evaluate(x, y)
    assert all((engine.params[name] == kept).all() for name, kept in zip(sorted(STATISTICS), seen, strict=True))


def test_one_sample_has_no_variance_and_is_normed_by_what_was_seen():
    spec = normed()
    engine = loaded(spec, arrays=arrays_of(spec) | {"n.mean": np.full(4, 0.5, np.float32)})
    x, y = batch(spec, 1)
    engine.forward_backward(x, y)
    np.testing.assert_allclose(engine.logits, engine.forward(x), atol=1e-6)
    assert set(engine.params["n.mean"].tolist()) == {0.5}
    assert all(np.isfinite(grad).all() and grad.any() for grad in engine.grads.values())


def test_a_variance_that_came_below_zero_counts_as_zero():
    spec = normed()
    engine = loaded(spec, arrays=arrays_of(spec) | {"n.variance": np.full(4, -0.5, np.float32)})
    x, _ = batch(spec, 3)
    np.testing.assert_allclose(
        engine.forward(x), formula(engine, x, lambda _: 0.0, lambda _: 0.0), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("momentum", "decay", "pull"), [(0.9, 0.0, 0.0), (0.0, 0.5, 0.0), (0.9, 0.1, 0.3)])
def test_nothing_but_the_batches_moves_statistics(fused, momentum, decay, pull):
    spec = normed()
    engine, alone = loaded(spec), loaded(spec)
    still = {name: np.ones(array.shape, np.float32) for name, array in engine.params.items()}
    update = Update(0.0, momentum, decay, pull, velocity={n: a.copy() for n, a in still.items()}, anchor=still)
    update = dataclasses.replace(update, rate=1e-9 if fused else 0.5)
    x, y = batch(spec, 6)
    alone.forward_backward(x, y)
    if fused:
        engine.forward_backward(x, y, update=update)
    else:
        engine.forward_backward(x, y)
        assert set(engine.params) - set(engine.grads) == STATISTICS
        apply(engine.params, engine.grads, update)
        assert not np.allclose(engine.params["n.weight"], alone.params["n.weight"])
    for name in STATISTICS:
        np.testing.assert_array_equal(engine.params[name], alone.params[name])


def test_adam_leaves_statistics_alone():
    spec = normed()
    engine = loaded(spec)
    x, y = batch(spec, 6)
    engine.forward_backward(x, y)
    before = {name: array.copy() for name, array in engine.params.items()}
    state = Adam(*({n: np.ones(a.shape, np.float32) for n, a in before.items()} for _ in range(2)))
    apply_adam(engine.params, engine.grads, Update(0.1, decay=0.5), state)
    moved = {name for name, array in engine.params.items() if (array != before[name]).any()}
    assert moved == set(before) - STATISTICS


def test_a_narrower_width_norms_by_its_own_batch_and_moves_no_statistics():
    spec = normed()
    wide, small = loaded(spec), NARROW
    narrow = wide.narrow(small)
    alone = loaded(spec, small, {name: array.copy() for name, array in narrow.params.items()})
    x, y = batch(spec, 6)
    assert narrow.forward_backward(x, y) == pytest.approx(alone.forward_backward(x, y), abs=1e-6)
    assert narrow.grads.keys() == alone.grads.keys() == wide.params.keys() - STATISTICS
    for name, grad in alone.grads.items():
        np.testing.assert_allclose(narrow.grads[name], grad, atol=1e-6)
    assert set(wide.params["n.mean"].tolist()) == {0.0}
    assert alone.params["n.mean"].all()
    wide.forward_backward(x, y)
    np.testing.assert_array_equal(narrow.params["n.mean"], wide.params["n.mean"][:2])


def trained(spec, recipe, round_number, micro_batch):
    engine = loaded(spec)
    engine.seed(recipe.seed, round_number)
    x, y = batch(spec, 20)
    find(recipe.rule).train(Task(recipe, engine, x, y, round_number, micro_batch, lambda *_: None))
    return {name: array.tobytes() for name, array in engine.params.items()}


@pytest.mark.parametrize(
    "recipe", [Recipe(epochs=2, batch=5), Recipe(epochs=2, batch=5, clip=1.0, knobs={"widths": 1.0})]
)
def test_the_same_order_drops_the_same_again(recipe):
    spec = normed(400)
    found = trained(spec, recipe, 3, 5)
    assert trained(spec, recipe, 3, 5) == found
    assert trained(spec, recipe, 4, 5) != found
    assert trained(spec, dataclasses.replace(recipe, seed=9), 3, 5) != found


def dropped(engine, x):
    """Tell what a training pass drops: behind the norm, it alone is below the mean."""
    engine.forward_backward(x, np.zeros(len(x), np.int64), loss="sum")
    assert len(np.unique(engine.logits)) == 2 * len(x)
    return engine.logits < 0


def test_what_is_dropped_follows_from_the_order_and_the_pass():
    roles = {"weight": "n.weight", "bias": "n.bias"}
    nodes = (
        Node("d", "dropout", ("input",), {}, {"permille": 250}),
        Node("f", "flatten", ("d",)),
        Node("n", "layer_norm", ("f",), roles),
    )
    tensors = (TensorSpec("n.weight", (Axis("c"),), "ones"), TensorSpec("n.bias", (Axis("c"),)))
    spec = check(ModelSpec("d", (40, 50), 2000, (AxisGroup("c", 2000, prunable=False),), tensors, nodes))
    engine = MAKE()
    engine.load(spec, WHOLE, {"n.weight": np.ones(2000, np.float32), "n.bias": np.zeros(2000, np.float32)})
    x = np.ones((5, 40, 50), np.float32)
    found = []
    for numbers in ((1, 2), (1, 2), (2, 1)):
        engine.seed(*numbers)
        found.append([dropped(engine, x) for _ in range(2)])
    np.testing.assert_array_equal(found[0], found[1])
    masks = [*found[0], *found[2]]
    assert all(abs(mask.mean() - 0.25) < 0.02 for mask in masks)
    rows = [row.tobytes() for mask in masks for row in mask]
    assert len(set(rows)) == len(rows), "samples, passes and orders drop others"
    assert not engine.forward(x).any()


def test_what_dropout_keeps_is_scaled_and_takes_the_gradient():
    spec = normed(500)
    engine = loaded(spec)
    x, y = batch(spec, 64)
    engine.forward_backward(x, y)
    p = engine.params
    z = x.astype(np.float64) @ p["a.weight"].T + p["a.bias"]
    z = np.maximum((z - z.mean(0)) / np.sqrt(z.var(0) + NORM_EPSILON) * p["n.weight"] + p["n.bias"], 0)
    # Each sample is one of the sixteen ways to keep, and to double, four values.
    ways = np.array([[k >> i & 1 for i in range(4)] for k in range(16)])
    outputs = (2 * z[:, None, :] * ways) @ p["o.weight"].T + p["o.bias"]
    gaps = np.abs(outputs - engine.logits[:, None, :]).max(2)
    assert gaps.min(1).max() < 1e-5
    chosen = ways[gaps.argmin(1)]
    odds = np.exp(engine.logits) / np.exp(engine.logits).sum(1, keepdims=True)
    slope = (odds - np.eye(2)[y]) / len(x)
    np.testing.assert_allclose(engine.grads["o.weight"], slope.T @ (2 * z * chosen), atol=1e-5)


def test_an_order_drops_by_its_seed_and_round(tmp_path):
    spec, recipe = normed(400), Recipe(batch=8, seed=5)
    data = dataset(spec)
    found = []
    for place in range(2):
        done = perform(job(tmp_path / str(place), spec, arrays_of(spec), [WIDE], recipe), data)
        assert isinstance(done, Done)
        with open_blob(Path(done.update)) as blob:
            found.append({name: blob.tensor(name).copy() for name in blob.names})
    assert set(found[0]) == {tensor.name for tensor in spec.tensors}, "statistics travel like weights"
    by_hand = []
    for numbers in ((5, 1), ()):
        engine = loaded(spec)
        engine.seed(*numbers)
        find("sgd").train(Task(recipe, engine, *data.train, 1, 8, lambda *_: None))
        by_hand.append({name: array - arrays_of(spec)[name] for name, array in engine.params.items()})
    for name, move in by_hand[0].items():
        np.testing.assert_array_equal(found[0][name], move)
        np.testing.assert_array_equal(found[1][name], move)
    assert any(np.abs(by_hand[1][name] - move).max() > 1e-4 for name, move in by_hand[0].items())


def test_scores_leave_statistics_as_they_came():
    spec = normed()
    engine = loaded(spec)
    before = {name: array.copy() for name, array in engine.params.items()}
    x, y = batch(spec, 9)
    task = Task(Recipe(rule="score", batch=3), engine, x, y, 1, 3, lambda *_: None)
    assert set(find("score").train(task).extras) == {"a.weight", "o.weight"}
    for name, array in engine.params.items():
        np.testing.assert_array_equal(array, before[name])
