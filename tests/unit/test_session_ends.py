"""Two ends of an order that the storm found: a late copy of an ended order, and an earlier life's reply that was counted."""

from __future__ import annotations

import pytest

from edge_runtime.session import Acked, Event, Failed, Fetched, Forget, Ordered, Promote, Session, Worked, step
from tests.support.messages import a_reply, an_order
from wire.messages import Ack

ORDER = an_order("d1", 3)
WORKED = Worked(a_reply("d1", ORDER.id))


def session_after(*events: Event) -> Session:
    session = Session("d1", "0" * 16)
    for event in events:
        session, _ = step(session, event)
    return session


def test_a_late_copy_of_an_ended_order_is_not_done_again() -> None:
    ended = session_after(Ordered(ORDER), Fetched(ORDER.id), WORKED, Acked(Ack(ORDER.id, "committed")))
    assert ended.phase == "idle"
    for late in (ORDER, an_order("d1", 2)):
        assert step(ended, Ordered(late)) == (ended, ())
    assert step(ended, Ordered(an_order("d1", 4)))[0].phase == "fetching"


@pytest.mark.parametrize(
    "events",
    [(), (Fetched(ORDER.id),), (Fetched(ORDER.id), WORKED), (Failed(ORDER.id, "memory", ""),)],
    ids=["fetching", "working", "offering", "refusing"],
)
def test_committed_ends_the_order_whatever_this_life_does(events: tuple[Event, ...]) -> None:
    session = session_after(Ordered(ORDER), *events)
    after, effects = step(session, Acked(Ack(ORDER.id, "committed")))
    assert after.phase == "idle"
    assert effects == (Promote(ORDER), Forget(ORDER.id))
