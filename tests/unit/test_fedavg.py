"""FedAvg by hand and against its definition."""

import numpy as np
import pytest

from coordinator.algorithm import Algorithm, Answer, DeviceView, State, rng_of
from coordinator.algorithms import by_name, describe, fedavg
from tests.support.models import linear, random_arrays, small_cnn
from wire.errors import ConfigError, Malformed
from wire.memory import predict
from wire.messages import Usage
from wire.spec import Structure

GREAT = 1 << 40


def answer(device, samples, update, structure=None):
    return Answer(device, samples, structure or Structure(), {}, Usage(), update)


def start(spec, **params):
    return fedavg.init(spec, random_arrays(spec, Structure(), 9), params)


def test_close_by_hand():
    spec = linear(1, 2)
    state = State(spec, 1, {"o.weight": np.array([[1.0], [2.0]], np.float32), "o.bias": np.zeros(2, np.float32)})
    a = {"o.weight": np.array([[1.0], [0.0]], np.float32), "o.bias": np.array([4.0, 0.0], np.float32)}
    b = {"o.weight": np.array([[-1.0], [8.0]], np.float32), "o.bias": np.array([0.0, 0.0], np.float32)}
    after = fedavg.close(state, (answer("a", 1, a), answer("b", 3, b)))
    assert after.weights["o.weight"].tolist() == [[1.0 + 0.25 - 0.75], [2.0 + 6.0]]
    assert after.weights["o.bias"].tolist() == [1.0, 0.0]
    assert state.weights["o.weight"].tolist() == [[1.0], [2.0]]


def test_close_is_the_mean_of_the_trained_models():
    spec = small_cnn()
    state = start(spec)
    updates = [random_arrays(spec, Structure(), seed) for seed in range(3)]
    samples = [5, 1, 10]
    after = fedavg.close(
        state, tuple(answer(f"d{i}", n, u) for i, (n, u) in enumerate(zip(samples, updates, strict=True)))
    )
    for name, array in state.weights.items():
        trained = [array.astype(np.float64) + u[name] for u in updates]
        wanted = sum(n * t for n, t in zip(samples, trained, strict=True)) / sum(samples)
        np.testing.assert_allclose(after.weights[name], wanted, rtol=1e-5, atol=1e-6)


def test_nobody_and_nothing_to_count_change_nothing():
    spec = small_cnn()
    state = start(spec)
    assert fedavg.close(state, ()) is state
    assert fedavg.close(state, (answer("a", 0, random_arrays(spec, Structure())),)) is state


def test_a_part_of_the_model_is_refused():
    with pytest.raises(Malformed, match="dev"):
        fedavg.close(start(small_cnn()), (answer("dev", 1, {}, Structure(0, {"a": (2, 6)})),))


def test_plan_asks_whom_the_model_fits():
    spec = small_cnn()
    state = start(spec)
    recipe = fedavg.plan(state, 1, (DeviceView("a", GREAT),), rng_of(0, 1))[1][0].recipe
    enough = predict(spec, Structure(), recipe, 1).bound
    devices = (DeviceView("b", enough), DeviceView("a", GREAT), DeviceView("c", enough - 1), DeviceView("d", 0))
    after, drafts = fedavg.plan(state, 4, devices, rng_of(0, 4))
    assert after.round == 4
    assert [d.device for d in drafts] == ["a", "b"]
    assert all(d.structure == Structure() and d.verb == "train" for d in drafts)
    assert drafts[1].bytes_peak == enough
    assert drafts[0].recipe.seed != drafts[1].recipe.seed
    assert fedavg.plan(state, 4, devices[::-1], rng_of(0, 4))[1] == drafts
    assert fedavg.plan(state, 4, (), rng_of(0, 4))[1] == ()


