"""The coordinator's momentum by hand, in whole, nested and masked models, and in the methods that offer it."""

from __future__ import annotations

import dataclasses
import tracemalloc

import numpy as np
import pytest

from coordinator.algorithm import Answer, State
from coordinator.algorithms import fedavg, fjord, heterofl, nestfl
from coordinator.blocks import momentum
from coordinator.blocks.nesting import whole_of
from tests.support.models import linear, random_arrays, small_cnn
from tests.support.sequences import normed
from wire.builders import mlp
from wire.errors import ConfigError
from wire.messages import Usage
from wire.spec import Structure, parameter_count, statistics

NESTED = (nestfl, heterofl, fjord)


def state_of(weights, speed, beta):
    arrays = {momentum.PREFIX + name: array for name, array in speed.items()}
    return State(linear(), 1, weights, scalars={"params": {"beta": beta}}, arrays={**arrays, "other": np.ones(1)})


def f32(*values):
    return np.array(values, np.float32)


def test_by_hand():
    # D = (1, 0, -2); V = .5 * (4, 6, 8) + D = (3, -, 2); w = after + .5 V; the middle one did not move
    before = state_of({"w": f32(10, 20, 30), "s": f32(1)}, {"w": f32(4, 6, 8)}, 0.5)
    after = momentum.carried(before, dataclasses.replace(before, weights={"w": f32(11, 20, 28), "s": f32(7)}))
    assert after.weights["w"].tolist() == [12.5, 20.0, 29.0]
    assert after.arrays[momentum.PREFIX + "w"].tolist() == [3.0, 6.0, 2.0]
    assert after.weights["s"].tolist() == [7.0]
    assert after.arrays["other"].tolist() == [1.0]
    assert before.weights["w"].tolist() == [10.0, 20.0, 30.0]


def test_it_begins_in_the_weights_order_so_that_a_state_is_the_same_bytes_in_every_process():
    spec = normed()
    weights = dict(sorted(random_arrays(spec, Structure(), 1).items(), key=lambda item: item[0][::-1]))
    wanted = [momentum.PREFIX + name for name in weights if name not in statistics(spec)]
    assert list(momentum.still(spec, weights, {"beta": 0.5})) == wanted


def test_a_round_that_moved_nothing_is_no_round():
    state = state_of({"w": f32(1)}, {"w": f32(5)}, 0.9)
    assert momentum.carried(state, state) is state


def test_running_statistics_have_none():
    spec = normed()
    kept = momentum.still(spec, random_arrays(spec, Structure()), {"beta": 0.9})
    names = {name.removeprefix(momentum.PREFIX) for name in kept}
    assert {tensor.name for tensor in spec.tensors} - names == set(statistics(spec))
    assert statistics(spec)
    assert not momentum.still(spec, {}, {"beta": 0.0})


def test_a_state_of_before_with_momentum_for_statistics_uses_none():
    spec = normed()
    weights = random_arrays(spec, Structure())
    arrays = {momentum.PREFIX + name: np.ones_like(array) for name, array in weights.items()}
    before = State(spec, 1, weights, scalars={"params": {"beta": 0.5}}, arrays=arrays)
    moved = {name: array + np.float32(1) for name, array in weights.items()}
    after = momentum.carried(before, dataclasses.replace(before, weights=dict(moved)))
    for name, array in weights.items():
        wanted = array + 1 if name in statistics(spec) else array + 1 + 0.5 * 1.5
        np.testing.assert_allclose(after.weights[name], wanted, rtol=1e-5)


@pytest.mark.parametrize("algorithm", NESTED)
def test_closing_with_momentum_takes_the_new_weights_and_the_new_momentum_alone(algorithm):
    spec = mlp("m", (200,), 10, (600, 600))
    own = {"beta": 0.5} | ({"recipe.mask": 0.0} if algorithm is heterofl else {})
    state = algorithm.init(spec, random_arrays(spec, Structure()), own)
    whole = whole_of(state)
    answers = [Answer(name, 9, whole, {}, Usage(), random_arrays(spec, whole, 2)) for name in "ab"]
    tracemalloc.start()
    try:
        algorithm.close(state, answers)
        models = tracemalloc.get_traced_memory()[1] / (4 * parameter_count(spec, whole))
    finally:
        tracemalloc.stop()
    assert 1.9 < models < 2.9, models


@pytest.mark.parametrize("wrong", [-0.1, 1.0, float("nan"), float("inf")])
def test_wrong_betas_are_explained(wrong):
    for algorithm in (fedavg, *NESTED):
        with pytest.raises(ConfigError, match=r"beta.*0\.9"):
            algorithm.init(small_cnn(), random_arrays(small_cnn(), Structure()), {"beta": wrong})


@pytest.mark.parametrize("algorithm", NESTED)
def test_nested_methods_move_on_what_was_covered_alone(algorithm):
    """Two rounds of the same update D: without momentum 2 D, with it D (1 + beta) + D (1 + beta + beta^2)."""
    spec, beta = mlp("m", (6,), 4, (8, 8)), 0.5
    start = {name: np.zeros_like(array) for name, array in random_arrays(spec, Structure()).items()}
    own = {"fractions": "0.5 1", "beta": beta} | ({"recipe.mask": 0.0} if algorithm is heterofl else {})
    state = algorithm.init(spec, start, own)
    narrow = whole_of(state).narrowed(0)
    update = random_arrays(spec, narrow, 3)
    answer = Answer("d", 10, narrow, {}, Usage(), update)
    for _ in range(2):
        state = algorithm.close(state, (answer,))
    factor = (1 + beta) + (1 + beta + beta**2)
    for name, array in update.items():
        moved = state.weights[name][state.weights[name] != 0]
        np.testing.assert_allclose(np.sort(moved), np.sort(factor * array[array != 0].reshape(-1)), rtol=1e-5)
    assert any(np.any(array == 0) for array in state.weights.values())


def test_fedavg_whole_and_narrow_agree_with_the_equation():
    spec = small_cnn()
    for width in (1.0, 0.5):
        state = fedavg.init(spec, random_arrays(spec, Structure()), {"beta": 0.8, "width": width})
        plain = fedavg.init(spec, random_arrays(spec, Structure()), {"width": width})
        answer = Answer("d", 3, whole_of(state) if width < 1 else Structure(), {}, Usage(), {})
        answer = dataclasses.replace(answer, update=random_arrays(spec, answer.structure, 4))
        fast, slow = fedavg.close(state, (answer,)), fedavg.close(plain, (answer,))
        for name, before in state.weights.items():
            step = slow.weights[name] - before
            np.testing.assert_allclose(fast.weights[name], before + 1.8 * step, atol=1e-5)
        assert not plain.arrays
