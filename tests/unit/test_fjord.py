"""FjORD's coordinator against the paper's order of writing blocks, one weight at a time."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.algorithm import Answer, DeviceView, rng_of
from coordinator.algorithms import fjord
from coordinator.blocks.nesting import whole_of
from coordinator.blocks.widths import fractions_of, structures_of, widest
from tests.support.models import linear, random_arrays, small_cnn
from wire.errors import ConfigError, Malformed
from wire.memory import predict
from wire.messages import Recipe, Usage
from wire.spec import Structure, tensor_shapes

SPEC = small_cnn()
TOP = 2


def start(seed=0, **params):
    return fjord.init(SPEC, random_arrays(SPEC, Structure(), seed), {"fractions": "0.3 0.6 1", **params})


def answer(state, device, capacity, samples=10, seed=0):
    structure = whole_of(state).narrowed(capacity)
    return Answer(device, samples, structure, {}, Usage(), random_arrays(SPEC, structure, seed))


def mixed(state, seed, count=5):
    rng = np.random.default_rng(seed)
    return tuple(
        answer(state, f"d{i}", int(rng.integers(TOP + 1)), int(rng.integers(1, 50)), seed * 10 + i)
        for i in range(count)
    )


def largest_first(state, answers):
    """From the largest width to the smallest: write, over what is there, the mean of all whose width has the block."""
    new = {name: old.astype(np.float64) for name, old in state.weights.items()}
    for capacity in reversed(range(TOP + 1)):
        able = [a for a in answers if a.structure.capacity >= capacity]
        total = sum(a.samples for a in able)
        shapes = tensor_shapes(SPEC, whole_of(state).narrowed(capacity))
        for name, shape in shapes.items() if able else ():
            for place in np.ndindex(shape):
                old = float(state.weights[name][place])
                new[name][place] = sum(a.samples * (old + float(a.update[name][place])) for a in able) / total
    return new


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000))
def test_closing_agrees_with_blocks_written_largest_first(seed):
    state = start(seed)
    answers = mixed(state, seed)
    after = fjord.close(state, answers)
    for name, wanted in largest_first(state, answers).items():
        np.testing.assert_allclose(after.weights[name], wanted, rtol=1e-5, atol=1e-6, err_msg=name)


def test_what_nobody_has_trained_stays_bit_for_bit():
    state = start()
    after = fjord.close(state, (answer(state, "a", 0, seed=1), answer(state, "b", 1, seed=2)))
    held = tensor_shapes(SPEC, whole_of(state).narrowed(1))
    for name, old in state.weights.items():
        outside = np.ones(old.shape, bool)
        outside[tuple(slice(length) for length in held[name])] = False
        assert np.array_equal(after.weights[name][outside], old[outside])
        assert not np.array_equal(after.weights[name], old)


def test_a_device_twice_is_a_device_with_twice_the_samples_and_nobody_changes_nothing():
    state = start()
    one, other = answer(state, "a", 2, 20, seed=8), answer(state, "x", 1, 7, seed=5)
    twins = tuple(dataclasses.replace(one, device=name, samples=10) for name in ("a", "b"))
    single, split = fjord.close(state, (one, other)), fjord.close(state, (*twins, other))
    for name in state.weights:
        np.testing.assert_allclose(single.weights[name], split.weights[name], rtol=1e-5, atol=1e-6)
    assert fjord.close(state, ()) is state
    with pytest.raises(Malformed, match="a"):
        fjord.close(state, (dataclasses.replace(one, structure=Structure(1, state.widths, "0" * 64)),))


def test_channels_stand_in_their_own_order():
    state = start()
    assert state.widths == {"a": (2, 4, 6), "b": (4, 8, 12)}
    assert state.levels["a"].tolist() == [0, 0, 1, 1, 2, 2]
    assert state.levels["b"].tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_plan_gives_each_device_the_widest_that_fits():
    state = start()
    (draft,) = fjord.plan(state, 1, (DeviceView("a", 1 << 40),), rng_of(0, 1))[1]
    assert (draft.recipe.rule, draft.recipe.knobs) == ("fjord", {"distil": 1.0})
    needs = [predict(SPEC, structure, draft.recipe, 1).bound for structure in structures_of(state)]
    devices = tuple(DeviceView(f"d{i}", b) for i, b in enumerate([needs[2], needs[0], needs[0] - 1, needs[2] - 1]))
    after, drafts = fjord.plan(state, 3, devices, rng_of(0, 3))
    assert [(d.device, d.structure.capacity) for d in drafts] == [("d0", 2), ("d1", 0), ("d3", 1)]
    assert after.round == 3
    assert all(d.bytes_peak <= v.bytes_budget for d in drafts for v in devices if v.name == d.device)
    assert len({d.recipe.seed for d in drafts}) == 3
    again = widest(SPEC, structures_of(state), Recipe(**fields(draft.recipe)), devices)
    assert {name: plan.capacity for name, plan in again.items()} == {"d0": 2, "d1": 0, "d3": 1}


def fields(recipe):
    return {name: getattr(recipe, name) for name in Recipe.__dataclass_fields__}


def test_wrong_parameters_are_explained():
    assert fractions_of(" 0.5  1 ") == (0.5, 1.0)
    for text in ("", "0.5", "1 0.5", "0.5 x 1", "0 1", "0.5 0.5 1", "-1 1", "nan 1", "1 1.5"):
        with pytest.raises(ConfigError, match="fractions"):
            start(fractions=text)
    with pytest.raises(ConfigError, match="fractions"):
        fractions_of(" ".join(str((i + 1) / 65) for i in range(65)))
    with pytest.raises(ConfigError, match="fedavg"):
        fjord.init(linear(), random_arrays(linear(), Structure()), {})
