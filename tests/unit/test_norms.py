"""Running statistics by width at the coordinator: pooled by hand, in the rounds of every nested method, in its state."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from coordinator.advance import Task, _closed, advance, load_state, save_state
from coordinator.algorithm import Answer, DeviceView, rng_of
from coordinator.algorithms import by_name
from coordinator.blocks import norms, pace
from coordinator.blocks.nesting import whole_of
from tests.support.models import random_arrays
from tests.support.norms import AMPLE, SPEC, STILL, begun, cut_of, saw
from wire.errors import ConfigError, Malformed
from wire.messages import Usage
from wire.spec import Structure, encode
from wire.spool import Spool

NESTED = ("fjord", "heterofl", "nestfl", "fledge")

# --- pooling ---------------------------------------------------------------------------------------------------------


def test_mean_and_variance_of_two_devices_by_hand():
    state = begun()
    small = saw(state, "a", 1, ((1, 10), (2, 0)))
    large = saw(state, "b", 3, ((5, 2), (4, 1)), ((0, 1, 2, 3), (1, 1, 1, 1)))
    after = norms.pooled(state, (small, large))
    # mean (1 + 3 * 5) / 4 = 4, variance (1 (2 + 1) + 3 (4 + 25)) / 4 - 16 = 6.5
    # mean (10 + 3 * 2) / 4 = 4, variance (1 (0 + 100) + 3 (1 + 4)) / 4 - 16 = 12.75
    assert after.norms[0]["n.mean"][[0, 2]].tolist() == [4, 4]
    assert after.norms[0]["n.variance"][[0, 2]].tolist() == [6.5, 12.75]
    assert after.norms[1]["n.mean"].tolist() == [0, 2, 1, 3], "in canonical order again"
    assert after.norms[0]["n.mean"][[1, 3]].tolist() == [2, 3], "what the width lacks is the next wider one's"
    assert {n for n in state.weights if (after.weights[n] != state.weights[n]).any()} == STILL
    for name in STILL:
        assert np.array_equal(after.weights[name], after.norms[1][name])


def test_pooling_devices_is_pooling_their_samples():
    rng, state = np.random.default_rng(0), begun()
    parts = [rng.normal(i, 1 + i, (count, 4)) for i, count in enumerate((7, 40, 200))]
    answers = [
        saw(state, f"d{i}", len(x), *((x[:, :k].mean(0), x[:, :k].var(0)) for k in (2, 4))) for i, x in enumerate(parts)
    ]
    after, x = norms.pooled(state, answers), np.concatenate(parts)
    for k, count in ((0, 2), (1, 4)):
        found = cut_of(after, k)
        np.testing.assert_allclose(found["n.mean"], x[:, :count].mean(0), rtol=1e-5)
        np.testing.assert_allclose(found["n.variance"], x[:, :count].var(0), rtol=1e-5)
    backwards = norms.pooled(state, answers[::-1])
    np.testing.assert_allclose(backwards.norms[0]["n.variance"], after.norms[0]["n.variance"], rtol=1e-6)


def test_a_width_that_nobody_saw_keeps_its_set_and_the_widest_seen_is_the_models():
    state = begun()
    both = norms.pooled(state, (saw(state, "a", 2, ((1, 1), (1, 1)), ((2, 2, 2, 2), (3, 3, 3, 3))),))
    after = norms.pooled(both, (saw(both, "b", 2, ((7, 7), (8, 8))),))
    assert after.norms[1]["n.mean"].tolist() == after.weights["n.mean"].tolist() == [2] * 4
    assert after.norms[0]["n.mean"].tolist() == [7, 2, 7, 2]
    assert not norms.own(after, whole_of(after)), "the weights say it"
    assert norms.own(after, whole_of(after).narrowed(0))["n.mean"].tolist() == [7, 7]
    assert norms.pooled(state, ()) is state
    assert norms.pooled(state, (saw(state, "c", 0, ((1, 1), (1, 1))),)) is state
    assert norms.pooled(state, (Answer("old", 5, whole_of(state), {}, Usage(), {}),)) is state, "an answer without sets"


def test_another_ranking_takes_what_the_next_wider_width_has():
    state = begun()
    after = norms.pooled(state, (saw(state, "a", 2, ((1, 1), (1, 1)), ((2, 3, 4, 5), (3, 3, 3, 3))),))
    ranked = dataclasses.replace(after, levels={"a": np.array([0, 0, 1, 1], np.uint8)})
    assert norms.own(ranked, whole_of(ranked).narrowed(0))["n.mean"].tolist() == [1, 4]


def test_what_no_device_can_have_seen_stays_a_variance():
    state = begun()
    after = norms.pooled(state, (saw(state, "a", 2, ((3e38, 0), (-5, 0)), ((0, 0, 0, 0), (0, -1, 0, 0))),))
    assert (after.norms[0]["n.variance"] >= 0).all()
    assert (after.norms[1]["n.variance"] >= 0).all()
    with pytest.raises(Malformed, match="another ranking"):
        norms.pooled(begun(levels=(0, 0, 1, 1)), (saw(state, "a", 2, ((1, 1), (1, 1))),))


@pytest.mark.parametrize("name", NESTED)
def test_a_round_whose_sets_overflow_leaves_what_there_was(name):
    state = norms.pooled(begun(), (saw(begun(), "a", 2, ((1, 1), (1, 1)), ((2, 2, 2, 2), (3, 3, 3, 3))),))
    most = 2**63 - 1
    far = [saw(state, device, most, ((mean, 0), (1, 1))) for device, mean in (("b", 3e38), ("c", -3e38), ("d", 0))]
    after, note = _closed(by_name(name), state, far)
    assert "left out" in note
    assert after is state
    after, note = _closed(by_name(name), state, far[2:])
    assert (note, after.norms[0]["n.mean"].tolist()) == ("", [0, 2, 0, 2])


@pytest.mark.parametrize("name", NESTED)
def test_rounds_that_calibrate(name):
    algorithm = by_name(name)
    params = {"fractions": "0.5 1", "calibrate": 2.0, "recipe.epochs": 1.0}
    state = algorithm.init(SPEC, random_arrays(SPEC, Structure(), 1), params)
    devices = tuple(DeviceView(f"d{i}", AMPLE) for i in range(3))
    state, drafts = algorithm.plan(state, 1, devices, rng_of(0, 1))
    assert {d.verb for d in drafts} == {"train"}
    moves = random_arrays(SPEC, drafts[0].structure, 3)
    trained = algorithm.close(state, (Answer("d0", 9, drafts[0].structure, {}, Usage(), moves),))
    moved = {n for n in state.weights if (trained.weights[n] != state.weights[n]).any()}
    assert moved.isdisjoint(STILL)
    assert moved
    state, drafts = algorithm.plan(trained, 2, devices, rng_of(0, 2))
    assert [(d.device, d.verb, d.structure.capacity) for d in drafts] == [(f"d{i}", "calibrate", 1) for i in range(3)]
    assert state.round == 2
    assert len({d.recipe.seed for d in drafts}) == 3
    after = algorithm.close(state, (saw(state, "d0", 9, ((1, 2), (3, 4)), ((1, 2, 3, 4), (5, 6, 7, 8))),))
    assert norms.own(after, whole_of(after).narrowed(0))["n.variance"].tolist() == [3, 4]
    ranked = algorithm.plan(after, 3, devices, rng_of(0, 3))[0]
    assert all(np.array_equal(ranked.levels[g], state.levels[g]) for g in state.levels), "the widths that were observed"
    for wrong in (1.0, -1.0, 2.5):
        with pytest.raises(ConfigError, match="calibrate"):
            algorithm.init(SPEC, state.weights, {**params, "calibrate": wrong})


@pytest.mark.parametrize(("params", "warned"), [({}, True), ({"calibrate": 2.0}, False), ({"fractions": "1"}, False)])
def test_who_trains_widths_by_one_set_is_told(tmp_path, params, warned):
    spool = Spool(tmp_path)
    spec = spool.add_bytes(encode(SPEC)).digest
    task = Task(str(tmp_path), spec, "fledge", params, {}, 0, "", (), 1, ())
    assert ("calibrate = 5" in advance(task).note) == warned
    assert not advance(dataclasses.replace(task, state=advance(task).state)).note, "once"


@pytest.mark.parametrize("name", ["nestfl", "fledge"])
def test_a_round_that_calibrates_tells_nothing_of_the_time_that_training_takes(name):
    algorithm = by_name(name)
    params = {"fractions": "0.5 1", "calibrate": 2.0, "deadline": 100.0}
    state = algorithm.init(SPEC, random_arrays(SPEC, Structure(), 1), params)
    for number, seconds in ((1, 0.0), (2, 50.0), (3, 0.5)):
        state, drafts = algorithm.plan(
            state, number, (DeviceView("d", AMPLE, seconds_turn=seconds),), rng_of(0, number)
        )
        answer = saw(state, "d", 9, ((1, 2), (3, 4)))
        if drafts[0].verb == "train":
            answer = Answer("d", 9, drafts[0].structure, {}, Usage(), random_arrays(SPEC, drafts[0].structure, 3))
        state = algorithm.close(state, (answer,))
    assert state.scalars["turns"] == {"d": [[1, 50.0]]}
    assert pace.known(begun(), ()).scalars == begun().scalars


@pytest.mark.parametrize("name", NESTED)
def test_a_run_with_sets_goes_on_from_any_saved_state(name, tmp_path):
    algorithm, spool = by_name(name), Spool(tmp_path)
    params = {"fractions": "0.5 1", "calibrate": 2.0}
    state = algorithm.init(SPEC, random_arrays(SPEC, Structure(), 1), params)
    devices = tuple(DeviceView(f"d{i}", AMPLE) for i in range(2))
    for number in range(1, 6):
        state, drafts = algorithm.plan(state, number, devices, rng_of(0, number))
        answers = []
        for i, draft in enumerate(drafts):
            moves = random_arrays(SPEC, draft.structure, 10 * number + i)
            one = saw(state, draft.device, 9 + i, ((1 + i, 2), (3, number)), ((1, 2 + i, 3, 4), (5, 6, number, 8)))
            train = Answer(draft.device, 9 + i, draft.structure, {}, Usage(), moves)
            answers.append(one if draft.verb == "calibrate" else train)
        again = load_state(spool, save_state(spool, state).digest, SPEC)
        state = algorithm.close(state, answers)
        assert save_state(spool, algorithm.close(again, answers)).digest == save_state(spool, state).digest
        assert set(state.norms) == ({0, 1} if number > 1 else set())


def test_a_state_with_sets_comes_back(tmp_path):
    spool = Spool(tmp_path)
    state = norms.pooled(begun(), (saw(begun(), "a", 2, ((1, 1), (1, 1)), ((2, 2, 2, 2), (3, 3, 3, 3))),))
    saved = save_state(spool, state).digest
    again = load_state(spool, saved, SPEC)
    assert save_state(spool, again).digest == saved
    assert again.norms.keys() == {0, 1}
    assert {k: {n: a.tolist() for n, a in s.items()} for k, s in again.norms.items()} == {
        k: {n: a.tolist() for n, a in s.items()} for k, s in state.norms.items()
    }
