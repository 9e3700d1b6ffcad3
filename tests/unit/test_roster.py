"""What a coordinator remembers of devices: bounded however many names it has seen, and fit for a state's file."""

import dataclasses

import numpy as np
import pytest

from coordinator.advance import load_state, save_state
from coordinator.algorithm import Answer, DeviceView, rng_of
from coordinator.algorithms import by_name
from coordinator.blocks import pace, ratios, roster
from coordinator.blocks.roster import latest
from tests.support.models import random_arrays, small_cnn
from wire.messages import Usage
from wire.spec import Structure
from wire.spool import Spool

SPEC = small_cnn()
GREAT = 1 << 40
LONG = "d" * 58
PARAMS = {
    "nestfl": {"deadline": 9.0},
    "fledge": {"deadline": 9.0},
    "heterofl": {"mix": "a1-b1", "fractions": "0.5 1"},
    "fedmp": {},
    "flexcom": {},
    "fedprox": {},
    "hermes": {},
}


def start(name, **params):
    return by_name(name).init(SPEC, random_arrays(SPEC, Structure()), {**PARAMS.get(name, {}), **params})


def view(name):
    return DeviceView(name, GREAT, samples=10, seconds=1.0, seconds_turn=2.0)


def still(draft):
    """Answer without moving anything."""
    update = {name: np.zeros_like(array) for name, array in random_arrays(SPEC, draft.structure).items()}
    sent = {name: np.ones(array.shape, np.bool_) for name, array in update.items()}
    return Answer(draft.device, 5, draft.structure, {}, Usage(seconds=1.0), update, sent)


def test_the_oldest_are_forgotten_and_none_of_the_news(monkeypatch):
    monkeypatch.setattr(roster, "DEVICES_MAX", 3)
    assert list(latest({"a": 1, "b": 2, "c": 3}, {"b": 4})) == ["a", "c", "b"]
    assert latest({"a": 1, "b": 2, "c": 3}, {"b": 4, "d": 5}) == {"c": 3, "b": 4, "d": 5}
    assert latest({"a": 1}, dict.fromkeys("vwxyz", 0)) == dict.fromkeys("vwxyz", 0)
    assert latest({}, {}) == {}


@pytest.mark.parametrize("name", PARAMS)
def test_ever_new_names_are_not_all_remembered(name, monkeypatch, tmp_path):
    monkeypatch.setattr(roster, "DEVICES_MAX", 4)
    algorithm, state, sizes = by_name(name), start(name), []
    spool = Spool(tmp_path)
    for number in range(1, 9):
        seen = tuple(view(f"{LONG}{n}") for n in range(2 * number, 2 * number + 3))  # one stays, two are new
        state, drafts = algorithm.plan(state, number, seen, rng_of(0, number))
        assert len(drafts) == 3
        state = algorithm.close(state, tuple(map(still, drafts)))
        sizes.append(str(state.scalars).count(LONG))
    assert max(sizes) <= 3 * 4, "three maps at most"
    assert sizes[-1] == sizes[-2], "no longer growing"
    again = load_state(spool, save_state(spool, state).digest, SPEC)
    assert save_state(spool, again).digest == save_state(spool, state).digest


def test_a_device_that_stays_is_not_forgotten(monkeypatch):
    monkeypatch.setattr(roster, "DEVICES_MAX", 4)
    algorithm, state = by_name("nestfl"), start("nestfl")
    for number in range(1, 9):
        names = ("stays", *(f"{number}-{n}" for n in range(2)))
        state, drafts = algorithm.plan(state, number, tuple(map(view, names)), rng_of(0, number))
        state = algorithm.close(state, tuple(map(still, drafts)))
    row = state.scalars["clients"].index("stays")
    assert state.arrays["rounds"][row].tolist() == [8] * 5
    assert len(state.scalars["clients"]) == 4


def test_a_device_keeps_its_place_in_the_mix_while_others_are_forgotten(monkeypatch):
    monkeypatch.setattr(roster, "DEVICES_MAX", 3)
    algorithm, state, widths = by_name("heterofl"), start("heterofl"), []
    for number in range(1, 9):
        names = ("stays", *(f"{number}-{n}" for n in range(2)))
        state, drafts = algorithm.plan(state, number, tuple(map(view, names)), rng_of(0, number))
        widths += [d.structure.capacity for d in drafts if d.device == "stays"]
    assert len(set(widths)) == 1


def client(seed):
    rng = np.random.default_rng(seed)
    plays = tuple(rng.random(250).tolist())
    turns = tuple(ratios.Turn(seed + n, float(rng.random()), 1e18 * float(rng.random()), 0.0) for n in range(24))
    loss = None if seed % 2 else float(rng.random())
    return ratios.Client(tuple(np.linspace(0.0, 0.8, 5 + seed % 7).tolist()), plays, plays, turns, loss)


def test_all_that_is_remembered_of_a_thousand_bandits_fits_a_state(tmp_path):
    spool, clients = Spool(tmp_path), {f"{LONG}{n}": client(n) for n in range(1000)}
    clients[f"{LONG}new"] = ratios.Client((0.0, 0.8))
    state = ratios.remembered(start("fedmp"), clients)
    again = load_state(spool, save_state(spool, state).digest, SPEC)
    assert ratios.read(again) == clients
    assert list(ratios.read(again)) == list(clients)
    assert ratios.read(start("fedmp")) == {}


def test_the_turns_of_as_many_devices_as_are_remembered_fit_a_state(tmp_path):
    state, spool = start("fledge"), Spool(tmp_path)
    names = [f"{LONG}{n:06d}" for n in range(roster.DEVICES_MAX)]
    turns = {name: [[4, 1.0 / 3.0]] * pace.TURNS for name in names}
    scalars = {**state.scalars, "turns": turns, "due": dict.fromkeys(names, 4)}
    state = dataclasses.replace(state, scalars=scalars)
    assert load_state(spool, save_state(spool, state).digest, SPEC).scalars == scalars
