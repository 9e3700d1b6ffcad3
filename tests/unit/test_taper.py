"""Taper against a plain loop of what its text says, its starts, and that nothing of it needs a dense device."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from coordinator.algorithm import Answer, DeviceView, rng_of
from coordinator.algorithms import taper
from coordinator.blocks.initial import initial_weights
from coordinator.blocks.schedule import cubic
from wire import zoo
from wire.errors import ConfigError
from wire.messages import Usage
from wire.spec import Structure
from wire.structure import masked

SPEC = zoo.by_name("digits-mlp")
RICH = DeviceView("a", 1 << 30, samples=10)


def begun(**params):
    return taper.init(SPEC, initial_weights(SPEC, 1), {"first": "erk", "horizon": 20.0, **params})


def planned(state, number, devices=(RICH,)):
    return taper.plan(state, number, devices, rng_of(3, number))


def answers(state, seed, count=3):
    """Give what devices might say: random movements of kept weights."""
    rng = np.random.default_rng(seed)
    for place in range(count):
        update = {
            name: np.where(state.masks.get(name, True), rng.standard_normal(w.shape), 0.0).astype(np.float32)
            for name, w in state.weights.items()
        }
        sent = dict(state.masks)
        yield Answer(f"d{place}", 5 + place, masked(state.masks), {}, Usage(), update, sent)


def test_rounds_are_those_of_a_plain_loop():
    state = begun(density=0.05, start=0.3, beta=0.7, every=3.0, until=0.5)
    weights = {name: w.astype(np.float64) for name, w in state.weights.items()}
    masks = {name: mask.copy() for name, mask in state.masks.items()}
    first = {name: w.copy() for name, w in weights.items()}
    speed = {name: np.zeros(w.shape) for name, w in weights.items()}
    size = sum(mask.size for mask in masks.values())
    for number in range(1, 15):
        state, _ = planned(state, number)
        said = list(answers(state, number))
        state = taper.close(state, said)
        total = sum(answer.samples for answer in said)
        for name, before in weights.items():
            mean = sum(answer.samples / total * answer.update[name].astype(np.float64) for answer in said)
            speed[name] = 0.7 * speed[name] + mean
            weights[name] = before + mean + 0.7 * speed[name]
        kept = sum(int(mask.sum()) for mask in masks.values())
        wanted = round(cubic(0.3, 0.05, min(1.0, number / 10)) * size)
        if (number % 3 == 0 or number >= 10) and wanted < kept:
            scores = [
                (abs(weights[name][place] - first[name][place]), name, place)
                for name, mask in masks.items()
                for place in zip(*np.nonzero(mask), strict=True)
            ]
            for _, name, place in sorted(scores, key=lambda s: s[0])[: kept - wanted]:
                masks[name][place] = False
                weights[name][place] = speed[name][place] = 0.0
        for name, wanted_weights in weights.items():
            np.testing.assert_allclose(state.weights[name], wanted_weights, rtol=2e-4, atol=2e-5)
        for name, mask in masks.items():
            assert np.count_nonzero(state.masks[name] != mask) <= 2, "equal but for what rounding decides"
            masks[name] = state.masks[name].copy()
    assert sum(int(mask.sum()) for mask in state.masks.values()) == round(0.05 * size)


def test_masks_are_nested_and_what_left_stays_zero():
    state = begun(density=0.02, start=0.4, every=1.0)
    for number in range(1, 13):
        before = state.masks
        state = taper.close(planned(state, number)[0], list(answers(state, number)))
        for name, mask in state.masks.items():
            assert not (mask & ~before[name]).any()
            assert not state.weights[name][~mask].any()
            assert not state.arrays[f"momentum/{name}"][~mask].any()


def test_the_first_order_measures_the_flow_at_one_device():
    state = taper.init(SPEC, initial_weights(SPEC, 1), {"density": 0.1})
    poor, rich = DeviceView("a", 10 << 20), DeviceView("b", 1 << 30)
    state, drafts = planned(state, 1, (poor, rich, DeviceView("c", 1 << 30)))
    assert [(draft.recipe.rule, draft.structure) for draft in drafts] == [("score", Structure())]
    size = {name: state.weights[name].size for name in ("fc1.weight", "fc2.weight", "out.weight")}
    extras = {name: (np.arange(n), np.arange(n, dtype=np.float32)) for name, n in size.items()}
    answer = Answer(drafts[0].device, 1, Structure(), {}, Usage(), {}, extras=extras)
    state = taper.close(state, [answer])
    assert sum(int(mask.sum()) for mask in state.masks.values()) == round(0.2 * sum(size.values()))
    state, drafts = planned(state, 2, (poor, rich))
    assert {draft.structure for draft in map(_hashable, drafts)} == {masked(state.masks).masks}
    assert all(draft.recipe.rule == "sgd" and draft.recipe.form == "bfloat16" for draft in drafts)


def _hashable(draft):
    return dataclasses.replace(draft, structure=draft.structure.masks)


def test_no_answer_to_the_first_order_is_asked_again():
    state = taper.init(SPEC, initial_weights(SPEC, 1), {})
    state, _ = planned(state, 1)
    assert taper.close(state, []).masks == {}


def test_where_nobody_holds_the_dense_model_masks_follow_the_shapes():
    spec = zoo.by_name("digits-cnn")
    state = taper.init(spec, initial_weights(spec, 1), {"density": 0.02, "start": 0.02})
    state, drafts = planned(state, 1, (DeviceView("a", 16 << 20),))
    assert drafts, "1.6 million weights do not fit into 16 MiB, 2 % of them do"
    assert state.masks


def test_a_model_without_flow_begins_by_shape():
    spec = zoo.by_name("resnet-18")
    weights = {name: np.ones_like(w) for name, w in initial_weights(spec, 1).items()}
    assert taper.init(spec, weights, {}).masks


def test_without_momentum_and_narrowing_it_is_masked_federated_averaging():
    state = begun(density=0.3, start=0.3, beta=0.0)
    state, _ = planned(state, 1)
    said = list(answers(state, 1))
    after = taper.close(state, said)
    for name, w in state.weights.items():
        mean = sum(np.float32(a.samples / 18) * a.update[name] for a in said)
        np.testing.assert_allclose(after.weights[name], w + mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "params",
    [
        {"density": 0.0},
        {"start": 1.5},
        {"beta": 1.0},
        {"every": 0.5},
        {"iterations": 10_001.0},
        {"first": "luck"},
        {"form": "int3"},
    ],
)
def test_impossible_parameters_are_refused(params):
    with pytest.raises(ConfigError):
        taper.init(SPEC, initial_weights(SPEC, 1), params)


def test_flow_runs_through_convolutions_and_pools():
    spec = zoo.by_name("lenet-5")
    assert not taper.init(spec, initial_weights(spec, 1), {}).masks


def test_a_round_without_answers_moves_nothing_whatever_the_momentum():
    state = begun(density=0.05, start=0.3, every=1.0)
    state = taper.close(planned(state, 1)[0], list(answers(state, 1)))
    assert any(array.any() for name, array in state.arrays.items() if name.startswith("momentum/"))
    state, _ = planned(state, 2)
    assert taper.close(state, ()) is state
    assert taper.close(state, [dataclasses.replace(one, samples=0) for one in answers(state, 2)]) is state


def test_a_device_that_finds_no_flow_is_not_asked_twice_in_a_row():
    asked = []
    state = taper.init(SPEC, initial_weights(SPEC, 1), {"horizon": 20.0})
    for number in (1, 2, 3):
        state, (draft,) = planned(state, number, (RICH, dataclasses.replace(RICH, name="b")))
        asked.append(draft.device)
        before = state
        state = taper.close(state, (Answer(draft.device, 5, Structure(), {}, Usage(), {}),))
        assert state is before, "masks are not made of nothing"
    assert asked == ["a", "b", "a"]
