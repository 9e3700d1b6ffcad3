"""Iterative magnitude pruning: when, how many, which; and masks that are there from the start."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.algorithm import Answer, DeviceView, rng_of
from coordinator.algorithms import by_name, fixed, iterative
from coordinator.blocks.masks import densities, density
from tests.support.models import linear, random_arrays, small_cnn
from wire.errors import ConfigError, Malformed
from wire.messages import Usage
from wire.spec import Structure
from wire.structure import masked

SPEC = small_cnn()
SIZES = {"c.weight": 54, "f.weight": 648, "o.weight": 48}
ALL = (DeviceView("b", 1 << 40), DeviceView("a", 1 << 40))


def start(module=iterative, **params):
    return module.init(SPEC, random_arrays(SPEC, Structure(), 9), params)


def answer(state, device="a", seed=0):
    update = random_arrays(SPEC, Structure(), seed)
    update = {name: np.where(state.masks.get(name, True), a, 0).astype(np.float32) for name, a in update.items()}
    return Answer(device, 3, masked(state.masks), {}, Usage(), update, sent=state.masks)


def still(state):
    """An answer that moves nothing."""
    return Answer("a", 3, masked(state.masks), {}, Usage(), {}, sent=state.masks)


def round_of(state, number, module=iterative):
    state, drafts = module.plan(state, number, ALL, rng_of(0, number))
    assert [d.device for d in drafts] == ["a", "b"]
    assert all(d.structure == masked(state.masks) for d in drafts)
    return module.close(state, (answer(state, "a", number), answer(state, "b", 100 + number)))


def test_twenty_prunings_in_the_first_half():
    state, pruned, left = start(horizon=80.0), [], []
    for number in range(1, 81):
        before, state = state, round_of(state, number)
        if state.masks is not before.masks:
            pruned.append(number)
            left.append({name: int(mask.sum()) for name, mask in state.masks.items()})
            for name, mask in state.masks.items():
                earlier = before.masks.get(name, np.ones_like(mask))
                assert not (mask & ~earlier).any()
                gone = np.abs(state.weights[name][earlier & ~mask])
                assert gone.max(initial=0.0) <= np.abs(state.weights[name][mask]).min()
    assert pruned == list(range(2, 41, 2))
    assert left[0] == {"c.weight": 48, "f.weight": 577, "o.weight": 42}  # 0.8912509 of 54, 648 and 48
    assert left[9] == {"c.weight": 17, "f.weight": 204, "o.weight": 15}  # 0.3162278
    assert left[19] == {"c.weight": 5, "f.weight": 64, "o.weight": 4}


def test_the_chain_by_hand():
    spec = linear(4, 2)
    first = np.array([[1.0, -8.0, 3.0, -4.0], [5.0, -6.0, 7.0, 2.0]], np.float32)
    state = iterative.init(
        spec,
        {"o.weight": first, "o.bias": np.zeros(2, np.float32)},
        {"density": 0.25, "prunings": 2.0, "horizon": 4.0},
    )
    kept = []
    for number in (1, 2):
        state, _ = iterative.plan(state, number, (), rng_of(0, number))
        state = iterative.close(state, (still(state),))
        kept.append(np.abs(first[state.masks["o.weight"]]).tolist())
    assert kept == [[8.0, 5.0, 6.0, 7.0], [8.0, 7.0]]
    np.testing.assert_array_equal(state.weights["o.weight"], first)


@settings(max_examples=30)
@given(st.integers(1, 30), st.integers(1, 60), st.floats(0.01, 1.0), st.floats(0.1, 1.0))
def test_whatever_the_horizon_all_prunings_are_made(prunings, horizon, density_, until):
    spec = linear(9, 4)
    params = {"prunings": float(prunings), "horizon": float(horizon), "density": density_, "until": until}
    state = iterative.init(spec, random_arrays(spec, Structure()), params)
    counts = [36]
    for number in range(1, horizon + 1):
        state = iterative.plan(state, number, (), rng_of(0, number))[0]
        state = iterative.close(state, (still(state),))
        counts.append(int(state.masks["o.weight"].sum()) if state.masks else 36)
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == int(36 * density_ + 1e-9)
    assert state.scalars["pruned"] == prunings


def test_a_round_that_is_lost_is_made_up_for():
    state, _ = iterative.plan(start(horizon=80.0), 6, ALL, rng_of(0, 6))
    state = iterative.close(state, (answer(state),))
    assert state.scalars["pruned"] == 3
    assert int(state.masks["f.weight"].sum()) == int(648 * 0.1 ** (3 / 20))


def test_other_masks_are_refused():
    state = round_of(start(horizon=2.0, prunings=1.0), 1)
    with pytest.raises(Malformed, match="masks"):
        iterative.close(state, (dataclasses.replace(answer(state), structure=Structure()),))


def test_parameters_are_checked():
    for params in ({"density": 0.0}, {"prunings": 0.0}, {"horizon": 1.5}, {"until": 0.0}, {"until": 2.0}, {"x": 1.0}):
        with pytest.raises(ConfigError):
            start(**params)
    for params in ({"density": 0.0}, {"layers": "some"}, {"mask_seed": -1.0}, {"mask_seed": 0.5}):
        with pytest.raises(ConfigError):
            start(fixed, **params)


@pytest.mark.parametrize("layers", ["uniform", "erk"])
def test_fixed_masks_are_random_and_stay(layers):
    state = start(fixed, density=0.25, layers=layers)
    assert sum(int(mask.sum()) for mask in state.masks.values()) == round(0.25 * 750)
    found = densities(state.masks)
    if layers == "uniform":
        assert all(abs(value - 0.25) * SIZES[name] <= 1 for name, value in found.items())
    else:
        assert found["f.weight"] < 0.25 < found["c.weight"]
    again = start(fixed, density=0.25, layers=layers)
    other = start(fixed, density=0.25, layers=layers, mask_seed=1.0)
    assert all(np.array_equal(mask, again.masks[name]) for name, mask in state.masks.items())
    assert not all(np.array_equal(mask, other.masks[name]) for name, mask in state.masks.items())
    assert round_of(state, 1, fixed).masks is state.masks


def test_fixed_at_density_one_is_fedavg():
    state, plain = start(fixed, density=1.0), by_name("fedavg").init(SPEC, random_arrays(SPEC, Structure(), 9), {})
    assert density(state.masks) == 1.0
    planned, drafts = fixed.plan(state, 1, ALL, rng_of(0, 1))
    same, others = by_name("fedavg").plan(plain, 1, ALL, rng_of(0, 1))
    assert drafts == others
    answers = (answer(state, "a", 1), answer(state, "b", 2))
    closed, wanted = fixed.close(planned, answers), by_name("fedavg").close(same, answers)
    for name, array in wanted.weights.items():
        np.testing.assert_array_equal(closed.weights[name], array)


def test_registry():
    assert by_name("iterative") is iterative
    assert by_name("fixed") is fixed
