"""FedMP's fleets: few of many devices are asked, and the others' turns must do for them; a device has little memory."""

import numpy as np
import pytest

from coordinator.algorithm import DeviceView, rng_of
from coordinator.algorithms import fedmp
from coordinator.blocks import deadline, ratios, worth
from tests.support.models import random_arrays, small_cnn
from tests.unit.test_fedmp import AMPLE, answer, start
from wire.memory import predict, uniform
from wire.messages import Recipe
from wire.spec import Structure

SPEC = small_cnn(channels=50, hidden=100)
COST = {"slow": 4.0, "mid": 2.0, "fast": 1.0}
"""By the first part of a device's name; turns take so much times what is left of each channel's weights."""


def turn(name, ratio):
    return COST[name.split("-")[0]] * (0.02 + (1.0 - ratio) ** 2)


def played(state, names, loss=2.0, *, timed=True):
    """Let these devices have a round; give the state after it, and what each trained."""
    number = state.round + 1
    state, drafts = fedmp.plan(state, number, tuple(DeviceView(n, AMPLE, 10) for n in names), rng_of(0, number))
    chosen = {d.device: state.scalars["ratios"][d.structure.capacity] for d in drafts}
    moves = [random_arrays(SPEC, d.structure, number, 0.001) for d in drafts]
    said = {"loss.first": loss, "loss": loss}
    told = (
        answer(state, d, 0, 10, said, m, turn(d.device, chosen[d.device]) * timed)
        for d, m in zip(drafts, moves, strict=True)
    )
    return fedmp.close(state, tuple(told)), chosen


def strangers(number):
    return [f"slow-{number}", f"mid-{number}", f"fast-{number}"]


def begun(rounds=4, **params):
    state, found = start(spec=SPEC, policy="deadline", grow=0.0, **params), []
    for number in range(rounds):
        state, chosen = played(state, strangers(number))
        found.append(chosen)
    return state, found


def test_the_fleet_is_probed_and_not_every_device_again():
    _, found = begun(probes="0.6 0.5")
    assert [set(line.values()) for line in found[:2]] == [{0.6}, {0.5}]
    assert all(set(line.values()).isdisjoint({0.6, 0.5}) for line in found[2:])
    assert [len(set(line.values())) for line in found[2:]] == [1, 1], "nobody knows how fast a stranger is"


def test_a_stranger_is_taken_for_a_slow_device_and_known_by_its_first_turn(monkeypatch):
    state, _ = begun()
    again = ["slow-0", "mid-0", "fast-0"]
    _, chosen = played(state, [*again, "fast-9"])
    assert chosen["slow-0"] > chosen["mid-0"] > chosen["fast-0"]
    assert chosen["fast-9"] == pytest.approx(chosen["slow-0"], abs=0.02)
    clients = ratios.read(state)
    load = deadline.Load(*(tuple(line) for line in state.scalars["load"]))
    rows = [
        deadline.seconds_of(load, [(t.ratio, t.seconds) for t in one.turns], fedmp.PARAMS["trust"])
        for one in clients.values()
    ]
    found = fedmp._seconds(load, clients, ["fast-9", "slow-0"], fedmp.PARAMS["trust"])
    np.testing.assert_allclose(found[0], np.quantile(rows, 0.9, axis=0))
    np.testing.assert_allclose(found[1], rows[list(clients).index("slow-0")])
    monkeypatch.setattr(fedmp, "_FLEET", 3)
    found = fedmp._seconds(load, clients, ["fast-9"], fedmp.PARAMS["trust"])
    np.testing.assert_allclose(
        found[0], np.quantile(rows[-3:], 0.9, axis=0), err_msg="of those that were heard of last"
    )


def test_one_very_slow_device_does_not_make_strangers_slow(monkeypatch):
    monkeypatch.setitem(COST, "stuck", 4000.0)
    state, _ = begun(6)
    _, before = played(state, ["mid-0", "fast-9"])
    state, _ = played(state, ["stuck-0", "mid-1", "fast-1"])
    _, after = played(state, ["mid-0", "fast-9"])
    assert after == pytest.approx(before, abs=0.03)
    monkeypatch.setattr(fedmp, "_SLOW", 1.0)
    _, stuck = played(state, ["mid-0", "fast-9"])
    assert stuck["mid-0"] < before["mid-0"] - 0.3, "nothing would be too long for it"


def test_a_device_whose_times_are_not_known_is_a_stranger_and_a_fleet_without_times_is_probed():
    state = start(spec=SPEC, policy="deadline")
    for _ in range(4):
        state, chosen = played(state, strangers(0), timed=False)
        assert set(chosen.values()) == {0.95}
    state, _ = begun()
    state, _ = played(state, ["fast-9"], timed=False)
    _, chosen = played(state, ["slow-0", "fast-9"])
    assert chosen["fast-9"] == pytest.approx(chosen["slow-0"], abs=0.02)


