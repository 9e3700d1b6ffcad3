"""PruneFL decides by what devices told only where all importance would have decided the same."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from coordinator.algorithms import prunefl
from tests.support.prunefl import NAMES, answer, asked, planned, start

CAPPED = {"target": 0.2, "target__from": 0.2, "time": "10 0.02 0.02 0.02"}
SLOW = {"time": "1 0.05 0.02 0.03"}


def still(state, device, z, tops):
    """An answer that moves nothing, so that runs with more and with fewer rounds meet the same weights."""
    told = answer(state, device, 10 if device == "a" else 30, z=z, top=tops)
    metrics = {**told.metrics, "accuracy.train": 1.0}
    return dataclasses.replace(told, update={}, metrics=metrics)


def decided(seed, decisions, **params):
    """The masks of a whole run, how often more was asked for, and the state; importance changes with every decision."""
    state, masks, again = start(every=1.0, half_life=1e12, **params), [], 0
    for number in range(1, 200):
        state, drafts = planned(state, number)
        done = state.scalars["prunefl"]["reconfigured"]
        rng = np.random.default_rng([seed, done])
        zs = {d: {n: rng.exponential(size=state.weights[n].size).astype(np.float32) ** 2 for n in NAMES} for d in "ab"}
        told = [still(state, d.device, zs[d.device], asked(d)) for d in drafts]
        before, state = state, prunefl.close(state, told)
        memo = state.scalars["prunefl"]
        if memo["reconfigured"] == done:
            again += 1
            assert asked(drafts[0])
            assert memo["widen"] == 2.0 * before.scalars["prunefl"]["widen"]
            assert state.masks is before.masks
        else:
            masks.append({name: mask.copy() for name, mask in state.masks.items()})
        if memo["reconfigured"] == decisions or memo["stage"] == "fixed":
            return masks, again, state
    raise AssertionError(state.scalars["prunefl"])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("model", [CAPPED, SLOW])
def test_the_masks_of_a_run_are_those_of_all_importance(model, seed):
    more = {"stages": "further", **model}
    masks, again, state = decided(seed, 6, top=0.02, **more)
    wanted, none, _ = decided(seed, 6, importance="dense", **more)
    assert again > 0, "the first request is too small"
    assert none == 0
    assert state.scalars["prunefl"]["certified"] == 6
    for found, exact in zip(masks, wanted, strict=True):
        assert found.keys() == exact.keys()
        assert all((found[name] == mask).all() for name, mask in exact.items())


def test_so_it_is_at_the_one_device_of_the_beginning():
    more = {"stages": "initial", "initial__start": 0.0, "initial__calm": 99.0, "initial__rounds": 90.0, **SLOW}
    masks, again, _ = decided(1, 5, top=0.02, **more)
    wanted, _, _ = decided(1, 5, importance="dense", **more)
    assert again > 0
    assert len(masks) == len(wanted) == 5
    for found, exact in zip(masks, wanted, strict=True):
        assert all((found[name] == mask).all() for name, mask in exact.items())


def test_a_doubt_that_is_allowed_decides_sooner():
    _, strict, _ = decided(2, 6, stages="further", top=0.1, **CAPPED)
    _, lax, state = decided(2, 6, stages="further", top=0.1, doubt=0.5, **CAPPED)
    assert lax < strict
    counts = [fact["undecided"] for fact in state.scalars["prunefl"]["history"]]
    assert 0 < max(counts) <= 0.5 * 150, "of a fifth of 750 weights"
    assert state.scalars["prunefl"]["certified"] == counts.count(0)


@pytest.mark.parametrize("more", [{"cap": "stop"}, {"time": "fit devices"}, {"time": "1 1 1 1; 1 0 0 2"}])
def test_where_nothing_follows_from_a_part_all_is_asked_for(more):
    state = start(stages="further", every=1.0, top=0.02, **{**CAPPED, **more})
    state, _ = planned(state, 1)
    state = prunefl.close(state, [answer(state, z="random")])
    assert state.masks
    assert asked(planned(state, 2)[1][0]) == {}
    state = start(stages="further", every=1.0, top=0.02, **CAPPED)
    state, _ = planned(state, 1)
    state = prunefl.close(state, [answer(state, z="random")])
    assert asked(planned(state, 2)[1][0])


def test_who_was_asked_for_all_and_told_a_part_holds_nobody_up():
    state = start(stages="further", every=1.0, importance="dense", **CAPPED)
    for number in (1, 2):
        state, _ = planned(state, number)
        state = prunefl.close(state, [answer(state, z="random", seed=number, top=dict.fromkeys(NAMES, 3))])
        assert state.scalars["prunefl"]["reconfigured"] == number
    assert state.scalars["prunefl"]["history"][-1]["undecided"] > 0


def test_a_layer_that_keeps_nothing_is_asked_for_more_too():
    state = start(stages="further", every=1.0, top=1.0, **SLOW)
    masks = {name: np.zeros(state.weights[name].shape, bool) for name in NAMES}
    masks["c.weight"][0] = True
    counts = []
    for widen in (1.0, 2.0, 64.0, 1024.0):
        memo = {**state.scalars["prunefl"], "widen": widen}
        now = dataclasses.replace(state, masks=masks, scalars={**state.scalars, "prunefl": memo})
        counts.append(asked(planned(now, 1)[1][0]).get("f.weight"))
    assert counts == [1, 2, 64, None]


def test_equal_importance_of_which_all_was_told_is_certain():
    zs = {name: np.ones(array.size, np.float32) for name, array in start().weights.items()}
    state = start(stages="further", every=1.0, **CAPPED)
    for number in (1, 2, 3):
        state, drafts = planned(state, number)
        tops = asked(drafts[0]) if number == 2 else None
        state = prunefl.close(state, [answer(state, z={n: zs[n] for n in NAMES}, top=tops)])
    assert [fact["round"] for fact in state.scalars["prunefl"]["history"]] == [1, 3]
    assert state.scalars["prunefl"]["certified"] == 2
