"""Fledge against a loop over single coordinates, and its rule against an MLP that is written out in double precision."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.advance import load_state, save_state
from coordinator.algorithm import Answer, DeviceView, rng_of
from coordinator.algorithms import fledge
from coordinator.blocks.nesting import whole_of
from edge_runtime import rules
from edge_runtime.engines import open_engine
from edge_runtime.rules import sgd
from tests.support.models import linear, random_arrays, small_cnn, widths
from tests.support.sequences import normed
from wire.builders import mlp
from wire.errors import ConfigError, Malformed, SpecError
from wire.memory import predict
from wire.messages import Recipe, Usage
from wire.spec import Node, Structure
from wire.spool import Spool
from wire.structure import order_of

SPEC = small_cnn()
NORMED = normed()
TOP = 2
GREAT = 1 << 40


def start(seed=0, **params):
    return fledge.init(SPEC, random_arrays(SPEC, Structure(), seed), {"fractions": "0.3 0.6 1", **params})


def planned(state, number, devices=()):
    return fledge.plan(state, number, devices, rng_of(3, number))


def said(state, device, capacity, samples=10, seed=0):
    structure = whole_of(state).narrowed(capacity)
    return Answer(device, samples, structure, {}, Usage(), random_arrays(SPEC, structure, seed))


def fleet(state, seed, most=TOP):
    rng = np.random.default_rng(seed)
    caps = rng.integers(0, most + 1, int(rng.integers(1, 5)))
    return tuple(said(state, f"d{i}", int(k), int(rng.integers(1, 90)), 100 * seed + i) for i, k in enumerate(caps))


def coordinates(state, answer):
    """Give every coordinate of the whole model that an update has, with its value."""
    orders, found = {g: order_of(levels) for g, levels in state.levels.items()}, {}
    for tensor in SPEC.tensors:
        for index, value in np.ndenumerate(answer.update[tensor.name]):
            place = []
            for i, axis in zip(index, tensor.axes, strict=True):
                channel, inner = divmod(i, axis.inner)
                whole = int(orders[axis.group][channel]) if axis.group in orders else channel
                place.append(whole * axis.inner + inner)
            found[tensor.name, tuple(place)] = float(value)
    return found


def looped(weights, momentum, state, answers, beta):
    """``D = mean of updates; V = beta V + D; w += D + beta V``, each coordinate over those who have it, if anybody has."""
    held = [coordinates(state, answer) for answer in answers]
    for name, array in weights.items():
        for index in np.ndindex(array.shape):
            values = [one[name, index] for one in held if (name, index) in one]
            if values:
                step = sum(values) / len(values)
                momentum[name][index] = beta * momentum[name][index] + step
                array[index] += step + beta * momentum[name][index]


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10**6), beta=st.sampled_from([0.0, 0.5, 0.9]), most=st.integers(0, TOP))
def test_rounds_are_the_loop_over_coordinates(seed, beta, most):
    state = start(seed % 100, beta=beta)
    weights = {name: array.astype(np.float64) for name, array in state.weights.items()}
    momentum = {name: np.zeros(array.shape) for name, array in weights.items()}
    for number in range(1, 5):
        state, _ = planned(state, number)  # which ranks again, so that momentum must follow its channels
        answers = fleet(state, seed + number, most)
        looped(weights, momentum, state, answers, beta)
        state = fledge.close(state, answers[:: 1 if number % 2 else -1])
        for name, array in weights.items():
            np.testing.assert_allclose(state.weights[name], array, atol=1e-5)
            if beta:
                np.testing.assert_allclose(state.arrays[f"momentum/{name}"], momentum[name], atol=1e-5)


def test_what_nobody_covers_stands_still_with_its_momentum():
    state = start()
    state = fledge.close(state, (said(state, "a", TOP),))
    after = fledge.close(state, (said(state, "b", 0, seed=1), said(state, "c", 1, seed=2)))
    outer = state.levels["b"] == TOP
    for arrays, before in ((after.weights, state.weights), (after.arrays, state.arrays)):
        name = "f.bias" if "f.bias" in before else "momentum/f.bias"
        assert np.array_equal(arrays[name][outer], before[name][outer])
        assert not np.array_equal(arrays[name][~outer], before[name][~outer])
    assert np.any(state.arrays["momentum/f.bias"][outer])


def test_samples_do_not_weigh_and_who_has_none_does_not_count():
    state = start()
    answers = (said(state, "a", 1, 1), said(state, "b", TOP, 5, seed=1))
    heavy = tuple(dataclasses.replace(answer, samples=1000 * answer.samples) for answer in answers)
    none = said(state, "c", TOP, 0, seed=2)
    once, again = fledge.close(state, answers), fledge.close(state, (*heavy, none))
    for name in state.weights:
        assert np.array_equal(once.weights[name], again.weights[name])
    for nobody in ((), (none,)):
        assert fledge.close(state, nobody) is state


def test_each_device_trains_the_widest_that_it_holds_in_time():
    state, (draft,) = planned(start(deadline=2.0), 1, (DeviceView("a", GREAT),))
    assert draft.structure.capacity == TOP
    assert (draft.recipe.rule, draft.recipe.knobs) == ("sgd", {"widths": 1.0, "mutual": 1.0})
    needs = [predict(SPEC, whole_of(state).narrowed(k), draft.recipe, 1).bound for k in range(3)]
    views = [DeviceView(f"d{i}", n) for i, n in enumerate((needs[2], needs[1], needs[0], needs[0] - 1))]
    state, drafts = planned(state, 1, views)
    assert [(d.device, d.structure.capacity) for d in drafts] == [("d0", 2), ("d1", 1), ("d2", 0)]
    state = fledge.close(state, tuple(said(state, d.device, d.structure.capacity) for d in drafts))
    _, drafts = planned(state, 2, [dataclasses.replace(view, seconds_turn=50.0) for view in views])
    assert [d.structure.capacity for d in drafts] == [0, 0, 0]


@pytest.mark.parametrize(
    ("params", "tuned"),
    [
        ({}, [5, 10]),
        ({"personal_every": 3.0}, [3, 6, 9]),
        ({"personal_every": 0.0}, []),
        ({"recipe.personal": 0.0}, []),
    ],
)
def test_devices_make_their_models_their_own_every_few_rounds(params, tuned):
    state = start(**params)
    for number in range(1, 11):
        _, (draft,) = planned(state, number, (DeviceView("a", GREAT),))
        assert bool(draft.recipe.knobs.get("personal")) == (number in tuned)
    for wrong in (-1.0, 0.5):
        with pytest.raises(ConfigError, match="personal_every"):
            start(personal_every=wrong)


def test_they_do_so_in_the_round_before_one_that_calibrates():
    state = fledge.init(NORMED, random_arrays(NORMED, Structure(), 1), {"fractions": "0.5 1", "calibrate": 5.0})
    found = [planned(state, number, (DeviceView("a", GREAT),))[1][0] for number in range(1, 11)]
    assert [n for n, draft in enumerate(found, 1) if draft.verb == "calibrate"] == [5, 10]
    tuned = [n for n, draft in enumerate(found, 1) if draft.verb == "train" and draft.recipe.knobs.get("personal")]
    assert tuned == [4, 9]


def test_a_round_of_their_own_is_not_lost_where_the_next_one_calibrates():
    params = {"fractions": "0.5 1", "calibrate": 5.0, "personal_every": 4.0}
    state = fledge.init(NORMED, random_arrays(NORMED, Structure(), 1), params)
    found = [planned(state, number, (DeviceView("a", GREAT),))[1][0] for number in range(1, 26)]
    assert [n for n, draft in enumerate(found, 1) if draft.recipe.knobs.get("personal")] == [4, 8, 12, 16, 19, 24]


def test_a_model_or_loss_that_devices_cannot_make_their_own_is_refused_at_once():
    spec = SPEC
    headless = dataclasses.replace(spec, nodes=(*spec.nodes, Node("squashed", "sigmoid", (spec.nodes[-1].name,))))
    arrays = random_arrays(headless, Structure(), 0)
    for params in ({}, {"recipe.loss": "sum", "recipe.mutual": 0.0}):
        with pytest.raises(ConfigError, match="personal_every = 0"):
            fledge.init(headless if not params else SPEC, arrays, params)
    for wrong in (-1.0, 0.5, float("nan")):
        with pytest.raises(ConfigError, match=r"recipe\.personal"):
            start(**{"recipe.personal": wrong})
    for params in ({"personal_every": 0.0}, {"recipe.personal": 0.0}):
        assert fledge.init(headless, arrays, params).round == 0


def test_a_run_of_before_goes_on_without_what_it_does_not_know():
    state = start(deadline=2.0)
    new = ("norms", "calibrate", "recipe.personal", "personal_every", "slack")
    old = {name: value for name, value in state.scalars["params"].items() if name not in new}
    state = dataclasses.replace(state, scalars={"params": old}, norms={})
    for number in range(1, 6):
        state, (draft,) = planned(state, number, (DeviceView("a", GREAT),))
        assert draft.recipe.knobs.keys() == {"widths", "mutual"}
        state = fledge.close(state, (said(state, "a", TOP, seed=number),))
        assert state.scalars["due"] == {"a": TOP}


def test_a_round_with_more_to_do_tells_nothing_of_the_time_that_training_takes():
    for every, count, heard, limit in (
        (2.0, 1.0, False, "deadline"),
        (1.0, 1.0, True, "deadline"),
        (2.0, 0.0, True, "slack"),
        (2.0, 1.0, False, "slack"),
    ):
        params = {"personal_every": every, "recipe.personal": count, limit: 9.0}
        state, drafts = planned(start(**params), 2, (DeviceView("a", GREAT),))
        assert drafts[0].recipe.knobs.get("personal", 0.0) == count
        state = fledge.close(state, (said(state, "a", TOP),))
        assert ("a" in state.scalars.get("due", {})) == heard


def test_turns_are_heard_of_where_every_round_that_trains_has_more_to_do():
    params = {"fractions": "0.5 1", "calibrate": 2.0, "personal_every": 2.0, "deadline": 9.0}
    state = fledge.init(NORMED, random_arrays(NORMED, Structure(), 1), params)
    state, (draft,) = planned(state, 1, (DeviceView("a", GREAT),))
    assert draft.recipe.knobs["personal"] == 1.0
    answer = Answer("a", 9, draft.structure, {}, Usage(), random_arrays(NORMED, draft.structure, 2))
    assert fledge.close(state, (answer,)).scalars["due"] == {"a": draft.structure.capacity}


def test_a_run_goes_on_from_its_saved_state(tmp_path):
    state, spool = start(deadline=5.0), Spool(tmp_path)
    for number in range(1, 4):
        state, _ = planned(state, number, (DeviceView("d0", GREAT, seconds_turn=1.0),))
        state = fledge.close(state, fleet(state, number))
        again = load_state(spool, save_state(spool, state).digest, SPEC)
        answers = fleet(state, number + 50)
        first, second = fledge.close(state, answers), fledge.close(again, answers)
        assert save_state(spool, first).digest == save_state(spool, second).digest


def test_wrong_parameters_and_answers_are_explained():
    for wrong in (
        {"beta": 1.0},
        {"beta": -0.1},
        {"beta": float("nan")},
        {"deadline": -1.0},
        {"slack": 0.5},
        {"fractions": "0.5"},
    ):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            start(**wrong)
    with pytest.raises(ConfigError, match="fedavg"):
        fledge.init(linear(), random_arrays(linear(), Structure()), {})
    state = start()
    foreign = dataclasses.replace(said(state, "dev", 1), structure=Structure(1, state.widths, "0" * 64))
    with pytest.raises(Malformed, match="dev"):
        fledge.close(state, (foreign,))


# The rule: nested widths of a perceptron in plain numpy.

PLAIN = mlp("plain", (5,), 3, (8, 6))
NESTED = widths(**{g.name: c for g, c in zip(PLAIN.groups, ((2, 4, 6, 8), (2, 3, 5, 6)), strict=False)})
COUNTS = tuple(NESTED.widths.values())
X = np.random.default_rng(4).standard_normal((21, 5)).astype(np.float32)
Y = np.random.default_rng(5).integers(0, 3, 21)


def trained(recipe, micro=None, labels=Y):
    engine = open_engine("torch")()
    engine.load(PLAIN, NESTED, random_arrays(PLAIN, NESTED))
    task = rules.Task(recipe, engine, X, labels, 1, micro or recipe.batch, lambda *_: None)
    return engine, sgd.train(task)


def odds(logits):
    exp = np.exp(logits - logits.max(1, keepdims=True))
    return exp / exp.sum(1, keepdims=True)


def width(params, capacity):
    a, b = (counts[capacity] for counts in COUNTS)
    one, one_bias, two, two_bias, out, out_bias = params
    return [one[:a], one_bias[:a], two[:b, :a], two_bias[:b], out[:, :b], out_bias]


def gradients(params, x, target):
    """Give the gradients of the mean cross-entropy, the output, and that loss."""
    one, one_bias, two, two_bias, out, out_bias = params
    first = np.maximum(x @ one.T + one_bias, 0)
    second = np.maximum(first @ two.T + two_bias, 0)
    found = odds(second @ out.T + out_bias)
    last = (found - target) / len(x)
    inner = (last @ out) * (second > 0)
    outer = (inner @ two) * (first > 0)
    loss = -(target * np.log(found)).sum() / len(x)
    return [outer.T @ x, outer.sum(0), inner.T @ first, inner.sum(0), last.T @ second, last.sum(0)], found, loss


def mutual(recipe, share):
    """Give the parameters after training and the mean losses of the passes."""
    rng = np.random.default_rng([recipe.seed, 1])
    params = [array.astype(np.float64) for array in random_arrays(PLAIN, NESTED).values()]
    speed, losses = [np.zeros(p.shape) for p in params], []
    for _ in range(recipe.epochs):
        order, passed, loss = rng.permutation(len(X)), 0.0, 0.0
        for begin in range(0, len(X), recipe.batch):
            rows = order[begin : begin + recipe.batch]
            between = rng.permutation(np.arange(1, 3))[: int(recipe.knobs["widths"])]
            hard = np.eye(3)[Y[rows]]
            _, soft, _ = gradients(width(params, 0), X[rows], hard)
            for capacity in (3, *sorted(between, reverse=True), 0):
                own, found, told = gradients(width(params, capacity), X[rows], (1 - share) * hard + share * soft)
                if capacity == 3:
                    soft, loss = found, told
                total = [np.zeros(p.shape) for p in params]
                for place, gradient in zip(width(total, capacity), own, strict=True):
                    np.add(place, gradient, out=place)
                length = np.sqrt(sum((g**2).sum() for g in total))
                for p, v, g in zip(params, speed, total, strict=True):
                    v[...] = recipe.momentum * v + min(1.0, recipe.clip / length) * g
                    np.subtract(p, recipe.rate * v, out=p)
            passed += loss * len(rows)
        losses.append(passed / len(X))
    return params, losses


@pytest.mark.parametrize(("number", "share"), [(1, 0.5), (2, 0.3), (1, 1.0)])
def test_the_widest_and_the_narrowest_width_teach_each_other(number, share):
    knobs = {"widths": float(number), "mutual": share}
    recipe = Recipe(epochs=2, batch=8, rate=0.2, momentum=0.9, clip=0.3, seed=3, knobs=knobs)
    params, losses = mutual(recipe, share * sum(abs(np.mean(label == Y) - 1 / 3) for label in range(3)) / 2)
    for micro in (8, 3):
        engine, told = trained(recipe, micro)
        for found, wanted in zip(engine.params.values(), params, strict=True):
            np.testing.assert_allclose(found, wanted, atol=5e-6)
        assert told.losses == pytest.approx(losses, rel=1e-4)


def test_teaching_each_other_changes_something_and_not_without_narrower_widths():
    def params(**knobs):
        return [p.copy() for p in trained(Recipe(batch=8, clip=1.0, seed=2, knobs=knobs))[0].params.values()]

    plain, taught = params(widths=1.0), params(widths=1.0, mutual=0.5)
    assert any(not np.array_equal(a, b) for a, b in zip(plain, taught, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(params(), params(mutual=0.5), strict=True))


def test_where_each_class_has_as_many_samples_the_labels_are_enough():
    def params(labels, **knobs):
        engine, _ = trained(Recipe(batch=8, clip=1.0, seed=2, knobs=knobs), labels=labels)
        return [p.copy() for p in engine.params.values()]

    even, one = np.arange(21) % 3, np.zeros(21, np.int64)
    for labels, alike in ((even, True), (one, False)):
        plain, taught = params(labels, widths=1.0), params(labels, widths=1.0, mutual=1.0)
        assert all(np.array_equal(a, b) for a, b in zip(plain, taught, strict=True)) is alike


def test_wrong_knobs_are_explained():
    for knobs, words in (({"mutual": 1.5}, "mutual"), ({"mutual": 0.5, "distil": 0.5}, "write 0 for one")):
        with pytest.raises(SpecError, match=words):
            trained(Recipe(knobs={"widths": 1.0, **knobs}))
