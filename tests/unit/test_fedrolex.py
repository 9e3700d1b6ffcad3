"""FedRolex by hand: the windows of six channels, whose turn every channel has, and a loop over single weights."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.algorithm import Answer, DeviceView, rng_of
from coordinator.algorithms import fedavg, fedrolex
from coordinator.blocks.nesting import whole_of
from coordinator.blocks.widths import structures_of
from coordinator.simulate.run import simulate
from coordinator.simulate.world import Config
from tests.support import norms
from tests.support.models import linear, random_arrays, small_cnn
from wire.errors import ConfigError, Malformed
from wire.memory import predict
from wire.messages import Usage
from wire.spec import Structure

SPEC = small_cnn()
SIZES = {"a": 6, "b": 12}
FRACTIONS = {"fractions": "0.5 1"}
TURN = 12
"""Rounds after which both groups' windows are where they began."""
AMPLE = DeviceView("ample", 1 << 40)


def start(seed=0, **params):
    return fedrolex.init(SPEC, random_arrays(SPEC, Structure(), seed), {**FRACTIONS, **params})


def at(state, number, *devices):
    return fedrolex.plan(state, number, devices, rng_of(0, number))


def window(group, capacity, number):
    """The channels that a width has in a round, by the paper: from ``j mod C`` on, j from 0, and round the end."""
    size, counts = SIZES[group], {"a": (3, 6), "b": (6, 12)}[group]
    return {((number - 1) % size + i) % size for i in range(counts[capacity])}


def places(tensor, capacity, number):
    """Where the entries of a compact array stand in the whole one, axis by axis: the narrow width's first, each by index."""
    found = []
    for axis in tensor.axes:
        if axis.group not in SIZES:
            found.append(range(axis.inner * (SPEC.classes if axis.group else 1)))
            continue
        inner = window(axis.group, 0, number)
        channels = [*sorted(inner), *(sorted(window(axis.group, 1, number) - inner) if capacity else ())]
        found.append([channel * axis.inner + i for channel in channels for i in range(axis.inner)])
    return found


def answer(state, device, capacity, moves, samples=10):
    """A device's part of what would move the whole model by `moves`."""
    update = {t.name: moves[t.name][np.ix_(*places(t, capacity, state.round))] for t in SPEC.tensors}
    return Answer(device, samples, whole_of(state).narrowed(capacity), {}, Usage(), update)


def naive(state, told):
    """Each weight on its own, in double precision: the mean of what the devices made of it that had it, or what it was."""
    new = {}
    for tensor in SPEC.tensors:
        old = state.weights[tensor.name]
        new[tensor.name] = old.astype(np.float64)
        for place in np.ndindex(old.shape):
            made = []
            for capacity, moves in told:
                axes = zip(place, tensor.axes, strict=True)
                if all(a.group not in SIZES or i // a.inner in window(a.group, capacity, state.round) for i, a in axes):
                    made.append(float(old[place]) + float(moves[tensor.name][place]))
            if made:
                new[tensor.name][place] = sum(made) / len(made)
    return new


def test_windows_of_six_channels_over_seven_rounds():
    state, narrow, wide = start(fractions="0.3 0.6 1"), [], []
    assert state.widths["a"] == (2, 4, 6)
    for number in range(1, 8):
        state, _ = at(state, number)
        narrow.append(np.flatnonzero(state.levels["a"] <= 0).tolist())
        wide.append(np.flatnonzero(state.levels["a"] <= 1).tolist())
        assert (state.levels["a"] <= 2).all()
    assert narrow == [[0, 1], [1, 2], [2, 3], [3, 4], [4, 5], [0, 5], [0, 1]]
    assert wide == [
        *([0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5], [0, 3, 4, 5]),
        *([0, 1, 4, 5], [0, 1, 2, 5], [0, 1, 2, 3]),
    ]


def test_every_layer_turns_by_its_own_size_and_a_round_alone_says_where():
    straight = start()
    for number in range(1, 26):
        straight, _ = at(straight, number)
        jumped, _ = at(start(), number)
        for group in SIZES:
            for capacity in (0, 1):
                found = set(np.flatnonzero(straight.levels[group] <= capacity).tolist())
                assert found == window(group, capacity, number)
            assert np.array_equal(jumped.levels[group], straight.levels[group])


@pytest.mark.parametrize("capacity", [0, 1])
def test_over_a_whole_turn_each_channel_is_trained_as_often_as_any_other(capacity):
    state = start()
    still = state.weights
    moves = {name: np.ones_like(array) for name, array in still.items()}
    for number in range(1, TURN + 1):
        state, _ = at(state, number)
        state = fedrolex.close(state, [answer(state, "one", capacity, moves)])
        often = {g: state.weights[f"{layer}.bias"] - still[f"{layer}.bias"] for g, layer in (("a", "c"), ("b", "f"))}
        assert (np.ptp(often["b"]) > 0.5) == (capacity == 0 and number < TURN), (
            "even at the end of a turn, and not before"
        )
    np.testing.assert_allclose(often["a"], TURN * (capacity + 1) / 2, rtol=1e-5)
    np.testing.assert_allclose(often["b"], TURN * (capacity + 1) / 2, rtol=1e-5)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 30))
def test_closing_agrees_with_a_loop_over_weights(seed, number):
    state, rng = at(start(seed), number)[0], np.random.default_rng(seed)
    told = [
        (int(rng.integers(2)), random_arrays(SPEC, Structure(), 10 * seed + i)) for i in range(int(rng.integers(6)))
    ]
    answers = [answer(state, f"d{i}", *one, samples=int(rng.integers(1, 50))) for i, one in enumerate(told)]
    after = fedrolex.close(state, answers)
    for name, wanted in naive(state, told).items():
        np.testing.assert_allclose(after.weights[name], wanted, rtol=1e-5, atol=1e-6, err_msg=name)


