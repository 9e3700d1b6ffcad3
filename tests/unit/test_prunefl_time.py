"""PruneFL's seconds of a round: what they are learnt from, and what they make it keep."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from coordinator.algorithms import prunefl
from coordinator.blocks.importance import climb, solve
from coordinator.blocks.masks import density
from tests.support.prunefl import NAMES, answer, planned, start


def seconds_of(state, factor=1.0):
    kept = [int(state.masks[n].sum()) if n in state.masks else state.weights[n].size for n in NAMES]
    return factor * (0.5 + 1e-3 * kept[0] + 2e-4 * kept[1] + 5e-4 * kept[2])


@pytest.mark.parametrize("time_model", ["fit", "fit devices"])
def test_the_time_model_is_learnt_from_rounds(time_model):
    state = start(stages="further", every=1.0, time=time_model, trust=1e-6, target=0.3, horizon=12.0)
    for number in range(1, 16):
        state, _ = planned(state, number)
        told = [
            answer(state, "a", 10, number, "random", took=(seconds_of(state), 0.0)),
            answer(state, "b", 10, number, "random", took=(seconds_of(state, 0.3), 0.0)),
        ]
        state = prunefl.close(state, told)
    fact = state.scalars["prunefl"]["history"][-1]
    assert fact["r2"] > 0.99
    assert len(fact["seconds"]) == 1, "the device that is faster at everything does not matter"
    kept = [100, 20, 40]
    constant, *each = fact["seconds"][0]
    wanted = 0.5 + 0.1 + 2e-4 * 20 + 5e-4 * 40
    assert constant + sum(t * n for t, n in zip(each, kept, strict=True)) == pytest.approx(wanted, rel=0.25)
    assert fact["undecided"] == 0


def test_slow_devices_of_another_kind_are_algorithm_3s():
    state = start(stages="further", every=1.0, time="1 0.01 0 0; 1 0 0.01 0.01")
    state, _ = planned(state, 1)
    state = prunefl.close(state, [answer(state, z="random")])
    fact = state.scalars["prunefl"]["history"][-1]
    assert (fact["undecided"], len(fact["seconds"])) == (0, 2)


def test_many_kinds_of_devices_take_few_searches(monkeypatch):
    asked, searched = [], []
    rng = np.random.default_rng(3)
    lines = [f"1 {a:.6f} {(1 - a) ** 2:.6f} {0.01 + a * (1 - a):.6f}" for a in rng.random(60)]
    state = start(stages="further", every=1.0, time=";".join([*lines, "1 0 0 0"]))
    monkeypatch.setattr(prunefl, "solve", lambda *told: (asked.append(told[1].seconds), solve(*told))[1])
    monkeypatch.setattr(prunefl, "climb", lambda *told: (searched.append(told), climb(*told))[1])
    state, _ = planned(state, 1)
    state = prunefl.close(state, [answer(state, z="random")])
    assert len(asked) == len(searched) == 3
    clock = searched[0][1]
    assert clock([1, 1, 1]) == pytest.approx(max(5 * sum(map(float, line.split())) for line in lines))


def test_a_link_makes_weights_dearer():
    ends = []
    for link in (0.0, 1e4):
        state = start(stages="further", every=1.0, link=link, time="1 0.0001 0.0001 0.0001")
        state, _ = planned(state, 1)
        ends.append(prunefl.close(state, [answer(state, z="random")]))
    assert density(ends[1].masks) < density(ends[0].masks)
    assert ends[1].scalars["prunefl"]["history"][0]["seconds"][0][1:] == pytest.approx([5e-4 + 8e-4] * 3)


def test_a_layer_that_keeps_nothing_does_not_grow_for_nothing():
    state = start(stages="further", every=1.0, time="fit", prunable=0.9)
    masks = {name: np.ones(state.weights[name].shape, bool) for name in NAMES}
    masks["c.weight"][:] = False
    state, _ = planned(dataclasses.replace(state, masks=masks), 1)
    z = {name: np.full(state.weights[name].size, 0.01 if name == "c.weight" else 9.0, np.float32) for name in NAMES}
    state = prunefl.close(state, [answer(state, z=z, took=(1.0, 0.0), **{f"seconds.{n}": 0.1 for n in NAMES[1:]})])
    assert state.scalars["prunefl"]["layers"]["kept"] == [0, 648, 48]
    assert state.scalars["prunefl"]["history"][0]["layers"]["c.weight"] == 0.0


def test_turns_that_are_mostly_transfers_make_weights_dearer():
    ends = []
    for more in (0.0, 30.0):
        state = start(stages="further", every=3.0, time="fit")
        for number in (1, 2, 3):
            state, _ = planned(state, number)
            told = "random" if number == 3 else None
            turn = 1.0 + (90.0 if told else more) if more else 0.0
            state = prunefl.close(state, [answer(state, z=told, took=(1.0, turn))])
        ends.append(state)
    assert density(ends[1].masks) < density(ends[0].masks)
    lines = [end.scalars["prunefl"]["history"][0]["seconds"][0] for end in ends]
    sizes = [1, *(array.size for name, array in ends[0].weights.items() if name in NAMES)]
    assert [sum(t * n for t, n in zip(line, sizes, strict=True)) for line in lines] == pytest.approx([1.0, 31.0])