def test_parameters_reach_the_recipe_and_wrong_ones_are_explained():
    state = start(linear(), **{"recipe.rate": 0.5, "recipe.epochs": 3.0})
    (draft,) = fedavg.plan(state, 1, (DeviceView("a", GREAT),), rng_of(0, 1))[1]
    assert (draft.recipe.rate, draft.recipe.epochs, draft.recipe.rule) == (0.5, 3, "sgd")
    other = start(linear(), **{"recipe.rule": "mine", "recipe.warmth": 2.0})
    assert fedavg.plan(other, 1, (DeviceView("a", GREAT),), rng_of(0, 1))[1][0].recipe.knobs == {"warmth": 2.0}
    for params, words in [
        ({"recipe.epoch": 3.0}, "recipe.epochs"),
        ({"recipe.epochs": 2.5}, r"recipe\.epochs: expected int"),
        ({"recipe.epochs": 0.0}, r"recipe\.epochs"),
        ({"recipe.momentum": 2.0}, r"recipe\.momentum"),
        ({"recipe.rate": "fast"}, "write a number"),
        ({"recipe.rule": 1.0}, "write a text"),
        ({"recipe.seed": 1.0}, "not known"),
        ({"angle": 5.0}, "not known"),
    ]:
        with pytest.raises(ConfigError, match=words):
            start(linear(), **params)


def test_the_rate_cools_from_round_to_round():
    state = start(linear(), **{"recipe.rate": 0.4, "schedule": "exponential 0.5"})
    rates = [fedavg.plan(state, n, (DeviceView("a", GREAT),), rng_of(0, n))[1][0].recipe.rate for n in (1, 2, 4)]
    assert rates == pytest.approx([0.4, 0.2, 0.05])
    for factor in (0.0, 1.5, -1.0):
        with pytest.raises(ConfigError, match="schedule"):
            start(linear(), schedule=f"exponential {factor}")


def test_registry():
    assert {"fedavg", "nestfl"} <= set(describe())
    for name, facts in describe().items():
        algorithm: Algorithm = by_name(name)
        assert facts["params"] == dict(algorithm.PARAMS)
        assert facts["summary"].endswith(".") or facts["summary"].endswith(";")
        assert facts["text"]
    with pytest.raises(ConfigError, match="nestfl"):
        by_name("fedsgd")


def test_one_width_alone_is_a_narrower_model():
    spec = small_cnn()
    state = start(spec, width=0.5)
    _, drafts = fedavg.plan(state, 1, (DeviceView("a", GREAT), DeviceView("b", 0)), rng_of(0, 1))
    (draft,) = drafts
    assert draft.structure.widths == {"a": (3,), "b": (6,)}
    updates = [random_arrays(spec, draft.structure, seed) for seed in (1, 2)]
    answers = tuple(
        answer(f"d{i}", n, u, draft.structure) for i, (n, u) in enumerate(zip((3, 9), updates, strict=True))
    )
    after = fedavg.close(state, answers)
    for name, before in state.weights.items():
        inside = tuple(slice(n) for n in updates[0][name].shape)
        wanted = before.astype(np.float64)
        wanted[inside] += 0.25 * updates[0][name] + 0.75 * updates[1][name]
        np.testing.assert_allclose(after.weights[name], wanted, atol=1e-6)
    assert fedavg.close(state, ()) is state
    with pytest.raises(Malformed, match="dev"):
        fedavg.close(state, (answer("dev", 1, random_arrays(spec, Structure())),))


def test_a_width_holds_where_the_whole_model_does_not():
    spec = small_cnn(hidden=4000)
    recipe = fedavg.plan(start(spec), 1, (DeviceView("a", GREAT),), rng_of(0, 1))[1][0].recipe
    views = (DeviceView("a", predict(spec, Structure(), recipe, 1).bound - 1),)
    assert fedavg.plan(start(spec), 1, views, rng_of(0, 1))[1] == ()
    assert len(fedavg.plan(start(spec, width=0.5), 1, views, rng_of(0, 1))[1]) == 1
    for width in (0.0, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="width"):
            start(spec, width=width)
    with pytest.raises(ConfigError, match="prunable"):
        start(linear(), width=0.5)
