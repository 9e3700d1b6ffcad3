"""How the coordinator leads rounds that go badly: everybody refuses, uploads are cut off, the broker says no."""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors import safe_open

from coordinator import show, start, turn
from coordinator.blocks.initial import initial_weights
from coordinator.config import Config, RoundConfig
from coordinator.journal import Abandoned, Closed, Evaluated, Finished, Planned
from coordinator.mail import Mail
from coordinator.round import Issued, Refused, open_round, step
from tests.support.messages import a_refusal, a_reply, order_id
from tests.support.scripted import DEVICES, Queue, born, offered, ran, refused
from wire import zoo
from wire.link import Denied, Published
from wire.messages import BlobRef, Lead, Order
from wire.spec import Structure, tensor_shapes
from wire.spool import Spool
from wire.tensor import write_blob

DATA = bytes(range(250)) * 64
SHAPES = tensor_shapes(zoo.by_name("digits-mlp"), Structure())
UPDATE = BlobRef(hashlib.sha256(DATA).hexdigest(), len(DATA), 4000)


def round_of(*, refusals: int):
    current, _ = step(open_round(1, "0" * 16, {"a": "a" * 16, "b": "b" * 16}, quorum=None, seconds=1.0), Issued(0.0))
    for name in ("a", "b")[:refusals]:
        current, _ = step(current, Refused(name, name * 16, a_refusal(name, name * 16)))
    return current


def test_each_round_in_a_row_that_all_refuse_doubles_the_wait_for_the_next():
    pace = turn.Pace()
    waits = [pace.abandoned(10.0, round_of(refusals=2)) for _ in range(11)]
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 300.0, 300.0]
    assert pace.retry == 310.0
    assert pace.abandoned(400.0, round_of(refusals=1)) == 0.0, "one was away: the deadline has been a wait"
    assert pace.retry == 400.0
    assert pace.abandoned(500.0, round_of(refusals=2)) == 1.0


def test_devices_that_refuse_at_once_do_not_use_up_all_rounds(tmp_path, monkeypatch):
    monkeypatch.setattr(turn, "_SECONDS_VAIN", 0.2)
    began = time.monotonic()
    server, said = ran(tmp_path, refused, lambda *_: time.monotonic() > began + 1.0, rounds=100)
    assert server._standing.done <= 3, "at 0, 0.2 and 0.6 s"
    assert any("all 2 devices refused; the next one in 0 s" in line for line in said)
    assert any("there are no pictures in /data" in line for line in said), "whoever looks at it reads why"


def test_a_device_that_begins_anew_is_asked_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(turn, "_SECONDS_VAIN", 60.0)
    lives = dict.fromkeys(DEVICES, 1)

    def script(queue: Queue, order: Order) -> None:
        if order.round == 3:
            return
        refused(queue, order)
        if order.device == DEVICES[-1]:
            lives[order.device] += 1
            born(queue, order.device, lives[order.device])

    server, _ = ran(tmp_path, script, lambda server, _: server._standing.done == 2, rounds=3)
    assert server._standing.done == 2


