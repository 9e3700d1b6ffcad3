"""Importance that a rule tells, against autograd of the dense model times its masks, step by step."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from edge_runtime import rules
from edge_runtime.engines import Choice, Update
from edge_runtime.kernels.choose import Layer, Timing
from edge_runtime.rules import importance, sgd
from tests.support.engines import make as MAKE
from tests.support.exact import Exact
from tests.support.models import batch, random_arrays, small_cnn
from tests.support.sequences import attended, normed
from wire import memory
from wire.errors import NonFinite, SpecError
from wire.masked import maskable
from wire.messages import Recipe
from wire.spec import Structure, tensor_shapes
from wire.structure import masked

pytestmark = pytest.mark.usefixtures("every_engine")
SPEC = small_cnn()
NAMES = maskable(SPEC)
SHAPES = tensor_shapes(SPEC, Structure())


def masks_of(density=0.4, seed=5):
    rng = np.random.default_rng(seed)
    return {name: rng.random(SHAPES[name]) < density for name in NAMES}


def recipe(**fields):
    knobs = {name.replace("__", "."): value for name, value in fields.pop("knobs", {}).items()}
    known = {"rule": "importance", "batch": 4, "rate": 0.3, "seed": 7, "steps": 5, "knobs": knobs, **fields}
    return Recipe(**known)


def loaded(masks, way="sparse"):
    engine = MAKE()
    engine.load(SPEC, Structure(), random_arrays(SPEC, Structure(), 3), masks, Choice(ways={"": way}))
    return engine


def trained(how, masks=None, micro=0, way="sparse", own=None, rule=importance):
    engine = loaded(masks, way)
    x, y = batch(SPEC, 10)
    task = rules.Task(how, engine, x, y, 2, micro or how.batch, lambda *_: None, masks or {}, own or {})
    return engine, rule.train(task)


def oracle(how, masks=None, last=0):
    """Dense weights times masks; every step's whole gradient by autograd, squared and added up."""
    x, y = batch(SPEC, 10)
    engine = MAKE()
    weights = random_arrays(SPEC, Structure(), 3)
    for name, mask in (masks or {}).items():
        weights[name] *= mask
    engine.load(SPEC, Structure(), weights)
    rng, order, z = np.random.default_rng([how.seed, 2]), [], {name: np.zeros(SHAPES[name]) for name in NAMES}
    rest, steps = 0.0, how.steps or how.epochs * 3
    for step in range(steps):
        order = order or list(np.array_split(rng.permutation(10), [4, 8]))
        rows = order.pop(0)
        for grad in engine.grads.values():
            grad.fill(0)
        engine.forward_backward(x[rows], y[rows])
        for name, grad in engine.grads.items():
            if step >= steps - (last or steps):
                if name in z:
                    z[name] += grad.astype(np.float64) ** 2
                else:
                    rest += float((grad.astype(np.float64) ** 2).sum())
            moved = engine.params[name] - np.float32(how.rate) * grad
            engine.params[name][...] = moved * (masks or {}).get(name, np.float32(1))
    return z, rest, engine


def whole(result, name):
    extra = result.extras[name]
    assert extra.places is None
    return extra.values


