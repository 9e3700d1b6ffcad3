"""What the coordinator's loop has decided and not yet done: what may wait, what must be durable."""

from __future__ import annotations

import pytest

from coordinator.events import Arrived, Lost
from coordinator.journal import Cleared, Closed, Evaluated
from coordinator.turn import SECONDS_GATHER, Pace, Turn
from tests.golden.cases import MESSAGES
from wire.messages import Ack
from wire.spool import Spool

REPLY = MESSAGES["reply"]
ARRIVED = Arrived("pi-1", REPLY.order, REPLY)
CLOSED = Closed(1, "ab" * 32, ("pi-1",), 1.0, 2, 3)
SETTLED = ("pi-1", Ack(REPLY.order, "committed"))


def test_answers_wait_for_each_other_but_not_for_long():
    turn = Turn(rows=[ARRIVED], sends=[SETTLED])
    assert turn.wait(10.0) == pytest.approx(SECONDS_GATHER)
    turn.rows.append(Cleared(("cd" * 32,)))
    assert turn.wait(10.04) == pytest.approx(SECONDS_GATHER - 0.04)
    assert turn.look(10.04, 0.25) == pytest.approx(SECONDS_GATHER - 0.04)
    assert turn.look(10.04, 0.01) == 0.01
    assert turn.wait(10.0 + SECONDS_GATHER) == 0.0
    assert turn.look(10.0 + SECONDS_GATHER, 0.25) == 0.0, "what is due is not slept over"


@pytest.mark.parametrize(
    ("rows", "sends"),
    [
        ([], []),
        ([], [("pi-1", Ack(REPLY.order, "unwanted"))]),
        ([ARRIVED], [SETTLED, ("pi-1", Ack(REPLY.order, "more"))]),
        ([ARRIVED, CLOSED], [SETTLED]),
        ([ARRIVED, Lost("pi-2", 3)], []),
        ([ARRIVED], [SETTLED, ("pi-2", MESSAGES["order"])]),
    ],
)
def test_what_somebody_waits_for_does_not_wait(rows, sends):
    assert Turn(rows=rows, sends=sends).wait(1.0) == 0.0


def test_an_empty_turn_looks_as_long_as_it_may():
    assert Turn().look(5.0, 0.25) == 0.25
    assert Turn(rows=[Evaluated(1, {})]).look(5.0, 0.25) == pytest.approx(SECONDS_GATHER)


def test_updates_are_flushed_unless_their_round_closes_with_them(tmp_path, monkeypatch):
    spool = Spool(tmp_path)
    update, state = spool.add_bytes(b"update"), spool.add_bytes(b"a state")
    flushed: list[str] = []
    monkeypatch.setattr(Spool, "sync", lambda _, digests: flushed.extend(digests))
    assert Turn(rows=[ARRIVED], updates=[update.digest]).make_durable(spool) == update.size
    assert flushed == [update.digest]
    flushed.clear()
    turn = Turn(rows=[ARRIVED, CLOSED], files=[state.digest], updates=[update.digest])
    assert turn.make_durable(spool) == update.size + state.size
    assert flushed == [state.digest]


def test_a_turn_that_an_earlier_life_began_has_no_known_length():
    pace = Pace(issued=5.0)
    assert pace.turn(7.5) == 2.5
    pace.issued = pace.resumed = 100.0
    assert pace.turn(100.1) == 0.0, "the device may have been at it for long"
    pace.issued = 101.0
    assert pace.turn(103.0) == 2.0
