"""A real agent and a real worker over a real broker, led by a script: rounds, kills, losses, refusals."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.devices import Agent, Script, tensors
from tests.support.mosquitto import Mosquitto
from wire import topics
from wire.chunks import WINDOW_UP
from wire.messages import Ack, Beat, BlobRef, Cancel, Need, Presence, Recipe, Refusal, Reply


@pytest.fixture
def make(script: Script, broker: Mosquitto, tmp_path: Path) -> Callable[..., Agent]:
    def made(**changes: Any) -> Agent:
        return Agent(tmp_path / "agent", broker.port, script.federation, **changes)

    return made


@pytest.fixture
def agent(make: Callable[..., Agent]) -> Iterator[Agent]:
    made = make()
    with made:
        yield made
    print(made.log.read_text()[-3000:])


def online(script: Script, after: int = 0) -> Presence:
    return script.wait(Presence, where=lambda p: p.state == "online" and p.seq > after)


def test_a_round_from_birth_to_commit(script: Script, agent: Agent) -> None:
    born = online(script)
    assert born.caps is not None
    assert (born.caps.samples, born.caps.input_shape) == (28, (64,))
    order = script.order(1)
    script.send(order)
    upload = script.wait_update(order.id)
    assert upload.reply.update is not None
    assert hashlib.sha256(upload.data).hexdigest() == upload.reply.update.digest
    assert upload.reply.boot == born.boot
    assert all(not array.any() for array in tensors(upload.data, script.folder).values())
    script.commit(order.id)
    script.send(order)  # a late copy of what is over: nothing may come of it
    following = script.order(2)
    script.send(following)
    script.wait_update(following.id)
    assert [m for m in script.seen if isinstance(m, Reply) and m.order == order.id] != []
    assert agent.stop() == 0
    assert script.wait(Presence, where=lambda p: p.state == "bye").seq == born.seq


def test_training_keeps_the_personal_model_when_it_is_committed(script: Script, agent: Agent) -> None:
    online(script)
    order = script.order(1, recipe=Recipe(rule="sgd", epochs=2, batch=8, rate=0.1))
    script.send(order)
    upload = script.wait_update(order.id, 60)
    kept = agent.root / "state/keep" / script.federation / "sgd"
    assert upload.reply.keep
    assert not kept.exists()
    script.commit(order.id)
    script.until(kept.exists)
    assert hashlib.sha256(kept.read_bytes()).hexdigest() == upload.reply.keep
    update = tensors(upload.data, script.folder)
    assert np.abs(update["fc.weight" if "fc.weight" in update else min(update)]).sum() > 0
    script.until(lambda: not list((agent.root / "state/out").glob("*.update")))


def test_an_answer_whose_receipt_was_lost_is_offered_again_before_the_next_order_is_begun(
    script: Script, agent: Agent
) -> None:
    """A broker that was killed may have lost the receipt, and the next order be the first that is heard."""
    online(script)
    order = script.order(1, recipe=Recipe(rule="sgd", batch=8))
    script.send(order)
    upload = script.wait_update(order.id, 60)
    script.wait(Reply, where=lambda reply: reply.order == order.id)
    following = script.order(2)
    script.send(following)
    script.wait(Reply, where=lambda reply: reply.order == order.id)
    script.commit(order.id)
    script.wait(Reply, where=lambda reply: reply.order == following.id)
    kept = agent.root / "state/keep" / script.federation / "sgd"
    assert hashlib.sha256(kept.read_bytes()).hexdigest() == upload.reply.keep


def test_a_killed_agent_comes_back_with_a_higher_seq_and_its_answer(script: Script, agent: Agent) -> None:
    born = online(script)
    order = script.order(1)
    script.acks = False
    script.send(order)
    first = script.wait(Reply)
    agent.kill()
    assert script.wait(Presence, where=lambda p: p.state == "lost").seq == born.seq
    script.acks = True
    agent.start()
    again = script.wait(Reply, where=lambda r: r.boot != first.boot)
    assert again.update == first.update
    assert online(script, born.seq).boot == again.boot
    script.send(order)  # as at every birth
    script.wait_update(order.id)
    script.commit(order.id)
    following = script.order(2)
    script.send(following)
    script.wait_update(following.id)


def test_a_killed_worker_is_a_refusal_and_the_next_order_is_done(script: Script, agent: Agent) -> None:
    online(script)
    slow = script.order(1, model="digits-cnn", recipe=Recipe(rule="sgd", epochs=2000, batch=8))
    script.send(slow)
    script.until(lambda: bool(agent.workers()))
    script.wait(Beat, where=lambda b: b.order == slow.id)
    script.until((agent.root / "state/spool" / slow.shells[0].digest).exists)
    time.sleep(0.3)
    os.kill(agent.workers()[0], signal.SIGKILL)
    refusal = script.wait(Refusal)
    assert (refusal.order, refusal.reason) == (slow.id, "oom")
    script.send(Ack(slow.id, "unwanted"))
    order = script.order(2)
    script.send(order)
    script.wait_update(order.id)


def test_a_frozen_worker_is_reported_and_killed(script: Script, make: Callable[..., Agent]) -> None:
    with make(more="seconds_stall = 1.0") as agent:
        online(script)
        os.kill(agent.workers()[0], signal.SIGSTOP)
        order = script.order(1)
        script.send(order)
        assert script.wait(Refusal).reason == "stalled"
        script.send(Ack(order.id, "unwanted"))
        following = script.order(2)
        script.send(following)
        script.wait_update(following.id)


def test_too_little_memory_is_a_refusal_with_figures(script: Script, make: Callable[..., Agent]) -> None:
    with make(budget="9 MiB"):
        online(script)
        script.send(script.order(1, model="lenet-300-100", recipe=Recipe(rule="sgd", batch=32)))
        refusal = script.wait(Refusal)
        assert refusal.reason == "memory"
        assert refusal.bytes_needed > refusal.bytes_free == 9 << 20


def test_data_that_do_not_fit_the_model_are_a_refusal(script: Script, agent: Agent) -> None:
    online(script)
    script.send(script.order(1, model="lenet-300-100", recipe=Recipe(rule="sgd")))
    assert script.wait(Refusal, 60).reason == "data"
    assert agent.workers()


def test_a_newer_order_replaces_the_one_in_work(script: Script, agent: Agent) -> None:
    online(script)
    slow = script.order(1, model="digits-cnn", recipe=Recipe(rule="sgd", epochs=2000, batch=8))
    script.send(slow)
    script.wait(Beat, where=lambda b: b.order == slow.id)
    order = script.order(2)
    script.send(order)
    script.wait_update(order.id)
    script.send(replace(slow, id="f" * 16))  # an older round: not even looked at
    script.commit(order.id)
    script.turn(0.3)
    assert not [m for m in script.seen if isinstance(m, (Reply, Refusal)) and m.order != order.id]


def test_a_cancelled_order_ends_the_worker_that_trains_it(script: Script, agent: Agent) -> None:
    online(script)
    (worker,) = agent.workers()
    slow = script.order(1, model="digits-cnn", recipe=Recipe(rule="sgd", epochs=2000, batch=8))
    script.send(slow)
    script.wait(Beat, where=lambda b: b.order == slow.id)
    script.send(Cancel(slow.id))
    script.until(lambda: worker not in agent.workers())


def test_lost_pieces_of_an_upload_are_sent_again(script: Script, agent: Agent) -> None:
    online(script)
    gone: set[int] = set()

    def lose_a_few(index: int) -> bool:
        lost = index in (3, 4, 15) and index not in gone
        gone.add(index)
        return lost

    script.drop = lose_a_few
    order = script.order(1, model="digits-cnn")
    script.send(order)
    upload = script.wait_update(order.id, 40)
    assert upload.reply.update is not None
    assert upload.reply.update.pieces > 60
    assert hashlib.sha256(upload.data).hexdigest() == upload.reply.update.digest


def test_an_upload_goes_on_where_it_was(script: Script, agent: Agent) -> None:
    """A coordinator that comes back has some pieces; only the others travel again."""
    online(script)
    script.acks = False
    order = script.order(1, model="digits-cnn")
    script.send(order)
    script.wait(Reply)
    script.until(lambda: len(script.uploads[order.id].pieces) == WINDOW_UP)  # and no more without a word
    known = dict(script.uploads[order.id].pieces)
    script.acks = True
    script.uploads[order.id].sent = 0
    script.say_lead(boot="c1" * 8)
    upload = script.wait_update(order.id)
    assert upload.reply.update is not None
    assert upload.sent == upload.reply.update.pieces - len(known)


def test_a_missing_piece_is_asked_for(script: Script, agent: Agent) -> None:
    online(script)
    order = script.order(1, publish=False)
    spec = script.folder / "linear.spec"
    script.publish(spec, order.spec)
    script.send(order)
    need = script.wait(Need, 20)
    assert need.blob == order.shells[0].digest
    script.publish(script.file_of(order), order.shells[0])
    script.wait_update(order.id)


def test_a_download_goes_on_after_a_kill(script: Script, agent: Agent) -> None:
    born = online(script)
    order = script.order(1, model="digits-cnn", publish=False)
    path, ref = script.file_of(order, "digits-cnn"), order.shells[0]
    assert ref.pieces > 60
    script.publish(script.folder / "digits-cnn.spec", order.spec)
    script.publish(path, ref, skip=lambda index: index >= 40)
    script.send(order)
    partial = agent.root / "state/spool/partial" / f"{ref.digest}.have"
    script.until(lambda: partial.exists() and sum(b.bit_count() for b in partial.read_bytes()[16:]) >= 32)
    agent.kill()
    script.publish(path, ref, skip=lambda index: index < 32)
    for index in range(24):
        script.link.publish(topics.piece(script.federation, ref.digest, index), b"", retain=True)
    agent.start()
    online(script, born.seq)
    script.send(order)
    script.wait_update(order.id)
    assert not [m for m in script.seen if isinstance(m, Need)]


def test_wrong_bytes_end_in_a_refusal(script: Script, agent: Agent) -> None:
    online(script)
    order = script.order(1)
    false = BlobRef("e" * 64, order.shells[0].size)
    script.publish(script.file_of(order), false)
    script.send(replace(order, shells=(false,)))
    refusal = script.wait(Refusal, 30)
    assert refusal.reason == "data"
    assert "expected " + "e" * 64 in refusal.detail


def test_another_run_takes_over(script: Script, agent: Agent) -> None:
    online(script)
    order = script.order(7)
    script.acks = False
    script.send(order)
    script.wait(Reply)
    script.say_lead(boot="c2" * 8, run="cd" * 8)
    following = script.order(1)
    script.acks = True
    script.send(following)
    script.wait_update(following.id)
    script.say_lead(run="ab" * 8)


def test_a_broker_that_is_killed_in_between(tmp_path: Path) -> None:
    with (
        Mosquitto(tmp_path / "broker") as broker,
        Script(broker.port, tmp_path / "script") as script,
        Agent(tmp_path / "agent", broker.port),
    ):
        born = online(script)
        order = script.order(1, model="digits-cnn")
        script.send(order)
        script.wait(Reply)
        broker.kill()
        broker.start()
        online(script, born.seq - 1)
        script.send(order)  # as at every birth
        upload = script.wait_update(order.id, 40)
        assert upload.reply.update is not None
        assert hashlib.sha256(upload.data).hexdigest() == upload.reply.update.digest


def test_beats_come_at_half_the_keepalive(script: Script, agent: Agent) -> None:
    script.lead = replace(script.lead, keepalive=1.0)
    script.say_lead()
    online(script)
    script.wait(Beat)
    times = []
    for _ in range(4):
        script.wait(Beat)
        times.append(time.monotonic())
    assert all(0.2 < later - earlier < 1.5 for earlier, later in pairwise(times))
