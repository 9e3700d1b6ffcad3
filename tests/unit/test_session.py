"""The device's table, row by row, and what must hold for any order of events."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime import session as table
from edge_runtime.session import (
    Acked,
    Again,
    Cancelled,
    Failed,
    Fetch,
    Fetched,
    Forget,
    Hold,
    Led,
    Met,
    Offer,
    Ordered,
    Promote,
    Push,
    Refuse,
    Session,
    Silence,
    Unmet,
    Work,
    Worked,
    step,
)
from tests.support.messages import RUN, a_reply, an_order, order_id
from wire.messages import Ack, Cancel, Lead, Refusal

BOOT = "5" * 16
OTHER = "2" * 16
IDLE = Session("d0", BOOT)
ORDER = an_order("d0", 3)
REPLY = a_reply("d0", ORDER.id, boot=BOOT)
FETCHING = step(IDLE, Ordered(ORDER))[0]
WORKING = step(FETCHING, Fetched(ORDER.id))[0]
OFFERING = step(WORKING, Worked(REPLY))[0]
FAILED = Failed(ORDER.id, "memory", "does not fit", 20, 10)
REFUSAL = Refusal(ORDER.id, "d0", BOOT, "memory", "does not fit", 20, 10)
REFUSING = step(WORKING, FAILED)[0]
WAITING = step(WORKING, Unmet())[0]
PHASES = {
    "idle": IDLE,
    "fetching": FETCHING,
    "working": WORKING,
    "waiting": WAITING,
    "offering": OFFERING,
    "refusing": REFUSING,
}
BUSY = [p for p in PHASES if p != "idle"]
TOLD = Session("d0", BOOT, run=RUN, ended=3)


def test_the_usual_way() -> None:
    assert [p.phase for p in PHASES.values()] == list(PHASES)
    assert step(IDLE, Ordered(ORDER)) == (FETCHING, (Fetch(ORDER),))
    assert step(FETCHING, Fetched(ORDER.id)) == (WORKING, (Work(ORDER),))
    assert step(WORKING, Worked(REPLY)) == (OFFERING, (Offer(REPLY),))
    assert step(OFFERING, Acked(Ack(ORDER.id, "more", b"\5"))) == (OFFERING, (Push(b"\5"),))
    assert step(OFFERING, Acked(Ack(ORDER.id, "committed"))) == (TOLD, (Promote(ORDER), Forget(ORDER.id)))


def test_only_what_is_being_worked_on_is_tried_again() -> None:
    assert step(WORKING, Again(ORDER.id)) == (WORKING, (Work(ORDER),))
    assert step(WORKING, Again("f" * 16)) == (WORKING, ())
    for phase in PHASES.keys() - {"working"}:
        assert step(PHASES[phase], Again(ORDER.id)) == (PHASES[phase], ())


@pytest.mark.parametrize("phase", ["fetching", "working", "waiting", "offering"])
def test_a_failure_is_refused_until_it_is_heard(phase: str) -> None:
    after, effects = step(PHASES[phase], FAILED)
    assert (after, effects) == (REFUSING, (Refuse(REFUSAL),))
    assert step(after, Acked(Ack(ORDER.id, "unwanted"))) == (TOLD, (Forget(ORDER.id),))


def test_the_same_order_again_is_answered_with_what_there_is() -> None:
    again = Ordered(ORDER)
    assert step(FETCHING, again) == (FETCHING, ())
    assert step(WORKING, again) == (WORKING, ())
    assert step(OFFERING, again) == (OFFERING, (Offer(REPLY),))
    assert step(REFUSING, again) == (REFUSING, (Refuse(REFUSAL),))


@pytest.mark.parametrize("phase", ["fetching", "working"])
def test_an_order_waits_for_the_owner_s_conditions(phase: str) -> None:
    waiting, effects = step(PHASES[phase], Unmet())
    assert (waiting, effects) == (WAITING, (Hold(ORDER.id),))
    assert step(waiting, Ordered(ORDER, "unplugged")) == (waiting, ())  # sent again: it is known
    assert step(waiting, Met()) == (FETCHING, (Fetch(ORDER),))


def test_conditions_change_nothing_else() -> None:
    for phase, session in PHASES.items():
        if phase != "waiting":
            assert step(session, Met()) == (session, ())
        if phase not in ("fetching", "working"):
            assert step(session, Unmet()) == (session, ())


def test_a_new_order_is_refused_while_a_condition_fails() -> None:
    after, effects = step(IDLE, Ordered(ORDER, "not now: unplugged"))
    refusal = Refusal(ORDER.id, "d0", BOOT, "busy", "not now: unplugged")
    assert (after.phase, after.order, effects) == ("refusing", ORDER, (Refuse(refusal),))
    newer = an_order("d0", 4)
    _, effects = step(WAITING, Ordered(newer, "hot"))
    assert effects == (Forget(ORDER.id), Refuse(Refusal(newer.id, "d0", BOOT, "busy", "hot")))
    assert step(TOLD, Ordered(ORDER, "hot")) == (TOLD, ())


@pytest.mark.parametrize("event", [Silence(), Led(Lead("online", BOOT, RUN))])
def test_silence_and_a_coordinator_that_comes_back_have_answers_said_again(event: table.Event) -> None:
    assert step(OFFERING, event) == (OFFERING, (Offer(REPLY),))
    assert step(REFUSING, event) == (REFUSING, (Refuse(REFUSAL),))
    assert all(step(PHASES[p], event) == (PHASES[p], ()) for p in ("idle", "fetching", "working"))


@pytest.mark.parametrize("phase", BUSY)
def test_a_newer_order_replaces_and_an_older_one_does_not(phase: str) -> None:
    newer, older = an_order("d0", 4), an_order("d0", 2)
    assert step(PHASES[phase], Ordered(older)) == (PHASES[phase], ())
    if phase == "offering":
        return
    after, effects = step(PHASES[phase], Ordered(newer))
    assert (after.phase, after.order, effects) == ("fetching", newer, (Forget(ORDER.id), Fetch(newer)))
    assert (after.reply, after.refusal) == (None, None)


def test_a_newer_order_waits_until_it_is_known_whether_the_answer_on_offer_was_counted() -> None:
    """The word may have been lost with a broker: a Keep that is dropped here has its residual sent twice."""
    newer, newest = Ordered(an_order("d0", 4)), Ordered(an_order("d0", 5))
    both, effects = step(OFFERING, newer)
    assert (both, effects) == (replace(OFFERING, following=newer), (Offer(REPLY),))
    assert step(both, newer) == (both, (Offer(REPLY),))
    fetching = replace(FETCHING, order=newer.order, run=RUN, ended=3)
    told = Acked(Ack(ORDER.id, "committed"))
    assert step(both, told) == (fetching, (Promote(ORDER), Forget(ORDER.id), Fetch(newer.order)))
    for unwanted in (Acked(Ack(ORDER.id, "unwanted")), Cancelled(Cancel(ORDER.id))):
        assert step(both, unwanted) == (fetching, (Forget(ORDER.id), Fetch(newer.order)))
    both, _ = step(both, newest)
    assert step(both, newer) == (both, (Offer(REPLY),))
    assert step(both, told)[0].order == newest.order
    assert step(both, Led(Lead("online", BOOT, OTHER))) == (IDLE, (Forget(ORDER.id),))
    refusing, _ = step(both, FAILED)  # the update's file was lost
    assert step(refusing, told)[0].order == newest.order
    for over in (Acked(Ack(newest.order.id, "unwanted")), Cancelled(Cancel(newest.order.id))):
        assert step(both, over) == (OFFERING, ()), "its round is over before it was begun"
    assert step(both, Acked(Ack(newer.order.id, "unwanted"))) == (both, ())


def test_an_order_that_waits_is_taken_up_as_the_owner_s_conditions_are_by_then() -> None:
    both, _ = step(OFFERING, Ordered(an_order("d0", 4)))
    unmet, effects = step(both, Unmet())
    assert effects == ()
    after, effects = step(unmet, Acked(Ack(ORDER.id, "committed")))
    assert (after.phase, [type(effect) for effect in effects]) == ("refusing", [Promote, Forget, Refuse])
    assert step(unmet, Met()) == (both, ())


@pytest.mark.parametrize("phase", BUSY)
def test_an_order_of_another_run_replaces_whatever_its_round(phase: str) -> None:
    other = replace(an_order("d0", 1), run=OTHER, id="9" * 16)
    assert step(PHASES[phase], Ordered(other))[0].order == other


@pytest.mark.parametrize("phase", BUSY)
def test_another_run_a_cancel_and_unwanted_end_it(phase: str) -> None:
    forget = (Forget(ORDER.id),)
    assert step(PHASES[phase], Led(Lead("online", BOOT, OTHER))) == (IDLE, forget)
    assert step(PHASES[phase], Cancelled(Cancel(ORDER.id))) == (TOLD, forget)
    assert step(PHASES[phase], Acked(Ack(ORDER.id, "unwanted"))) == (TOLD, forget)


@pytest.mark.parametrize("phase", BUSY)
def test_a_coordinator_that_leaves_ends_nothing(phase: str) -> None:
    assert step(PHASES[phase], Led(Lead("offline", BOOT, OTHER))) == (PHASES[phase], ())


def test_what_has_ended_is_not_done_again() -> None:
    """Also in a new life: run and round come from the Keep."""
    assert step(TOLD, Ordered(ORDER)) == (TOLD, ())
    assert step(TOLD, Ordered(an_order("d0", 2))) == (TOLD, ())
    assert step(TOLD, Ordered(an_order("d0", 4)))[0].phase == "fetching"
    assert step(TOLD, Ordered(replace(an_order("d0", 1), run=OTHER)))[0].phase == "fetching"


def test_an_earlier_life_s_answer_is_offered() -> None:
    recalled = IDLE.recalled(ORDER, REPLY)
    assert recalled == OFFERING
    assert step(recalled, Ordered(ORDER)) == (recalled, (Offer(REPLY),))


@pytest.mark.parametrize("phase", PHASES)
def test_words_on_other_orders_change_nothing(phase: str) -> None:
    other = order_id("d0", 9)
    events: list[table.Event] = [
        Fetched(other),
        Worked(a_reply("d0", other)),
        Failed(other, "crash", ""),
        Acked(Ack(other, "committed")),
        Acked(Ack(other, "unwanted")),
        Acked(Ack(other, "more")),
        Cancelled(Cancel(other)),
        Ordered(an_order("d1", 9)),
    ]
    for event in events:
        assert step(PHASES[phase], event) == (PHASES[phase], ())


@pytest.mark.parametrize(
    ("phase", "event"),
    [
        ("idle", Fetched(ORDER.id)),
        ("working", Fetched(ORDER.id)),
        ("offering", Fetched(ORDER.id)),
        ("fetching", Worked(REPLY)),
        ("offering", Worked(REPLY)),
        ("refusing", Worked(REPLY)),
        ("refusing", FAILED),
        ("fetching", Acked(Ack(ORDER.id, "more"))),
        ("refusing", Acked(Ack(ORDER.id, "more"))),
    ],
)
def test_late_words_of_our_own_change_nothing(phase: str, event: table.Event) -> None:
    assert step(PHASES[phase], event) == (PHASES[phase], ())


def orders() -> st.SearchStrategy[table.Event]:
    return st.builds(
        lambda number, run, unmet: Ordered(
            replace(an_order("d0", number), run=run, id=f"{number:015x}{run[0]}"), unmet
        ),
        st.integers(1, 3),
        st.sampled_from([RUN, OTHER]),
        st.sampled_from(["", "hot"]),
    )


IDS = st.builds(lambda number, run: f"{number:015x}{run[0]}", st.integers(1, 3), st.sampled_from([RUN, OTHER]))
EVENTS = st.one_of(
    orders(),
    st.builds(Fetched, IDS),
    st.builds(lambda i: Worked(a_reply("d0", i)), IDS),
    st.builds(lambda i: Failed(i, "crash", ""), IDS),
    st.builds(lambda i, s: Acked(Ack(i, s)), IDS, st.sampled_from(["more", "committed", "unwanted"])),
    st.builds(lambda i: Cancelled(Cancel(i)), IDS),
    st.builds(lambda run: Led(Lead("online", BOOT, run)), st.sampled_from([RUN, OTHER])),
    st.sampled_from([Silence(), Unmet(), Met()]),
)


@given(st.lists(EVENTS, max_size=40))
def test_any_order_of_events_keeps_the_promises(events: list[table.Event]) -> None:
    session, open_order, promoted = IDLE, "", []
    for event in events:
        before = session
        session, effects = step(session, event)
        assert (session.phase == "idle") == (session.order is None)
        assert (session.phase == "offering") == (session.reply is not None)
        assert (session.phase == "refusing") == (session.refusal is not None)
        for effect in effects:
            if isinstance(effect, Forget):
                assert effect.order == open_order  # exactly what was begun is dropped, and before anything new begins
                open_order = ""
            elif isinstance(effect, Fetch):
                assert not open_order or (before.phase == "waiting" and effect.order == before.order)
                open_order = effect.order.id
            elif isinstance(effect, Refuse) and isinstance(event, Ordered) and event.unmet:
                open_order = effect.refusal.order  # it never began
            elif isinstance(effect, Promote):
                assert effect.order == before.order
                promoted.append((effect.order.run, effect.order.round))
            elif isinstance(effect, Work):
                assert effect.order.id == open_order
        assert open_order == (session.order.id if session.order else "")
    for run in (RUN, OTHER):
        rounds = [number for r, number in promoted if r == run]
        if not any(r != run for r, _ in promoted):
            assert rounds == sorted(set(rounds))  # nothing counts twice within a run


def test_the_docstring_names_every_event_and_effect() -> None:
    told = table.__doc__ or ""
    for kind in (*get_args(table.Event), *get_args(table.Effect)):
        assert re.search(rf"`{kind.__name__}`", told), kind
