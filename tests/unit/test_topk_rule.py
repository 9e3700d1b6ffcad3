"""The rule topk against residuals kept in a loop, and what it must never lose."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime import rules
from edge_runtime.rules import sgd, topk
from tests.support.engines import make as MAKE
from tests.support.models import batch, random_arrays, small_cnn
from wire.errors import SpecError
from wire.messages import Recipe
from wire.spec import Structure

pytestmark = pytest.mark.usefixtures("every_engine")
SPEC = small_cnn()
WEIGHTS = random_arrays(SPEC, Structure())
SIZE = sum(array.size for array in WEIGHTS.values())
ONE = Recipe(rule="topk", steps=1, batch=8, rate=0.1, seed=3)


def order(recipe, own=None, weights=WEIGHTS, number=1, count=21, rule=topk, **more):
    engine = MAKE()
    engine.load(SPEC, Structure(), weights)
    x, y = batch(SPEC, count)
    micro = more.pop("micro", recipe.batch)
    task = rules.Task(recipe, engine, x, y, number, micro, lambda *_: None, own=own or {}, **more)
    return engine, rule.train(task)


def knobs(recipe=ONE, **values):
    return dataclasses.replace(recipe, knobs={name: float(value) for name, value in values.items()})


def line(arrays):
    return np.concatenate([np.ravel(arrays[name]) for name in WEIGHTS])


def spread(update):
    """Give the update in whole arrays, and where something was sent."""
    whole = {name: np.zeros_like(array) for name, array in WEIGHTS.items()}
    sent = {name: np.zeros(array.shape, bool) for name, array in WEIGHTS.items()}
    for name, extra in update.items():
        places = np.arange(WEIGHTS[name].size) if extra.places is None else extra.places
        assert (np.diff(places) > 0).all()
        whole[name].reshape(-1)[places] = np.ravel(extra.values)
        sent[name].reshape(-1)[places] = True
    return line(whole), line(sent)


def movement(recipe, number=1, weights=WEIGHTS):
    """What plain SGD would have sent."""
    engine, _ = order(dataclasses.replace(recipe, rule="sgd", knobs={}), number=number, weights=weights, rule=sgd)
    return line(engine.params) - line(weights)


@pytest.mark.parametrize("recipe", [ONE, Recipe(rule="topk", epochs=2, batch=8, rate=0.1, momentum=0.9, clip=1.0)])
def test_all_of_it_is_plain_sgd_to_the_bit(recipe):
    for count in (0, SIZE, SIZE + 5):
        engine, trained = order(knobs(recipe, k=count))
        whole, sent = spread(trained.update)
        assert sent.all()
        assert (whole == movement(recipe)).all()
        assert not line(trained.own).any()
        np.testing.assert_array_equal(line(engine.params), line(WEIGHTS) + whole)


def test_three_orders_meet_a_loop_over_residuals():
    own, residual = {}, np.zeros(SIZE, np.float32)
    for number, count in enumerate((40, 7, 200), 1):
        weights = random_arrays(SPEC, Structure(), number)
        before = residual + movement(ONE, number, weights)
        engine, trained = order(knobs(k=count), own, weights, number)
        wanted = sorted(range(SIZE), key=lambda j: (-abs(before[j]), j))[:count]
        whole, sent = spread(trained.update)
        assert np.flatnonzero(sent).tolist() == sorted(wanted)
        residual = np.where(sent, np.float32(0), before)
        np.testing.assert_array_equal(whole, np.where(sent, before, 0))
        np.testing.assert_array_equal(line(trained.own), residual)
        np.testing.assert_array_equal(whole + line(trained.own), before)  # nothing is lost, nothing counted twice
        np.testing.assert_array_equal(line(engine.params), line(weights) + whole)
        own = trained.own


def test_one_step_gathers_the_gradient_times_the_rate():
    engine = MAKE()
    engine.load(SPEC, Structure(), WEIGHTS)
    x, y = batch(SPEC, 8)
    engine.forward_backward(x, y)
    _, trained = order(knobs(k=30), count=8)
    whole, sent = spread(trained.update)
    np.testing.assert_allclose(whole + line(trained.own), -0.1 * line(engine.grads), atol=1e-7)
    assert np.abs(whole[sent]).min() >= np.abs(line(trained.own)).max()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(0, 4))
def test_largest_is_a_stable_sort(seed, count, digits):
    rng = np.random.default_rng(seed)
    arrays = {
        n: rng.standard_normal(s).astype(np.float32).round(digits) for n, s in (("a", (3, 4)), ("b", 7), ("c", 5))
    }
    flat = np.concatenate([np.ravel(a) for a in arrays.values()])
    wanted = np.argsort(-np.abs(flat), kind="stable")[:count]
    found = topk.largest(arrays, count)
    offsets = {"a": 0, "b": 12, "c": 19}
    assert sorted(wanted.tolist()) == [int(p) + offsets[n] for n, places in found.items() for p in places]
    assert all(len(places) for places in found.values())


def test_a_probe_tells_what_its_own_update_does_to_the_loss():
    recipe = knobs(dataclasses.replace(ONE, batch=21, rate=0.05), k=60, probe=10)
    engine, trained = order(recipe)
    _, shorter = order(knobs(recipe, k=10))
    x, y = batch(SPEC, 21)
    losses = []
    for update in ({}, shorter.update, trained.update):
        twin = MAKE()
        moved = {n: a.copy() for n, a in WEIGHTS.items()}
        for name, extra in update.items():
            moved[name].reshape(-1)[extra.places] += extra.values
        twin.load(SPEC, Structure(), moved)
        losses.append(twin.evaluate(x, y)[0] / 21)
    found = [trained.metrics[f"loss.{name}"] for name in ("start", "probe", "sent")]
    assert found == pytest.approx(losses, abs=1e-6)
    assert found[0] > found[1] > found[2]
    _, silent = order(knobs(recipe, k=60))
    assert silent.metrics == {}
    np.testing.assert_array_equal(spread(silent.update)[0], spread(trained.update)[0])
    assert trained.losses == silent.losses
    assert len(engine.params) == len(WEIGHTS)


def test_no_samples_send_what_was_kept():
    own = {name: np.full_like(array, 2.0) for name, array in WEIGHTS.items()}
    _, trained = order(knobs(k=5, probe=2), own, count=0)
    whole, sent = spread(trained.update)
    assert sent.sum() == 5
    assert whole[sent].tolist() == [2.0] * 5
    assert (trained.steps, trained.metrics) == (0, {})


def test_what_it_cannot_do_is_named():
    for values in ({"k": 2.5}, {"k": -1}, {"probe": 0.1}):
        with pytest.raises(SpecError, match="whole number"):
            order(knobs(**values))
    with pytest.raises(SpecError, match="masked"):
        order(ONE, masks={"f.weight": np.ones((12, 54), bool)})