def test_a_run_in_which_nobody_has_answered_leaves_no_model(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(turn, "_SECONDS_VAIN", 0.05)
    ran(tmp_path, refused, rounds=3)
    caplog.set_level(logging.INFO)
    config = Config(state=str(tmp_path), algo="fedavg", model="digits-mlp", rounds=3, round=RoundConfig(devices=2))
    assert start.start(config) == 4
    assert "no round was closed" in caplog.text
    assert not (tmp_path / "model.safetensors").exists()
    with start.Journal(tmp_path / start.JOURNAL) as journal:
        kinds = [type(entry.record) for entry in journal.replay()]
        assert kinds.count(Abandoned) == 3
        assert kinds[-1] is Finished
        assert not {Closed, Evaluated} & {*kinds}
        state = next(entry.record.state for entry in journal.replay() if isinstance(entry.record, Planned))
        journal.append([Closed(2, state, DEVICES)])
    assert start.start(config) == 0, "one is enough"
    assert (tmp_path / "model.safetensors").exists()


def moved(folder: Path):
    """A script in which all devices answer each order."""

    def script(queue: Queue, order: Order) -> None:
        moves = {n: np.full(shape, 1e-3 * order.round, np.float32) for n, shape in SHAPES.items()}
        offered(queue, order, write_blob(folder / "update", "update", moves), (folder / "update").read_bytes())

    return script


def test_fewer_rounds_than_a_run_has_begun_lead_the_open_one_to_its_end(tmp_path):
    def till_three(queue: Queue, order: Order) -> None:
        if order.round < 3:
            moved(tmp_path)(queue, order)

    begun, _ = ran(tmp_path / "s", till_three, lambda server, _: server._standing.done == 2, rounds=5)
    assert (begun._standing.done, begun._standing.settled) == (2, False)
    ended, _ = ran(tmp_path / "s", moved(tmp_path), rounds=2)
    assert (ended._standing.done, ended._standing.closed, ended._standing.settled) == (3, 3, True)
    assert ended._standing.finished


def test_the_model_of_a_run_that_another_replaces_is_kept_as_far_as_it_came(tmp_path):
    def till_three(queue: Queue, order: Order) -> None:
        if order.round < 3:
            moved(tmp_path)(queue, order)

    first, _ = ran(tmp_path / "s", till_three, lambda server, _: server._standing.done == 2, rounds=5)
    config = Config(state=str(tmp_path / "s"), algo="fedavg", model="digits-mlp", seed=1)
    store, standing = start.prepare(config, tmp_path / "s", instead=True)
    store.journal.close()
    assert standing.started.run != first._run
    (kept,) = (tmp_path / "s").glob("model*.safetensors")
    assert kept.name == f"model-{first._run}.safetensors"
    with safe_open(kept, "numpy") as file:
        assert file.metadata()["round"] == "2"
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    begun = initial_weights(zoo.by_name("digits-mlp"), 0)
    for name, array in found.items():
        np.testing.assert_allclose(array, begun[name] + np.float32(3e-3), rtol=1e-5, atol=1e-6)


def test_a_finished_run_goes_on_when_it_is_given_more_rounds(tmp_path):
    straight, _ = ran(tmp_path / "straight", moved(tmp_path), rounds=4)
    short, _ = ran(tmp_path / "parts", moved(tmp_path), rounds=2)
    assert (short._standing.finished, short._standing.done) == (True, 2)
    assert short._standing.state != straight._standing.state
    longer, _ = ran(tmp_path / "parts", moved(tmp_path), rounds=4)
    assert (longer._standing.finished, longer._standing.done, longer._standing.closed) == (True, 4, 4)
    assert longer._standing.state == straight._standing.state, "as if it had been so long from the beginning"
    assert longer._run == short._run
    view = show.read(tmp_path / "parts")
    assert (view.finished, sorted(view.rounds)) == (True, [1, 2, 3, 4])


# --- uploads that are cut off -----------------------------------------------------------------------------------------


def reply_of(device: str):
    return replace(a_reply(device, order_id(device, 1)), update=UPDATE)


def halves(spool: Spool) -> int:
    return len([*(spool.root / "partial").iterdir()])


def test_an_upload_that_the_deadline_cuts_off_leaves_nothing_behind(tmp_path):
    seen: list[int] = []

    def script(queue: Queue, order: Order) -> None:
        if order.device == "d1":
            offered(queue, order, UPDATE, DATA, pieces=2)

    def until(server, _):
        seen.append(halves(server._store.spool))
        return False

    server, said = ran(tmp_path, script, until, terms=RoundConfig(devices=2, seconds=0.5))
    assert any("0 of 2 needed replies at the deadline" in line for line in said)
    assert max(seen) > 0
    assert halves(server._store.spool) == 0
    assert not server._store.spool._open


def test_an_upload_that_another_device_brings_too_stays(tmp_path):
    mail = Mail(Queue(refused), Spool(tmp_path), "home", Lead("online", "1" * 16, "2" * 16, 20.0))
    one, two = (reply_of(name) for name in DEVICES)
    for reply in (one, two):
        assert not mail.uploads.offer(reply, 0.0)
    mail.uploads.piece(one.order, one.device, 0, DATA[:4000], 0.0)
    mail.uploads.drop(one.order)
    assert halves(Spool(tmp_path)) > 0
    for index in range(1, UPDATE.pieces):
        mail.uploads.piece(two.order, two.device, index, DATA[4000 * index : 4000 * (index + 1)], 0.0)
    assert mail.uploads.complete() == [two]


def test_an_offer_in_the_place_of_another_drops_what_was_half_here(tmp_path):
    mail = Mail(Queue(refused), Spool(tmp_path), "home", Lead("online", "1" * 16, "2" * 16, 20.0))
    reply = reply_of("d1")
    mail.uploads.offer(reply, 0.0)
    mail.uploads.piece(reply.order, "d1", 0, DATA[:4000], 0.0)
    other = replace(reply, update=BlobRef("e" * 64, 8000, 4000))
    mail.uploads.offer(other, 1.0)
    assert not [p for p in (tmp_path / "partial").iterdir() if p.name.startswith(UPDATE.digest)]
    assert {order: upload.reply for order, upload in mail.uploads._open.items()} == {reply.order: other}


def test_a_coordinator_that_comes_back_still_has_what_it_acknowledged(tmp_path):
    def script(queue: Queue, order: Order) -> None:
        if order.device == "d1":
            offered(queue, order, UPDATE, DATA, pieces=3)

    def until(server, _):
        return any(ack.state == "more" and ack.have for ack in server._mail.link.acks)

    def again(queue: Queue, order: Order) -> None:
        if order.device == "d1":
            for _ in range(2):
                offered(queue, order, UPDATE)

    first, _ = ran(tmp_path, script, until)
    assert sum(byte.bit_count() for byte in first._mail.link.acks[-1].have) == 3
    second, _ = ran(tmp_path, again, until)
    assert sum(byte.bit_count() for byte in second._mail.link.acks[-1].have) == 3


# --- the broker, and what devices write -------------------------------------------------------------------------------


def test_the_operator_reads_that_the_broker_says_no_once_a_minute(tmp_path, caplog):
    mail = Mail(Queue(refused), Spool(tmp_path), "home", Lead("online", "1" * 16, "2" * 16, 20.0))
    for second in range(120):
        mail.answered(Published(1), second)
        mail.answered(Published(2, "Not authorized"), second)
        mail.answered(Denied("e1/home/u/#", "Not authorized"), second)
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == [
        "the broker does not let this coordinator publish: Not authorized",
        "the broker does not let this coordinator read e1/home/u/#: Not authorized",
    ] * 2


def test_what_a_device_writes_is_one_line_of_the_log():
    said = logging.LogRecord(
        "coordinator", logging.INFO, "", 0, "device %s refuses: %s", ("pi", "x\n12:00 all\x1b[2J"), None
    )
    assert start._as_line(said)
    assert said.getMessage() == "device pi refuses: x?12:00 all?[2J"
