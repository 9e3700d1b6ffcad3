"""The server's way to `advance`: who is asked for a round that nobody could take part in; the children that do the work."""

from __future__ import annotations

import os
import signal
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from queue import Queue

import psutil

from coordinator.config import Config, RoundConfig
from coordinator.events import Arrived, Issued
from coordinator.fleet import Fleet
from coordinator.journal import Journal
from coordinator.round import open_round, step
from coordinator.standing import Standing
from coordinator.steps import Step, Steps, Store
from tests.support.messages import RUN, a_presence, a_reply, order_id
from wire import zoo
from wire.child import Ended, Said
from wire.spec import ModelSpec, encode
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


class Large:
    """Steps of a model that is too large to be worked on beside the broker's messages, and what their children say."""

    def __init__(self, folder: Path, journal: Journal, spec: ModelSpec) -> None:
        self.spool = Spool(folder / "spool")
        self.store = Store(self.spool, journal, spec, self.spool.add_bytes(encode(spec)))
        self.config = Config(algo="fedavg", model=spec.name, rounds=9)
        self.heard: Queue[Said | Ended] = Queue()
        self.steps = Steps(self.config, self.store, self.heard.put)
        self.fleet = fleet_where_only_one_holds_the_model("d1")
        self.reply = a_reply("d1", order_id("d1", 1))

    def planned(self) -> Step:
        """Begin a plan and take in what is said until it is there."""
        assert self.steps.begin(Standing(), None, self.fleet, closing=False) is None
        return self.taken()

    def taken(self) -> Step:
        while True:
            step = self.steps.take(self.heard.get(timeout=30.0))
            if step is not None:
                return step


def children() -> set[int]:
    return {process.pid for process in psutil.Process().children() if "coordinator.advance" in process.cmdline()}


LARGE = zoo.mlp("large", (1, 8, 8), 10, (1024, 1024))


def test_a_child_is_ready_before_it_is_needed_and_does_one_step(tmp_path):
    with closing(Journal(tmp_path / "journal")) as journal:
        large = Large(tmp_path, journal, LARGE)
        before = children()
        large.steps.ready(large.reply, 1)
        large.steps.ready(large.reply, 1)
        (ready,) = children() - before
        _, outcome = large.planned()
        assert outcome.state
        assert not large.steps.busy
        ended = large.heard.get(timeout=10.0)
        assert (type(ended), ended.pid) == (Ended, ready)
        assert large.steps.take(ended) is None
        assert children() == before
        assert large.planned()[1].state == outcome.state, "another child, which was not ready, says the same"
        large.steps.ready(large.reply, 1)
        large.steps.stop()
        assert children() == before


def test_a_child_that_died_while_it_waited_is_replaced(tmp_path):
    with closing(Journal(tmp_path / "journal")) as journal:
        large = Large(tmp_path, journal, LARGE)
        before = children()
        for told in (True, False):
            large.steps.ready(large.reply, 1)
            (ready,) = children() - before
            os.kill(ready, signal.SIGKILL)
            ended = large.heard.get(timeout=10.0)
            assert (type(ended), ended.pid) == (Ended, ready)
            if told:
                assert large.steps.take(ended) is None
                large.steps.ready(large.reply, 1)
                (again,) = children() - before
                assert again != ready
            assert large.planned()[1].state, "also where its end is only found on giving it the task"
            while type(large.heard.get(timeout=10.0)) is not Ended:
                pass
        large.steps.stop()
        assert children() == before


def test_a_small_model_has_no_child(tmp_path):
    with closing(Journal(tmp_path / "journal")) as journal:
        small = Large(tmp_path, journal, zoo.load("digits-mlp"))
        before = children()
        small.steps.ready(small.reply, 1)
        assert children() == before
        assert small.steps.begin(Standing(), None, small.fleet, closing=False) is not None
        small.steps.ready(replace(small.reply, update=replace(small.reply.update, size=3 << 20)), 2)
        assert len(children() - before) == 1, "two updates of three mebibytes are no small matter"
        small.steps.stop()
        assert children() == before
