"""HeteroFL's coordinator against a loop over single weights, and what its rules of assignment must keep."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.algorithm import Answer, DeviceView, rng_of
from coordinator.algorithms import heterofl
from coordinator.blocks import aggregate
from coordinator.blocks.nesting import whole_of
from coordinator.fitting import Means, fit
from tests.support.models import linear, random_arrays, small_cnn
from tests.support.sequences import normed
from wire import zoo
from wire.errors import ConfigError, Malformed
from wire.memory import predict
from wire.messages import Usage
from wire.spec import Node, Structure, tensor_shapes

SPEC = small_cnn()
HEAD = ("o.weight", "o.bias")
TOP = 2
AMPLE = 1 << 40


def start(seed=0, **params):
    changed = {"fractions": "0.25 0.5 1", **{name.replace("__", "."): value for name, value in params.items()}}
    return heterofl.init(SPEC, random_arrays(SPEC, Structure(), seed), changed)


def answer(state, device, capacity, labels=None, samples=10, seed=0):
    structure = whole_of(state).narrowed(capacity)
    extras = {}
    if labels is not None:
        extras["o.bias"] = (np.array(sorted(labels), np.int64), np.ones(len(labels), np.float32))
    return Answer(device, samples, structure, {}, Usage(), random_arrays(SPEC, structure, seed), extras=extras)


def mixed(state, seed, count=6):
    rng = np.random.default_rng(seed)
    return tuple(
        answer(
            state,
            f"d{i}",
            int(rng.integers(TOP + 1)),
            set(rng.choice(SPEC.classes, int(rng.integers(1, SPEC.classes)), replace=False).tolist()),
            int(rng.integers(1, 50)),
            seed * 10 + i,
        )
        for i in range(count)
    )


def naive(state, answers, *, mask=True):
    """Each weight on its own: the mean of the trained values of those that have it, or what it was.

    Widths are prefixes, so that a weight has the same place in a device's array as in the whole one.
    """
    new = {}
    for name, old in state.weights.items():
        new[name] = old.astype(np.float64)
        for place in np.ndindex(old.shape):
            values = []
            for a in answers:
                here = all(i < length for i, length in zip(place, a.update[name].shape, strict=True))
                if here and mask and name in HEAD:
                    here = place[0] in set(a.extras["o.bias"][0].tolist())
                if here:
                    values.append(float(old[place]) + float(a.update[name][place]))
            if values:
                new[name][place] = sum(values) / len(values)
    return new


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000))
def test_closing_agrees_with_a_loop_over_weights(seed):
    for mask in (True, False):
        state = start(seed, recipe__mask=float(mask))
        answers = mixed(state, seed)
        after = heterofl.close(state, answers)
        for name, wanted in naive(state, answers, mask=mask).items():
            np.testing.assert_allclose(after.weights[name], wanted, rtol=1e-5, atol=1e-6, err_msg=name)


def test_samples_do_not_count():
    state = start()
    answers = mixed(state, 1)
    other = tuple(dataclasses.replace(a, samples=7) for a in answers)
    first, second = heterofl.close(state, answers), heterofl.close(state, other)
    for name in state.weights:
        assert first.weights[name].tobytes() == second.weights[name].tobytes()


def test_what_nobody_has_trained_stays_bit_for_bit():
    state = start()
    after = heterofl.close(state, (answer(state, "a", 0, {1}, seed=1), answer(state, "b", 1, {1, 3}, seed=2)))
    held = tensor_shapes(SPEC, whole_of(state).narrowed(1))
    for name, old in state.weights.items():
        outside = np.ones(old.shape, bool)
        outside[tuple(slice(length) for length in held[name])] = False
        if name in HEAD:
            outside[[0, 2]] = True
        assert np.array_equal(after.weights[name][outside], old[outside])
        assert not np.isclose(after.weights[name][~outside], old[~outside]).any()


def test_a_row_is_shared_by_the_owners_of_its_label_alone():
    state = start()
    one, two, three = (
        answer(state, "one", 2, {0, 1}, seed=1),
        answer(state, "two", 2, {1}, seed=2),
        answer(state, "three", 2, {2}, seed=3),
    )
    moved = heterofl.close(state, (one, two, three))
    step = {name: moved.weights[name] - state.weights[name] for name in state.weights}
    for name in HEAD:
        np.testing.assert_allclose(step[name][0], one.update[name][0], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(step[name][1], (one.update[name][1] + two.update[name][1]) / 2, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(step[name][2], three.update[name][2], rtol=1e-4, atol=1e-6)
        assert not step[name][3].any()
    body = (one.update["f.bias"] + two.update["f.bias"] + three.update["f.bias"]) / 3
    np.testing.assert_allclose(step["f.bias"], body, rtol=1e-4, atol=1e-6)


def test_who_tells_no_labels_counts_for_all_rows():
    state = start()
    silent, all_told = answer(state, "a", 2, None, seed=4), answer(state, "a", 2, {0, 1, 2, 3}, seed=4)
    for name in state.weights:
        first, second = (heterofl.close(state, (a,)).weights[name] for a in (silent, all_told))
        assert first.tobytes() == second.tobytes()


def test_order_of_answers_does_not_matter_and_nobody_changes_nothing():
    state = start()
    answers = mixed(state, 3)
    straight, reverse = heterofl.close(state, answers), heterofl.close(state, answers[::-1])
    for name in state.weights:
        np.testing.assert_allclose(straight.weights[name], reverse.weights[name], rtol=1e-5, atol=1e-6)
    assert heterofl.close(state, ()) is state
    assert heterofl.close(state, (answer(state, "a", 1, {0}, samples=0),)) is state


def test_another_rounds_ranking_is_refused():
    state = start()
    foreign = dataclasses.replace(answer(state, "dev", 1, {0}), structure=Structure(1, state.widths, "0" * 64))
    with pytest.raises(Malformed, match="dev"):
        heterofl.close(state, (foreign,))


def test_levels_are_the_papers():
    spec = zoo.by_name("digits-cnn")
    state = heterofl.init(spec, random_arrays(spec, Structure()), {})
    for group in (g for g in spec.groups if g.prunable):
        wanted = tuple(math.ceil(group.size * rate) for rate in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1))
        assert state.widths[group.name] == wanted
        levels = state.levels[group.name]
        assert all((levels <= k).nonzero()[0].tolist() == list(range(n)) for k, n in enumerate(wanted))


def budgets(state):
    recipe = heterofl.plan(state, 1, (DeviceView("a", AMPLE),), rng_of(0, 1))[1][0].recipe
    return [predict(SPEC, whole_of(state).narrowed(k), recipe, 1).bound for k in range(TOP + 1)]


def planned(state, number, devices, seed=0):
    state, drafts = heterofl.plan(state, number, devices, rng_of(seed, number))
    return state, {d.device: d.structure.capacity for d in drafts}


def test_fix_gives_the_widest_that_fits_and_always_the_same():
    state = start()
    needs = budgets(state)
    devices = tuple(DeviceView(f"d{i}", b) for i, b in enumerate([needs[2], needs[0], needs[0] - 1, needs[1]]))
    for number in (1, 2, 3):
        state, found = planned(state, number, devices)
        assert found == {"d0": 2, "d1": 0, "d3": 1}


def test_fix_by_mix_goes_round_and_never_beyond_what_fits():
    state = start(mix="a1-b2-c1")
    low = budgets(state)[1]
    names = [f"d{i}" for i in range(9)]
    devices = tuple(DeviceView(name, low if name == "d0" else AMPLE) for name in names)
    state, found = planned(state, 1, devices[:5])
    assert found == {"d0": 1, "d1": 1, "d2": 1, "d3": 0, "d4": 2}
    state, found = planned(state, 2, devices)
    assert found == {"d0": 1, "d1": 1, "d2": 1, "d3": 0, "d4": 2, "d5": 1, "d6": 1, "d7": 0, "d8": 2}
    state, found = planned(state, 3, devices[7:])
    assert found == {"d7": 0, "d8": 2}


def test_dynamic_draws_anew_among_what_fits():
    state = start(assign="dynamic", recipe__batch=1.0)
    needs = budgets(state)
    devices = (
        DeviceView("big", AMPLE),
        DeviceView("mid", needs[1]),
        DeviceView("none", 0),
        DeviceView("tiny", needs[0]),
    )
    counts = {"big": [0, 0, 0], "mid": [0, 0, 0], "tiny": [0, 0, 0]}
    assert planned(state, 1, devices)[1] == planned(state, 1, devices)[1]
    for number in range(1, 101):
        state, found = planned(state, number, devices)
        for name, capacity in found.items():
            counts[name][capacity] += 1
    assert counts["tiny"] == [100, 0, 0]
    assert counts["mid"][2] == 0
    assert all(abs(count - 50) < 25 for count in counts["mid"][:2])  # five standard deviations
    assert all(abs(count - 33) < 24 for count in counts["big"])


def test_dynamic_by_mix_draws_by_shares():
    state = start(assign="dynamic", mix="a3-c1", recipe__batch=1.0)
    devices = (DeviceView("big", AMPLE), DeviceView("mid", budgets(state)[1]))
    found = [planned(state, number, devices)[1] for number in range(1, 101)]
    wide = sum(f["big"] == 2 for f in found)
    assert abs(wide - 75) < 22
    assert all(f["big"] in (0, 2) and f["mid"] == 0 for f in found)
    only = start(assign="dynamic", mix="a1")
    assert planned(only, 1, devices)[1] == {"big": 2, "mid": 1}, "no level of the mix fits: the widest that does"


def test_the_scalers_rate_is_the_widths_fraction_and_drafts_say_what_they_take():
    for scaler in (0.0, 1.0):
        state = start(scaler=scaler, mix="a1-b1-c1")
        devices = tuple(DeviceView(f"d{i}", AMPLE) for i in range(3))
        drafts = heterofl.plan(state, 1, devices, rng_of(0, 1))[1]
        rates = [d.recipe.knobs.get("scale") for d in drafts]
        assert rates == ([1.0, 0.5, 0.25] if scaler else [None] * 3)
        assert len({d.recipe.seed for d in drafts}) == 3
        for draft in drafts:
            assert draft.bytes_peak == fit(SPEC, (draft.structure,), draft.recipe, Means(AMPLE)).bytes_bound


def test_wrong_parameters_are_explained():
    for name, values in {
        "fractions": ["", "0.5", "1 0.5", "x 1", "0 1", "nan 1"],
        "assign": ["", "Fix", "random"],
        "mix": ["a", "a1-", "d1", "a1-a2", "a0", "A1", "a-1", "a1001", "a1 b1", "a\u0661"],
        "scaler": [0.5, -1.0],
        "recipe.mask": [2.0],
        "calibrate": [1.0, -1.0, 0.5],
    }.items():
        for value in values:
            with pytest.raises(ConfigError, match=name):
                heterofl.init(SPEC, random_arrays(SPEC, Structure()), {"fractions": "0.25 0.5 1", name: value})
    with pytest.raises(ConfigError, match="fedavg"):
        heterofl.init(linear(), random_arrays(linear(), Structure()), {})


def test_a_model_that_does_not_end_with_its_classes_needs_the_mask_off():
    ending = dataclasses.replace(SPEC, nodes=(*SPEC.nodes, Node("end", "sigmoid", ("o",))))
    weights = random_arrays(ending, Structure())
    with pytest.raises(ConfigError, match=r"recipe\.mask 0"):
        heterofl.init(ending, weights, {})
    assert heterofl.init(ending, weights, {"recipe.mask": 0.0}).round == 0


def test_joining_by_rows_is_joining_where_every_row_is_owned():
    state = start()
    answers = mixed(state, 5)

    def by_samples(cover):
        return aggregate.shares([seat.samples for seat in cover])

    plain = aggregate.joined(state, answers, by_samples)
    for head in ((), HEAD):
        by_rows = aggregate.joined_by_rows(state, answers, by_samples, head, lambda _: np.ones(SPEC.classes, np.bool_))
        for name in state.weights:
            assert by_rows.weights[name].tobytes() == plain.weights[name].tobytes()


def observing(draft, samples, seed=0):
    """Answer an order to calibrate with made-up statistics of the width and all narrower ones."""
    norms = {}
    for capacity in range(draft.structure.capacity + 1):
        arrays = random_arrays(normed(), draft.structure.narrowed(capacity), 10 * seed + capacity)
        norms |= {f"{capacity}/{name}": np.abs(arrays[name]) for name in ("n.mean", "n.variance")}
    return Answer(draft.device, samples, draft.structure, {}, Usage(), {}, norms=norms)


def test_static_statistics_stand_still_in_training_and_are_what_devices_saw_by_samples():
    spec = normed()
    weights = random_arrays(spec, Structure(), 1)
    state = heterofl.init(spec, weights, {"fractions": "0.5 1", "calibrate": 3.0})
    devices = (DeviceView("big", AMPLE), DeviceView("large", AMPLE), DeviceView("low", low_of(state)))
    still = {"n.mean", "n.variance"}
    for number in (1, 2, 3):
        state, drafts = heterofl.plan(state, number, devices, rng_of(0, number))
        calibrating = number == 3
        assert {d.verb for d in drafts} == {"calibrate" if calibrating else "train"}
        assert [(d.device, d.structure.capacity) for d in drafts] == [("big", 1), ("large", 1), ("low", 0)]
        if calibrating:
            answers = tuple(
                observing(d, {"big": 30, "large": 10, "low": 60}[d.device], i) for i, d in enumerate(drafts)
            )
        else:
            answers = tuple(
                Answer(d.device, 30, d.structure, {}, Usage(), random_arrays(spec, d.structure, i))
                for i, d in enumerate(drafts)
            )
        after = heterofl.close(state, answers)
        assert {n for n in weights if (after.weights[n] != state.weights[n]).any()} == (
            still if calibrating else set(weights) - still
        )
        assert set(after.norms) == ({0, 1} if calibrating else set())
        assert heterofl.close(state, ()) is state
        if calibrating:
            mean = np.average([a.norms["1/n.mean"] for a in answers[:2]], 0, [30, 10])
            np.testing.assert_allclose(after.weights["n.mean"], mean, rtol=1e-5)
            own = np.average([a.norms["0/n.mean"] for a in answers], 0, [30, 10, 60])
            np.testing.assert_allclose(after.norms[0]["n.mean"][:2], own, rtol=1e-5)
        state = after
    tracked = heterofl.init(spec, weights, {"fractions": "0.5 1"})
    tracked, drafts = heterofl.plan(tracked, 3, devices, rng_of(0, 3))
    assert {d.verb for d in drafts} == {"train"}
    one = Answer("big", 5, drafts[0].structure, {}, Usage(), random_arrays(spec, drafts[0].structure, 9))
    for name in still:
        assert (heterofl.close(tracked, (one,)).weights[name] != weights[name]).all()


def low_of(state):
    recipe = heterofl.plan(state, 1, (DeviceView("a", AMPLE),), rng_of(0, 1))[1][0].recipe
    return predict(state.spec, whole_of(state).narrowed(1), recipe, 1).bound - 1


def test_where_nobody_holds_the_whole_model_it_has_the_statistics_of_the_widest_that_somebody_holds():
    spec = normed()
    state = heterofl.init(spec, random_arrays(spec, Structure(), 1), {"fractions": "0.5 1", "calibrate": 2.0})
    poor = DeviceView("low", low_of(heterofl.init(spec, state.weights, {"fractions": "0.5 1"})))
    state, drafts = heterofl.plan(state, 2, (poor,), rng_of(0, 2))
    assert [(d.verb, d.structure.capacity) for d in drafts] == [("calibrate", 0)], "or the run would wait for ever"
    one = observing(drafts[0], 5, 9)
    after = heterofl.close(state, (one,))
    np.testing.assert_allclose(after.weights["n.mean"][:2], one.norms["0/n.mean"], rtol=1e-6)
    assert np.array_equal(after.weights["n.mean"][2:], state.weights["n.mean"][2:])
    assert heterofl.plan(state, 2, (), rng_of(0, 2))[1] == ()
