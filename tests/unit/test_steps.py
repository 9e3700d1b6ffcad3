"""The server's way to `advance`: who is asked for a round that nobody could take part in."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

from coordinator.config import Config, RoundConfig
from coordinator.fleet import Fleet
from coordinator.journal import Journal
from coordinator.standing import Standing
from coordinator.steps import Steps, Store
from tests.support.messages import a_presence
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
