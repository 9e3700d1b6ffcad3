"""The server's way to `advance`: who is asked for a round that nobody could take part in."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

from coordinator.config import Config, RoundConfig
from coordinator.events import Arrived, Issued
from coordinator.fleet import Fleet
from coordinator.journal import Journal
from coordinator.round import open_round, step
from coordinator.standing import Standing
from coordinator.steps import Steps, Store
from tests.support.messages import RUN, a_presence, a_reply, order_id
from wire import zoo
from wire.spec import encode
from wire.spool import Spool

NAMES = ("d1", "d2", "d3", "d4", "d5")


def fleet_where_only_one_holds_the_model(able: str) -> Fleet:
    fleet = Fleet()
    for name in NAMES:
        presence = a_presence(name, 1)
        caps = replace(presence.caps, bytes_budget=1 << 30 if name == able else 1 << 10)
        fleet, _ = fleet.present(replace(presence, caps=caps), 0.0)
    return fleet


def test_others_are_drawn_until_one_can_take_part(tmp_path):
    spec = zoo.load("digits-mlp")
    spool = Spool(tmp_path / "spool")
    with closing(Journal(tmp_path / "journal")) as journal:
        ref = spool.add_bytes(encode(spec))
        config = Config(algo="fedavg", model=spec.name, rounds=3, seed=4, round=RoundConfig(select="random:1"))
        for able in NAMES:
            steps = Steps(config, Store(spool, journal, spec, ref), print)
            fleet, asked = fleet_where_only_one_holds_the_model(able), []
            for _ in range(60):
                task, outcome = steps.begin(Standing(), None, fleet, closing=False) or (None, None)
                asked += [device.name for device in task.devices]
                if outcome.drafts:
                    break
            assert asked[-1] == able
            assert [draft.device for draft in outcome.drafts] == [able]
            again, _ = Steps(config, Store(spool, journal, spec, ref), print).begin(
                Standing(), None, fleet, closing=False
            )
            assert [device.name for device in again.devices] == asked[:1], "a new round begins with its own draw"


def test_closing_is_told_what_every_turn_took(tmp_path):
    spec, fleet = zoo.load("digits-mlp"), fleet_where_only_one_holds_the_model("d1")
    spool = Spool(tmp_path / "spool")
    replies = [replace(a_reply(name, order_id(name, 1)), update=None) for name in ("d1", "d2")]
    current = open_round(1, RUN, {reply.device: reply.order for reply in replies}, quorum=None, seconds=60.0)
    current, _ = step(current, Issued(0.0))
    for seconds, reply in zip((7.5, 0.0), replies, strict=True):
        fleet = fleet.absorb(reply.device, reply.usage, 1000, seconds)
        current, _ = step(current, Arrived(reply.device, reply.order, reply))
    with closing(Journal(tmp_path / "journal")) as journal:
        config = Config(algo="fedavg", model=spec.name, rounds=3)
        steps = Steps(config, Store(spool, journal, spec, spool.add_bytes(encode(spec))), print)
        task, _ = steps.begin(Standing(), current, fleet, closing=True)
        assert task.turns == {"d1": 7.5, "d2": 0.0}
        assert steps.begin(Standing(), current, fleet, closing=False)[0].turns == {}


def test_the_device_of_initial_pruning_is_waited_for_and_another_one_found_at_last(tmp_path):
    spec, fleet = zoo.load("digits-mlp"), Fleet()
    for name in NAMES:
        presence = a_presence(name, 1)
        caps = replace(presence.caps, bytes_budget=1 << 30)
        fleet, _ = fleet.present(replace(presence, caps=caps), 0.0)
    spool, standing, asked = Spool(tmp_path / "spool"), Standing(), []
    with closing(Journal(tmp_path / "journal")) as journal:
        config = Config(algo="prunefl", model=spec.name, rounds=30, seed=4, round=RoundConfig(select="random:1"))
        for number in range(1, 9):
            store = Store(spool, journal, spec, spool.add_bytes(encode(spec)))
            task, outcome = Steps(config, store, print).begin(standing, None, fleet, closing=False)
            (draft,) = outcome.drafts
            asked.append(draft.device)
            assert sum(view.drawn for view in task.devices) == 1
            assert {view.name for view in task.devices} == set(NAMES), "the algorithm may want any of them"
            standing = replace(standing, state=outcome.state, done=number)  # as after a round that was abandoned
            if number == 2:
                fleet, _ = fleet.present(a_presence(asked[0], 1, "lost"), 0.0)
                assert asked[0] not in [device.name for device in fleet.online()]
    assert asked[:3] == asked[:1] * 3
    assert asked[3:6] == asked[3:4] * 3
    assert asked[3] != asked[0]
    assert asked[6:] == asked[6:7] * 2