@pytest.mark.parametrize("micro", [4, 3])
@pytest.mark.parametrize("way", ["sparse", "dense"])
@pytest.mark.parametrize("window", [0.0, 1.0])
def test_importance_is_autograds_of_the_dense_masked_model(window, way, micro):
    how, masks = recipe(knobs={"send": 1.0, "window": window}), masks_of()
    engine, result = trained(how, masks, micro, way)
    z, rest, twin = oracle(how, masks)
    for name in NAMES:
        np.testing.assert_allclose(whole(result, name), z[name], rtol=1e-3, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(engine.read(name), twin.params[name][masks[name]], atol=1e-5)
        assert result.metrics[f"theta.{name}"] == 0.0
    assert result.metrics["rest"] == pytest.approx(rest, rel=1e-3)
    assert set(result.own) == (set() if window else {*NAMES, "rest", "since"})
    assert result.steps == 5


@pytest.mark.parametrize("window", [0.0, 1.0])
@pytest.mark.parametrize("micro", [4, 3])
def test_a_model_without_masks_tells_the_same(window, micro):
    how = recipe(knobs={"send": 1.0, "window": window, "gradients": 1.0}, clip=0.5)
    _, result = trained(how, micro=micro)
    free = recipe(knobs={"send": 1.0, "window": window, "gradients": 1.0})
    _, unclipped = trained(free, micro=micro)
    z, rest, _ = oracle(free)
    for name in NAMES:
        np.testing.assert_allclose(whole(unclipped, name), z[name], rtol=1e-3, atol=1e-6, err_msg=name)
        assert (whole(result, name) > 0).any()  # before clipping
    assert unclipped.metrics["rest"] == pytest.approx(rest, rel=1e-3)
    with pytest.raises(SpecError, match="gradients"):
        trained(recipe())


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("spec", [normed(), attended()], ids=lambda spec: spec.name)
def test_norms_and_layers_that_cannot_be_masked_count_with_what_is_never_pruned(spec, whole):
    names, how = maskable(spec), recipe(knobs={"send": 1.0, "window": 1.0, "gradients": 1.0}, rate=0.1)
    weights, (x, y) = random_arrays(spec, Structure(), 3), batch(spec, 10)
    weights |= {tensor.name: np.ones_like(weights[tensor.name]) for tensor in spec.tensors if tensor.init == "ones"}
    rng = np.random.default_rng(5)
    masks = {} if whole else {name: rng.random(weights[name].shape) < 0.6 for name in names}
    engine = MAKE()
    engine.load(
        spec, Structure(), {n: array.copy() for n, array in weights.items()}, masks, Choice(ways={"": "sparse"})
    )
    result = importance.train(rules.Task(how, engine, x, y, 2, how.batch, lambda *_: None, masks))
    exact = Exact(spec, Structure(), weights, masks)
    z, rest, order, rng = dict.fromkeys(names, 0.0), 0.0, [], np.random.default_rng([how.seed, 2])
    for _ in range(how.steps):
        order = order or list(np.array_split(rng.permutation(10), [4, 8]))
        rows = order.pop(0)
        exact.forward_backward(x[rows], y[rows])
        for name in exact.grads():
            square = exact.params[name].grad.numpy() ** 2
            if name in z:
                z[name] = z[name] + square
            else:
                rest += square.sum()
        exact.move(Update(how.rate, 0.0, 0.0))
    assert set(result.extras) == set(names), "what cannot be masked is told of no more"
    for name in names:
        np.testing.assert_allclose(result.extras[name].values.reshape(z[name].shape), z[name], rtol=2e-3, atol=1e-5)
    assert result.metrics["rest"] == pytest.approx(rest, rel=1e-3)


@pytest.mark.parametrize("last", [1, 2, 5, 9])
def test_only_the_last_steps_count(last):
    how, masks = recipe(knobs={"send": 1.0, "window": 1.0, "last": float(last)}), masks_of()
    _, result = trained(how, masks)
    z, rest, _ = oracle(how, masks, last=min(last, 5))
    for name in NAMES:
        np.testing.assert_allclose(whole(result, name), z[name], rtol=1e-3, atol=1e-6, err_msg=name)
    assert result.metrics["rest"] == pytest.approx(rest, rel=1e-3)


@pytest.mark.parametrize("window", [0.0, 1.0])
def test_the_largest_and_a_bound_on_the_rest(window):
    masks = masks_of()
    _, dense = trained(recipe(knobs={"send": 1.0, "window": window}), masks)
    tops = {"top__c.weight": 5.0, "top__f.weight": 600.0, "top__o.weight": 48.0}
    _, result = trained(recipe(knobs={"send": 1.0, "window": window, **tops}), masks)
    for name, count in (("c.weight", 5), ("f.weight", 600)):
        line = whole(dense, name).ravel()
        order = np.argsort(-line, kind="stable")[:count]
        wanted = np.sort(order[line[order] > 0])
        extra = result.extras[name]
        assert extra.places.tolist() == wanted.tolist()
        assert extra.values.tolist() == line[wanted].tolist()
        assert result.metrics[f"theta.{name}"] == line[order].min()
        assert (np.delete(line, wanted) <= np.float32(result.metrics[f"theta.{name}"])).all()
    assert whole(result, "o.weight").tolist() == whole(dense, "o.weight").tolist()


def test_sums_go_on_even_after_they_were_told():
    masks, other = masks_of(), masks_of(seed=6)
    _, first = trained(recipe(), masks)
    assert first.extras == {}
    assert set(first.own) == {*NAMES, "rest", "since"}
    own = {name: array.copy() for name, array in first.own.items()}
    _, alone = trained(recipe(knobs={"send": 1.0}), other)
    _, second = trained(recipe(knobs={"send": 1.0}), other, own=own)
    for name in NAMES:
        np.testing.assert_allclose(whole(second, name), first.own[name] + whole(alone, name), rtol=1e-5, atol=1e-7)
        assert whole(second, name) is own[name], "of what it was given, without a copy"
    assert second.metrics["rest"] == pytest.approx(float(own["rest"][0]) + alone.metrics["rest"], rel=1e-5)
    _, third = trained(recipe(knobs={"send": 1.0}), masks, own={name: a.copy() for name, a in second.own.items()})
    for name in NAMES:
        np.testing.assert_allclose(whole(third, name), whole(second, name) + first.own[name], rtol=1e-5, atol=1e-7)


def test_sums_for_a_decision_that_was_taken_without_this_device_count_no_more():
    masks = masks_of()
    _, first = trained(recipe(knobs={"since": 10.0}), masks)
    _, alone = trained(recipe(knobs={"send": 1.0}), masks)
    _, late = trained(recipe(knobs={"send": 1.0, "since": 20.0}), masks, own=dict(first.own))
    for name in NAMES:
        np.testing.assert_array_equal(whole(late, name), whole(alone, name))
    assert late.metrics["rest"] == alone.metrics["rest"]


@pytest.mark.parametrize("micro", [4, 3])
def test_weights_move_as_under_sgd(micro):
    masks = masks_of()
    for window in (0.0, 1.0):
        how = recipe(momentum=0.9, decay=0.01, clip=0.2, knobs={"window": window})
        engine, result = trained(how, masks, micro)
        plain, wanted = trained(recipe(rule="sgd", momentum=0.9, decay=0.01, clip=0.2), masks, micro, rule=sgd)
        assert result.losses == wanted.losses
        for name in engine.params:
            assert engine.read(name).tolist() == plain.read(name).tolist()


def test_few_samples_and_their_accuracy():
    how = recipe(steps=0, epochs=60, knobs={"samples": 6.0, "measure": 1.0, "window": 1.0})
    engine, result = trained(how, masks_of(0.9))
    x, y = batch(SPEC, 10)
    assert result.steps == 120
    assert result.metrics["accuracy.train"] == engine.evaluate(x[:6], y[:6])[1] / 6
    assert result.metrics["accuracy.train"] > 0.6


def test_knobs_that_make_no_sense():
    for knobs in ({"window": 2.0}, {"send": 0.5}, {"top__c.weight": 0.0}, {"last": -1.0}):
        with pytest.raises(SpecError, match="knob"):
            trained(recipe(knobs=knobs), masks_of())


def test_what_runs_away_is_told():
    with pytest.raises(NonFinite):
        trained(recipe(rate=1e30), masks_of())


def test_seconds_are_told_where_layers_were_timed():
    engine = MAKE()
    masks = masks_of()
    engine.load(SPEC, Structure(), random_arrays(SPEC, Structure(), 3), masks, Choice(batch=4))
    x, y = batch(SPEC, 10)
    result = importance.train(rules.Task(recipe(), engine, x, y, 2, 4, lambda *_: None, masks))
    assert all(result.metrics[f"seconds.{name}"] > 0.0 for name in NAMES)


def test_seconds_are_those_of_this_layer_and_not_of_another_with_weights_of_its_shape():
    engine, masks = MAKE(), masks_of()
    engine.load(SPEC, Structure(), random_arrays(SPEC, Structure(), 3), masks, Choice(ways={"": "sparse"}))
    way, kept = engine.ways["c.weight"], int(masks["c.weight"].sum())
    own = Layer("conv2d", SHAPES["c.weight"], (1, 6, 6), (3, 1, 1), kept - 5, 4)
    others = [dataclasses.replace(own, input_shape=(1, 3, 3), kept=kept), dataclasses.replace(own, batch=64, kept=kept)]
    found = [Timing(layer, {way: seconds}) for layer, seconds in zip([*others, own], (1.0, 2.0, 3.0), strict=True)]
    engine.timings = lambda: tuple(found)
    x, y = batch(SPEC, 10)
    result = importance.train(rules.Task(recipe(), engine, x, y, 2, 4, lambda *_: None, masks))
    assert {name: value for name, value in result.metrics.items() if "seconds" in name} == {"seconds.c.weight": 3.0}


@pytest.mark.parametrize("window", [0.0, 1.0])
def test_a_step_in_micro_batches_holds_no_more_than_the_weights(monkeypatch, window):
    held, settle = [], importance._Sums.settle

    def watched(sums):
        for name, passed in sums.now.items():
            held.append(sum(x.size + dy.size for x, dy in passed) <= math.prod(SHAPES[name]))
        held.append(bool(sums.part))
        settle(sums)

    monkeypatch.setattr(importance._Sums, "settle", watched)
    trained(recipe(batch=10, knobs={"window": window}), masks_of(), micro=2)
    assert held
    assert all(held)


def test_memory_counts_the_sums_or_what_passed():
    masks = masks_of()
    structure = masked(masks)

    def peak(how, structure=structure):
        return memory.predict(SPEC, structure, how, 4).peak

    plain = peak(recipe(rule="sgd"))
    weights = sum(math.prod(shape) for shape in SHAPES.values())
    plain += 3 * 4 * 648  # blocks of a gradient
    assert peak(recipe()) == plain + 4 * weights
    passed = min(54, 20 * (36 + 216)) + min(648, 20 * (54 + 12)) + min(48, 20 * 16)
    assert peak(recipe(knobs={"window": 1.0})) == plain + 4 * passed
    short = min(54, 4 * (36 + 216)) + min(648, 4 * (54 + 12)) + min(48, 4 * 16)
    assert peak(recipe(knobs={"window": 1.0, "last": 1.0})) == plain + 4 * short
    parts = memory.predict(SPEC, structure, recipe(knobs={"window": 1.0}), 2).peak
    assert parts == memory.predict(SPEC, structure, recipe(rule="sgd"), 2).peak + 4 * (passed + short + 3 * 648)
    held = recipe(knobs={"gradients": 1.0, "window": 1.0})
    assert peak(held, Structure()) == peak(recipe(rule="sgd", clip=1.0), Structure()) + 4 * weights
