"""The round as a fold: every cell of its two tables, and its laws over random events."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.round import (
    Abandon,
    Arm,
    Arrived,
    Born,
    Close,
    Deadline,
    Event,
    Issued,
    Lost,
    Refused,
    Resumed,
    Round,
    Send,
    Settle,
    Stopped,
    Unwanted,
    departed,
    interrupted,
    open_round,
    step,
    word,
)
from tests.support.messages import RUN, a_refusal, a_reply, order_id


def orders(count: int, number: int = 1) -> dict[str, str]:
    return {f"d{i}": order_id(f"d{i}", number) for i in range(count)}


def opened(count: int = 3, *, quorum: int | None = None, seconds: float = 60.0) -> Round:
    return step(open_round(1, RUN, orders(count), quorum=quorum, seconds=seconds), Issued(100.0))[0]


def arrived(i: int, number: int = 1) -> Arrived:
    device = f"d{i}"
    return Arrived(device, order_id(device, number), a_reply(device, order_id(device, number)))


def refused(i: int, number: int = 1) -> Refused:
    device = f"d{i}"
    return Refused(device, order_id(device, number), a_refusal(device, order_id(device, number)))


def run(current: Round, *events: Event) -> tuple[Round, list[object]]:
    effects: list[object] = []
    for event in events:
        current, more = step(current, event)
        effects += more
    return current, effects


def o(i: int) -> tuple[str, str]:
    return f"d{i}", order_id(f"d{i}", 1)


def test_issue_arms_and_sends_in_the_order_of_names() -> None:
    current, effects = run(open_round(1, RUN, orders(3), quorum=None, seconds=60.0), Issued(100.0))
    assert effects == [Arm(160.0), Send(*o(0)), Send(*o(1)), Send(*o(2))]
    assert (current.phase, current.deadline, current.quorum) == ("open", 160.0, 3)
    assert run(current, Issued(500.0)) == (current, [])


def test_nothing_but_issue_and_stop_moves_a_planned_round() -> None:
    planned = open_round(1, RUN, orders(2), quorum=None, seconds=60.0)
    for event in (Lost("d0", 1), Born("d0", 1), Deadline(1e9), Resumed(1.0)):
        assert step(planned, event) == (planned, ())
    assert step(planned, arrived(0)) == (planned, (Unwanted(*o(0)),))
    assert step(planned, Stopped("why"))[1] == (Abandon("why"), Unwanted(*o(0)), Unwanted(*o(1)))


@pytest.mark.parametrize(
    ("before", "event", "state", "effect"),
    [
        ("asked", arrived(0), "arrived", Settle(*o(0))),
        ("lost", arrived(0), "arrived", Settle(*o(0))),
        ("asked", refused(0), "refused", Unwanted(*o(0))),
        ("lost", refused(0), "refused", Unwanted(*o(0))),
        ("asked", Lost("d0", 5), "lost", None),
        ("asked", Lost("d0", 4), "asked", None),
        ("asked", Born("d0", 5), "asked", Send(*o(0))),
        ("asked", Born("d0", 4), "asked", None),
        ("lost", Born("d0", 5), "asked", Send(*o(0))),
        ("lost", Born("d0", 6), "asked", Send(*o(0))),
        ("lost", Born("d0", 4), "lost", None),
        ("lost", Lost("d0", 5), "lost", None),
        ("arrived", arrived(0), "arrived", Settle(*o(0))),
        ("arrived", refused(0), "arrived", Settle(*o(0))),
        ("arrived", Born("d0", 6), "arrived", Settle(*o(0))),
        ("arrived", Lost("d0", 6), "arrived", None),
        ("refused", arrived(0), "refused", Unwanted(*o(0))),
        ("refused", refused(0), "refused", Unwanted(*o(0))),
        ("refused", Born("d0", 6), "refused", Unwanted(*o(0))),
        ("refused", Lost("d0", 6), "refused", None),
        ("asked", Arrived("d0", order_id("d0", 9), a_reply("d0", order_id("d0", 9))), "asked", "other order"),
    ],
)
def test_every_cell_of_the_table_of_seats(before: str, event: Event, state: str, effect: object) -> None:
    way = {"asked": (), "lost": (Lost("d0", 5),), "arrived": (arrived(0),), "refused": (refused(0),)}[before]
    current, _ = run(opened(), Born("d0", 5), *way)
    assert current.seats["d0"].state == before
    after, effects = step(current, event)
    assert after.seats["d0"].state == state
    if effect == "other order":
        effect = Unwanted("d0", order_id("d0", 9))
    assert effects == (() if effect is None else (effect,))
    counts = {s: sum(seat.state == s for seat in after.seats.values()) for s in ("arrived", "refused", "lost")}
    assert counts == {"arrived": after.arrived, "refused": after.refused, "lost": after.lost}


def test_an_event_that_changes_nothing_gives_the_same_object() -> None:
    current, _ = run(opened(), arrived(0), Lost("d1", 2))
    for event in (arrived(0), refused(0), Lost("d1", 2), Lost("d1", 1), Born("stranger", 1), Deadline(101.0)):
        assert step(current, event)[0] is current


def test_a_second_reply_does_not_replace_the_first() -> None:
    current, _ = run(opened(), arrived(0))
    other = Arrived("d0", order_id("d0", 1), a_reply("d0", order_id("d0", 1), samples=7))
    assert step(current, other)[0].replies == (arrived(0).reply,)


def test_all_settled_closes_with_the_replies_sorted() -> None:
    current, effects = run(opened(), arrived(2), arrived(0), refused(1))
    assert effects == [Settle(*o(2)), Settle(*o(0)), Unwanted(*o(1)), Close(("d0", "d2"))]
    assert current.phase == "closed"
    assert [r.device for r in current.replies] == ["d0", "d2"]


def test_all_refused_is_abandoned() -> None:
    current, effects = run(opened(2), refused(0), refused(1))
    assert effects[-1] == Abandon("all 2 devices refused")
    assert current.phase == "abandoned"


def test_nobody_to_ask_is_abandoned_at_once() -> None:
    assert step(open_round(1, RUN, {}, quorum=None, seconds=1.0), Issued(0.0))[1][-1] == Abandon(
        "there is no device to ask"
    )


def test_with_quorum_the_loss_of_the_rest_closes() -> None:
    current, effects = run(opened(3, quorum=2), Lost("d2", 1), arrived(0))
    assert current.phase == "open"
    current, effects = run(current, arrived(1))
    assert effects == [Settle(*o(1)), Close(("d0", "d1")), Unwanted(*o(2))]


def test_without_quorum_the_loss_of_the_rest_waits_for_the_deadline() -> None:
    current, _ = run(opened(3), arrived(0), arrived(1), Lost("d2", 1))
    assert current.phase == "open"
    early, effects = run(current, Deadline(159.9))
    assert (early, effects) == (current, [Arm(160.0)])
    _, effects = run(current, Deadline(160.0))
    assert effects == [Abandon("2 of 3 needed replies at the deadline, 1 devices lost"), Unwanted(*o(2))]


def test_quorum_at_the_deadline_closes_and_sends_the_rest_away() -> None:
    current, effects = run(opened(3, quorum=1), arrived(1), Deadline(160.0))
    assert effects[1:] == [Close(("d1",)), Unwanted(*o(0)), Unwanted(*o(2))]
    assert run(current, Deadline(170.0), Stopped()) == (current, [])


def test_a_refusal_lowers_the_quorum_to_what_can_still_arrive() -> None:
    _, effects = run(opened(3), refused(0), arrived(1), Lost("d2", 1), Deadline(160.0))
    assert effects[-2] == Abandon("1 of 2 needed replies at the deadline, 1 devices lost")
    _, effects = run(opened(3, quorum=2), refused(0), refused(2), arrived(1))
    assert effects[-1] == Close(("d1",))


def test_who_was_taken_back_is_not_waited_for() -> None:
    current, _ = run(opened(5), arrived(0), arrived(1), refused(2), Lost("d3", 1))
    gone = departed(current, {"d0"}.__contains__)
    assert [(type(event), event.device, event.order) for event in gone] == [(Refused, *o(3)), (Refused, *o(4))]
    one, effects = run(current, *departed(current, {"d4"}.__contains__))
    assert (effects, one.phase, one.seats["d3"].state) == ([Unwanted(*o(3))], "open", "refused")
    assert departed(one, {"d4"}.__contains__) == (), "it is told once"
    assert step(one, arrived(3)) == (one, (Unwanted(*o(3)),))
    assert (step(one, Born("d3", 9))[1], word(one, *o(3))) == ((Unwanted(*o(3)),), "unwanted")
    closed, effects = run(current, *gone)
    assert effects == [Unwanted(*o(3)), Unwanted(*o(4)), Close(("d0", "d1"))]
    nobody, _ = run(opened(2), *departed(opened(2), set[str]().__contains__))
    assert nobody.phase == "abandoned"
    for other in (None, open_round(1, RUN, orders(2), quorum=None, seconds=60.0), closed):
        assert departed(other, set[str]().__contains__) == ()


def test_a_turn_in_which_a_device_was_away_is_no_turn() -> None:
    current, _ = run(opened(3), Lost("d0", 1), Born("d0", 2), Lost("d1", 1))
    assert [interrupted(current, device) for device in ("d0", "d1", "d2", "d9")] == [True, True, False, False]
    assert not interrupted(None, "d0")


def test_no_reply_at_all_never_closes() -> None:
    _, effects = run(opened(2, quorum=0), Lost("d0", 1), Lost("d1", 1), Deadline(160.0))
    assert isinstance(effects[0], Abandon)


def test_after_the_end_arrived_is_committed_and_all_else_unwanted() -> None:
    current, _ = run(opened(3, quorum=1), arrived(1), refused(2), Deadline(160.0))
    assert step(current, arrived(0)) == (current, (Unwanted(*o(0)),))
    assert step(current, refused(0)) == (current, (Unwanted(*o(0)),))
    assert step(current, Born("d0", 3)) == (current, (Unwanted(*o(0)),))
    assert step(current, arrived(1)) == (current, (Settle(*o(1)),))
    assert step(current, Born("d1", 3)) == (current, (Settle(*o(1)),))
    assert step(current, arrived(2)) == (current, (Unwanted(*o(2)),))
    assert step(current, Lost("d0", 3)) == (current, ())
    assert [word(current, *o(i)) for i in range(3)] == ["unwanted", "committed", "unwanted"]


def test_a_lost_receipt_is_repeated_in_later_rounds() -> None:
    first, _ = run(opened(2), arrived(0), arrived(1))
    second = open_round(2, RUN, orders(1, 2), quorum=None, seconds=60.0, earlier=first)
    second, _ = run(second, Issued(200.0), arrived(0, 2))
    third, _ = run(open_round(3, RUN, orders(2, 3), quorum=None, seconds=60.0, earlier=second), Issued(300.0))
    assert step(third, arrived(1))[1] == (Settle(*o(1)),)
    assert word(third, *o(1)) == "committed"
    assert step(third, arrived(0))[1] == (Unwanted(*o(0)),)  # it has had a later order counted since
    assert word(third, "d0", order_id("d0", 2)) == "committed"


def test_word_before_and_while() -> None:
    current, _ = run(opened(2), Lost("d1", 1))
    assert word(current, *o(0)) == word(current, *o(1)) == "more"
    assert word(current, "d0", order_id("d0", 8)) == word(current, "stranger", o(0)[1]) == "unwanted"
    assert word(open_round(1, RUN, orders(1), quorum=None, seconds=1.0), *o(0)) == "unwanted"


def test_resumed_repeats_what_may_not_have_happened() -> None:
    current, _ = run(opened(3), arrived(0), Lost("d1", 1))
    current, effects = run(current, Resumed(1000.0))
    assert effects == [Arm(1060.0), Send(*o(2))]
    closed, _ = run(opened(2, quorum=1), arrived(0), Deadline(160.0))
    assert step(closed, Resumed(1000.0)) == (closed, (Close(("d0",)), Unwanted(*o(1))))
    left, _ = run(opened(2), Stopped())
    after, effects_left = step(left, Resumed(1.0))
    assert after is left
    assert isinstance(effects_left[0], Abandon)


def test_strangers_have_no_effect_on_anybody_else() -> None:
    current = opened(2)
    for event in (
        Arrived("eve", o(0)[1], a_reply("eve", o(0)[1])),
        Refused("eve", o(0)[1], a_refusal("eve", o(0)[1])),
        Born("eve", 1),
        Lost("eve", 1),
    ):
        after, effects = step(current, event)
        assert after is current
        assert all(isinstance(e, Unwanted) and e.device == "eve" for e in effects)


EVENTS = st.one_of(
    st.builds(arrived, st.integers(0, 4), st.integers(1, 2)),
    st.builds(refused, st.integers(0, 4), st.integers(1, 2)),
    st.builds(Lost, st.sampled_from([f"d{i}" for i in range(5)]), st.integers(1, 3)),
    st.builds(Born, st.sampled_from([f"d{i}" for i in range(5)]), st.integers(1, 3)),
    st.builds(Deadline, st.sampled_from([120.0, 160.0])),
    st.just(Stopped()),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(EVENTS, max_size=40), st.integers(0, 4))
def test_laws(events: list[Event], quorum: int) -> None:
    current = opened(4, quorum=quorum)
    outcomes: list[Close | Abandon] = []
    said: dict[tuple[str, str], type] = {}
    kept = []
    for event in [*events, Deadline(160.0)]:
        before = current
        current, effects = step(current, event)
        if current is not before:
            kept.append(event)
            assert not before.over
        for effect in effects:
            if isinstance(effect, Close | Abandon):
                outcomes.append(effect)
            elif isinstance(effect, Settle | Unwanted):
                assert said.setdefault((effect.device, effect.order), type(effect)) is type(effect)
    assert len(outcomes) == 1
    assert current.over
    counted = {d for d, seat in current.seats.items() if seat.state == "arrived"}
    assert counted == {d for (d, order), kind in said.items() if kind is Settle}
    if isinstance(outcomes[0], Close):
        assert set(outcomes[0].devices) == counted
    again = opened(4, quorum=quorum)
    for event in kept:
        again, _ = step(again, event)
    assert again == current


def test_the_order_of_arrivals_does_not_matter() -> None:
    results = [run(opened(4), *(arrived(i) for i in p))[0].replies for p in itertools.permutations(range(4))]
    assert all(replies == results[0] for replies in results)


def test_cost_per_event_does_not_grow_with_the_fleet() -> None:
    """Counts visited seats, not time: a step on a large round must not iterate over its seats."""
    large = opened(2000)

    class Counting:
        def __init__(self, seats: object) -> None:
            self.seats = seats

        def __len__(self) -> int:
            return len(self.seats)  # type: ignore[arg-type]  # a Map

        def get(self, key: str) -> object:
            return self.seats.get(key)  # type: ignore[attr-defined]  # a Map

        def set(self, key: str, value: object) -> object:
            return Counting(self.seats.set(key, value))  # type: ignore[attr-defined]  # a Map

    current = replace(large, seats=Counting(large.seats))  # type: ignore[arg-type]  # a stand-in that cannot iterate
    for event in (Born("d7", 1), Lost("d7", 1), arrived(7), refused(8), arrived(7), Deadline(1.0)):
        current, _ = step(current, event)
    assert (current.arrived, current.refused) == (1, 1)