def test_what_is_outside_of_all_windows_stays_bit_for_bit():
    state, _ = at(start(), 5)
    after = fedrolex.close(state, [answer(state, "a", 0, random_arrays(SPEC, Structure(), 9))])
    assert window("a", 0, 5) == {4, 5, 0}
    for name in ("c.weight", "c.bias"):
        assert np.array_equal(after.weights[name][1:4], state.weights[name][1:4])
        assert (after.weights[name][[4, 5, 0]] != state.weights[name][[4, 5, 0]]).all()
    assert fedrolex.close(state, ()) is state
    assert fedrolex.close(state, [answer(state, "a", 1, random_arrays(SPEC, Structure()), samples=0)]) is state


@pytest.mark.parametrize("number", [1, 2, 9])
def test_where_every_device_holds_the_whole_model_it_is_fedavg(number):
    state, _ = at(start(), number)
    moves = [random_arrays(SPEC, Structure(), seed) for seed in (1, 2, 3)]
    rolled = fedrolex.close(state, [answer(state, f"d{i}", 1, one) for i, one in enumerate(moves)])
    mean = fedavg.close(
        fedavg.init(SPEC, state.weights, {}),
        [Answer(f"d{i}", 10, Structure(), {}, Usage(), one) for i, one in enumerate(moves)],
    )
    for name in state.weights:
        np.testing.assert_allclose(rolled.weights[name], mean.weights[name], rtol=0, atol=1e-6, err_msg=name)


def test_an_answer_of_the_round_before_is_refused_because_its_channels_were_others():
    state, _ = at(start(), 1)
    late = answer(state, "late", 0, random_arrays(SPEC, Structure()))
    state, _ = at(state, 2)
    with pytest.raises(Malformed, match="late answers with a structure of another ranking"):
        fedrolex.close(state, [late])


def test_plan_gives_each_device_the_widest_that_fits_of_the_rounds_own_windows():
    state, (draft,) = at(start(), 1, AMPLE)
    low, high = (predict(SPEC, structure, draft.recipe, 1).bound for structure in structures_of(state))
    devices = tuple(DeviceView(f"d{i}", budget) for i, budget in enumerate((high, low, low - 1)))
    rankings = []
    for number in (1, 2, 3):
        state, drafts = at(state, number, *devices)
        assert [(d.device, d.structure) for d in drafts] == [
            ("d0", whole_of(state)),
            ("d1", whole_of(state).narrowed(0)),
        ]
        assert len({d.recipe.seed for d in drafts}) == 2
        assert state.round == number
        rankings.append(drafts[0].structure.ranking)
    assert len(set(rankings)) == 3


def test_a_round_that_calibrates_observes_the_windows_that_are_trained_next_and_passes_none_over():
    spec = norms.SPEC
    state = fedrolex.init(spec, random_arrays(spec, Structure(), 1), {**FRACTIONS, "calibrate": 3.0})
    begins = []
    for number in range(1, 10):
        state, (draft,) = at(state, number, AMPLE)
        begins.append(draft.verb[0] + "".join(map(str, np.flatnonzero(state.levels["a"] == 0))))
        if draft.verb == "calibrate":
            sets = ((1, 2), (3, 4)), ((5, 6, 7, 8), (9, 9, 9, 9))
            after = fedrolex.close(state, [norms.saw(state, "ample", 7, *sets)])
            assert after.norms[0]["n.mean"][state.levels["a"] == 0].tolist() == [1, 2]
            moved = {name for name in state.weights if (after.weights[name] != state.weights[name]).any()}
            assert moved <= norms.STILL
            assert after.weights["n.mean"][state.levels["a"] == 1].tolist() == [7, 8]
        else:
            moves = random_arrays(spec, draft.structure, number)
            after = fedrolex.close(state, [Answer("ample", 7, draft.structure, {}, Usage(), moves)])
            assert all(np.array_equal(after.weights[name], state.weights[name]) for name in norms.STILL)
        state = after
    assert begins == ["t01", "t12", "c23", "t23", "t03", "c01", "t01", "t12", "c23"]


def test_wrong_parameters_are_explained():
    for name, value in {"fractions": "1 0.5", "calibrate": 2.0, "recipe.rate": -1.0, "schedule": "x"}.items():
        with pytest.raises(ConfigError, match=name):
            start(**{name: value})
    with pytest.raises(ConfigError, match="fedavg"):
        fedrolex.init(linear(), random_arrays(linear(), Structure()), {})


def test_a_simulated_run_learns_and_windows_of_their_own_for_every_round_cost_no_byte():
    config = Config("fedrolex", "digits-mlp", partition="iid", fleet="mixed", devices=4, rounds=6)
    rolling = simulate(config)
    still = simulate(dataclasses.replace(config, algo="heterofl", params={**PLAIN, "fractions": "0.2 0.4 0.6 0.8 1"}))
    assert [device["width"] for device in rolling["devices"]] == [device["width"] for device in still["devices"]]
    assert len({device["width"] for device in rolling["devices"]}) > 2
    accuracies = [point["accuracy"] for point in rolling["curve"]]
    assert accuracies[-1] > 0.85
    assert accuracies[-1] > accuracies[0] + 0.05
    assert (rolling["bytes_up"], rolling["bytes_down"]) == (still["bytes_up"], still["bytes_down"])


PLAIN = {"recipe.rule": "sgd", "recipe.clip": 2.0, "recipe.decay": 0.0}
"""What makes HeteroFL's recipe that of the others."""