def test_what_ratios_are_worth_is_learnt_from_all_that_were_heard_of_lately(monkeypatch):
    state, found = begun()
    seen, real = [], worth.worth
    monkeypatch.setattr(worth, "worth", lambda said, *more: seen.append(said) or real(said, *more))
    played(state, ["slow-9"])
    said = {(one.device, one.round, one.ratio) for one in seen[0]}
    assert said == {(name, n, ratio) for n, line in enumerate(found, 1) for name, ratio in line.items()}
    monkeypatch.setattr(fedmp, "_FLEET_ASKED", 1)
    monkeypatch.setattr(ratios, "TURNS", 4)
    played(state, ["slow-9"])
    assert {one.round for one in seen[1]} == {3, 4}, "whole rounds, the last ones"
    played(state, ["slow-9", "mid-9", "fast-9"])
    assert len(seen[2]) == 12, "the more are asked, the more"
    state, _ = played(state, ["mid-1"], loss=0.0)
    monkeypatch.setattr(fedmp, "_FLEET_ASKED", 20)
    played(state, ["slow-9"])
    assert len(seen[-1]) == 12, "who says nothing of its loss teaches nothing"


def test_losses_of_the_last_rounds_stretch_the_deadline_whoever_said_them():
    state = start(spec=SPEC, policy="deadline", grow=0.5, learnt=0.5)
    high = 0.5 * np.log(SPEC.classes)
    for number, loss in enumerate([2.0 * high, 2.0 * high, high / 4.0, high / 4.0]):
        state, _ = played(state, strangers(number), loss)
    assert state.scalars["stretch"] == pytest.approx(1.0), "rounds 1 to 3: most devices still lose much"
    state, _ = played(state, strangers(9), high / 4.0)
    assert state.scalars["stretch"] == pytest.approx(2.0), "a quarter of the loss, to the power of a half"


def test_no_layer_of_six_channels_is_cut_to_one():
    spec = small_cnn(channels=6, hidden=100)
    state = fedmp.init(spec, random_arrays(spec, Structure(), 0), {})
    assert state.scalars["params"]["high"] == 0.83
    asked = fedmp.init(spec, state.weights, {"high": 0.5}).scalars["params"]
    assert (asked["high"], asked["probes"]) == (0.5, "0.83 0.786316")
    for number in range(1, 3):
        state, drafts = fedmp.plan(state, number, (DeviceView("a", AMPLE, 10),), rng_of(0, number))
        moves = random_arrays(spec, drafts[0].structure, number, 0.001)
        state = fedmp.close(state, (answer(state, drafts[0], 0, 10, {}, moves, 1.0),))
        probe = (0.95, 0.9)[number - 1] * 0.83 / 0.95
        assert state.scalars["ratios"][drafts[0].structure.capacity] == pytest.approx(probe, abs=1e-4)
        assert drafts[0].structure.widths["a"][0] == 2


@pytest.mark.parametrize("policy", ["eucb", "bounded"])
def test_a_round_without_times_teaches_no_bandit_and_the_ratios_of_a_round_are_its_own(policy):
    state = start(spec=SPEC, policy=policy)
    state, chosen = played(state, strangers(0), timed=False)
    assert all(not one.rewards for one in ratios.read(state).values())
    assert fedmp.facts(state)["ratio.mean"] == pytest.approx(np.mean(list(chosen.values())))
    state, chosen = played(state, ["slow-1"])
    facts = fedmp.facts(state)
    assert facts["ratio.least"] == facts["ratio.most"] == chosen["slow-1"], "not those of the round before"


@pytest.mark.parametrize("policy", ["eucb", "bounded"])
def test_a_bandit_explores_what_memory_leaves_of_the_ratios(policy):
    """Nothing below the least ratio that fits is ever played: a leaf there would be the untried one in every round."""
    limit = predict(SPEC, uniform(SPEC, 0.5), Recipe(batch=1, momentum=0.9, clip=2.0)).bound
    state, found = start(spec=SPEC, policy=policy, high=0.9, **{"recipe.batch": 1.0}), []
    for number in range(1, 41):
        state, (draft,) = fedmp.plan(state, number, (DeviceView("a", limit, samples=5),), rng_of(0, number))
        found.append(state.scalars["ratios"][draft.structure.capacity])
        told, moves = {"loss.first": 2.0, "loss": 1.0}, random_arrays(SPEC, draft.structure, number, 1e-3)
        state = fedmp.close(state, (answer(state, draft, 0, 5, told, moves, 1.0),))
    assert 0.45 < min(found) < 0.55
    assert len({round(ratio, 6) for ratio in found}) > 30, "the interval that is left is searched"
    assert max(found) > 0.8
