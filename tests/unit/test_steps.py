"""The server's way to `advance`: who is asked for a round that nobody could take part in; the children that do the work."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from queue import Queue
from types import SimpleNamespace

import psutil
import pytest

from coordinator.advance import Task
from coordinator.algorithm import DeviceView
from coordinator.config import Config, RoundConfig
from coordinator.events import Arrived, Issued
from coordinator.fleet import Fleet
from coordinator.journal import Journal
from coordinator.round import open_round, step
from coordinator.server import Server
from coordinator.standing import Standing
from coordinator.steps import Step, Steps, Store
from tests.support.messages import RUN, a_presence, a_reply, order_id
from wire import zoo
from wire.child import Ended, Said
from wire.errors import ConfigError, StoreError, TooLarge
from wire.job import STEP_BYTES, Progress, read_frame, write_frame
from wire.spec import ModelSpec, Structure, encode
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

    def __init__(self, folder: Path, journal: Journal, spec: ModelSpec, params: dict[str, float | str] | None = None):
        self.spool = Spool(folder / "spool")
        self.store = Store(self.spool, journal, spec, self.spool.add_bytes(encode(spec)))
        self.config = Config(algo="fedavg", model=spec.name, rounds=9, params=params or {})
        self.heard: Queue[Said | Ended] = Queue()
        self.steps = Steps(self.config, self.store, self.heard.put)
        self.fleet = fleet_where_only_one_holds_the_model("d1")

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
    found = set()
    for process in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # and of a zombie
            found |= {process.pid} if "coordinator.advance" in process.cmdline() else set()
    return found


LARGE = zoo.mlp("large", (1, 8, 8), 10, (1024, 1024))


def test_a_child_is_ready_before_it_is_needed_and_does_one_step(tmp_path):
    with closing(Journal(tmp_path / "journal")) as journal:
        large = Large(tmp_path, journal, LARGE)
        before = children()
        large.steps.ready()
        large.steps.ready()
        (ready,) = children() - before
        _, outcome = large.planned()
        assert outcome.state
        assert not large.steps.busy
        ended = large.heard.get(timeout=10.0)
        assert (type(ended), ended.pid) == (Ended, ready)
        assert large.steps.take(ended) is None
        assert children() == before
        assert large.planned()[1].state == outcome.state, "another child, which was not ready, says the same"
        assert type(large.heard.get(timeout=10.0)) is Ended
        large.steps.ready()
        large.steps.stop()
        assert children() == before


def test_a_child_that_died_while_it_waited_is_replaced(tmp_path):
    with closing(Journal(tmp_path / "journal")) as journal:
        large = Large(tmp_path, journal, LARGE)
        before = children()
        for told in (True, False):
            large.steps.ready()
            (ready,) = children() - before
            os.kill(ready, signal.SIGKILL)
            ended = large.heard.get(timeout=10.0)
            assert (type(ended), ended.pid) == (Ended, ready)
            if told:
                assert large.steps.take(ended) is None
                large.steps.ready()
                (again,) = children() - before
                assert again != ready
            assert large.planned()[1].state, "also where its end is only found on giving it the task"
            while type(large.heard.get(timeout=10.0)) is not Ended:
                pass
        large.steps.stop()
        assert children() == before


def test_a_small_model_has_no_child_but_where_its_updates_are_large(tmp_path):
    with closing(Journal(tmp_path / "journal")) as journal:
        small = Large(tmp_path, journal, zoo.load("digits-mlp"))
        before = children()
        small.steps.ready()
        assert children() == before
        _, outcome = small.steps.begin(Standing(), None, small.fleet, closing=False)
        reply = replace(a_reply("d1", order_id("d1", 1)), structure=Structure(), samples=0)
        reply = replace(reply, update=replace(reply.update, size=5 << 20))
        current = open_round(1, RUN, {"d1": reply.order}, quorum=None, seconds=60.0)
        current, _ = step(step(current, Issued(0.0))[0], Arrived("d1", reply.order, reply))
        assert small.steps.begin(Standing(state=outcome.state), current, small.fleet, closing=True) is None
        with pytest.raises(StoreError, match="failed"):
            small.taken()  # there is no such update
        assert type(small.heard.get(timeout=10.0)) is Ended
        small.steps.ready()
        assert len(children() - before) == 1
        assert small.steps.begin(Standing(), None, small.fleet, closing=False) is not None
        assert type(small.heard.get(timeout=10.0)) is Ended, "what nothing is left for is let go"
        assert children() == before


def test_a_child_is_asked_for_when_an_update_is_offered(tmp_path):
    with closing(Journal(tmp_path / "journal")) as journal:
        large, here, asked = Large(tmp_path, journal, LARGE), [False], []
        uploads = SimpleNamespace(offer=lambda reply, now: here.pop())
        mail = SimpleNamespace(link=SimpleNamespace(post=print), uploads=uploads)
        server = Server(large.config, large.store, Standing(), mail, None)
        reply = replace(a_reply("d1", order_id("d1", 1)), structure=Structure())
        current = open_round(1, RUN, {"d1": reply.order}, quorum=None, seconds=60.0)
        server._round, server._steps = step(current, Issued(0.0))[0], SimpleNamespace(ready=lambda: asked.append(1))
        server._offered("d2", reply)
        assert not asked, "an answer in another's name"
        server._offered("d1", reply)
        assert asked == [1]


def test_a_task_may_have_ten_thousand_devices():
    reply = replace(a_reply("d1", order_id("d1", 1)), metrics={f"seconds.layer{i}.weight": 0.125 for i in range(20)})
    names = [f"raspberry-pi-of-the-greenhouse-{i}" for i in range(10_000)]
    devices = tuple(DeviceView(name, 1 << 30, 100) for name in names)
    task = Task("spool", "0" * 64, "fedavg", {}, {}, 0, "", tuple(replace(reply, device=n) for n in names), 1, devices)
    stream = io.BytesIO()
    write_frame(stream, task, STEP_BYTES)
    assert stream.tell() < STEP_BYTES / 2
    stream.seek(0)
    assert read_frame(stream, (Task,), STEP_BYTES) == task
    with pytest.raises(TooLarge):
        write_frame(io.BytesIO(), task)


def test_ctrl_c_is_the_coordinators_business(tmp_path):
    with closing(Journal(tmp_path / "journal")) as journal:
        large = Large(tmp_path, journal, LARGE)
        before = children()
        large.steps.ready()
        (ready,) = children() - before
        deadline = time.monotonic() + 30.0
        while not int(re.search(r"SigIgn:\s*(\w+)", Path(f"/proc/{ready}/status").read_text())[1], 16) & 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(ready, signal.SIGINT)
        assert large.planned()[1].state
        large.steps.stop()


def test_parameters_that_cannot_be_are_the_configurations_fault_for_a_large_model_as_for_a_small_one(tmp_path):
    said = []
    for spec in (zoo.load("linear"), LARGE):
        with closing(Journal(tmp_path / spec.name)) as journal:
            steps = Large(tmp_path / f"{spec.name}-home", journal, spec, {"width": -1.0})
            with pytest.raises(ConfigError) as caught:
                steps.planned() if spec is LARGE else steps.steps.begin(Standing(), None, steps.fleet, closing=False)
            said.append(str(caught.value))
            assert not steps.steps.busy
    assert said[0] == said[1]


def test_a_child_whose_coordinator_is_gone_ends_without_a_word():
    words = [sys.executable, "-m", "coordinator.advance", "fedavg"]
    child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.close()
    write_frame(child.stdin, Progress(0.0, None, 0))  # no task: what it would say is that
    child.stdin.close()
    assert (child.stderr.read(), child.wait(10.0)) == (b"", 0)
    child.stderr.close()
