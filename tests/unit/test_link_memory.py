"""Links within one process: the same semantics as over a broker, on a virtual clock, the same again for the same seed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wire.link import Down, Message, Published, Up, Will
from wire.link.memory import Chaos, Hub, MemoryLink, _matches


def drain(link: MemoryLink, kind: type[Any] = object, *, done: bool = True) -> list[Any]:
    found = []
    while (event := link.next()) is not None:
        if isinstance(event, Message) and done:
            link.done(event)
        if isinstance(event, kind):
            found.append(event)
    return found


def settle(hub: Hub) -> None:
    while hub.step():
        pass


def started(hub: Hub, name: str, *topics: str, will: Will | None = None) -> MemoryLink:
    link = hub.link(name, will=will)
    link.subscribe(topics)
    link.start()
    settle(hub)
    return link


@pytest.mark.parametrize(
    ("wanted", "topic", "matches"),
    [
        ("a/b", "a/b", True),
        ("a/+", "a/b", True),
        ("a/+", "a/b/c", False),
        ("a/+", "a", False),
        ("a/#", "a/b/c", True),
        ("a/#", "a", True),
        ("#", "a/b", True),
        ("+/+", "a/b", True),
        ("+", "a/b", False),
        ("a/+/c", "a/b/c", True),
        ("a/b/c", "a/b", False),
    ],
)
def test_wildcards(wanted: str, topic: str, matches: bool) -> None:
    assert _matches(wanted.split("/"), topic.split("/")) is matches


def test_a_message_goes_there_and_is_receipted() -> None:
    hub = Hub()
    a, b = started(hub, "a"), started(hub, "b", "t/+", "t/1", "t/#")
    number = a.publish("t/1", b"one")
    settle(hub)
    assert drain(a) == [Up(False), Published(number)]
    assert [(m.topic, m.payload, m.retained) for m in drain(b, Message)] == [("t/1", b"one", False)]
    assert (a.bytes_sent, b.bytes_received) == (6, 6)
    assert 0.0 < hub.now < 1.0


def test_retained_messages_come_on_subscribing_and_an_empty_one_deletes() -> None:
    hub = Hub()
    a = started(hub, "a")
    a.publish("t", b"kept", retain=True)
    a.publish("u", b"short", retain=True, seconds_expiry=10)
    settle(hub)
    b = started(hub, "b", "t", "u")
    assert {(m.payload, m.retained) for m in drain(b, Message)} == {(b"kept", True), (b"short", True)}
    a.publish("t", b"", retain=True)
    hub.run(hub.now + 11)
    assert [m.payload for m in drain(b, Message)] == [b""]
    c = started(hub, "c", "t", "u")
    assert drain(c, Message) == []
    b.unsubscribe(["u"])
    a.publish("u", b"again", retain=True)
    settle(hub)
    b.subscribe(["u"])
    settle(hub)
    assert [m.retained for m in drain(b, Message)] == [True]


def test_a_session_keeps_what_comes_while_its_client_is_away_for_a_time() -> None:
    hub = Hub()
    a, b = started(hub, "a"), started(hub, "b", "t")
    hub.cut("b", seconds=5.0)
    a.publish("t", b"1")
    hub.run(4.0)
    assert drain(b, Message) == []
    hub.run(6.0)
    events = drain(b)
    assert events[-2] == Up(True)
    assert events[-1].payload == b"1"
    hub.cut("b", seconds=4000.0)
    a.publish("t", b"2")
    settle(hub)
    assert drain(b)[-1] == Up(False)


def test_what_has_no_receipt_is_sent_again() -> None:
    hub = Hub()
    a, b = started(hub, "a"), started(hub, "b", "t")
    number = a.publish("t", b"1")
    hub.cut("a", seconds=1.0)
    late = a.publish("t", b"2")
    settle(hub)
    assert [e.id for e in drain(a, Published)] == [number, late]
    assert [m.payload for m in drain(b, Message)] == [b"1", b"2"]


def test_a_will_is_said_for_a_killed_client_and_not_for_a_polite_one() -> None:
    hub = Hub()
    watch = started(hub, "watch", "s/+")
    started(hub, "x", will=Will("s/x", b"lost"))
    hub.cut("x")
    settle(hub)
    polite = started(hub, "y", will=Will("s/y", b"lost"))
    polite.stop(("s/y", b"bye", True))
    settle(hub)
    assert [m.payload for m in drain(watch, Message)] == [b"lost", b"bye"]
    polite.post("late")
    assert drain(polite, str) == []


def test_a_new_process_of_the_same_name_takes_over_its_session() -> None:
    hub = Hub()
    a, b = started(hub, "a"), started(hub, "b", "t")
    again = hub.link("b")
    again.start()
    settle(hub)
    assert any(isinstance(e, Down) for e in drain(b))
    a.publish("t", b"1")
    settle(hub)
    assert drain(again)[0] == Up(True)
    a.publish("t", b"2")
    settle(hub)
    assert [m.payload for m in drain(again, Message)] == [b"2"]


def test_a_killed_broker_forgets_all_and_the_links_ask_again() -> None:
    hub = Hub()
    a, b = started(hub, "a"), started(hub, "b", "t", "w/#")
    a.publish("t", b"kept", retain=True)
    settle(hub)
    drain(b)
    hub.forget()
    settle(hub)
    assert [type(e) for e in drain(b)] == [Down, Up]
    a.publish("w/1", b"x")
    settle(hub)
    assert len(drain(b, Message)) == 1
    assert drain(started(hub, "c", "t"), Message) == []


def test_sixteen_undone_deliveries_hold_the_rest_back_and_come_again() -> None:
    hub = Hub()
    a, b = started(hub, "a"), started(hub, "b", "t")
    for i in range(40):
        a.publish("t", b"%d" % i)
    settle(hub)
    held = drain(b, Message, done=False)
    assert [int(m.payload) for m in held] == list(range(16))
    b.done(held[0])
    b.done(held[0])
    settle(hub)
    assert [int(m.payload) for m in drain(b, Message, done=False)] == [16]
    hub.cut("b", seconds=1.0)
    settle(hub)
    assert [int(m.payload) for m in drain(b, Message, done=False)] == list(range(1, 17))


BAD = Chaos(drop=0.1, duplicate=0.2, reorder=0.3, disconnect=0.05, seconds_delay=0.2, seconds_away=2.0)


def storm(seed: int, chaos: Chaos) -> tuple[list[str], list[int], float]:
    hub = Hub(seed, chaos)
    a, b = hub.link("a"), hub.link("b")
    b.subscribe(["t/#"])
    log: list[str] = []
    receipts: list[int] = []
    for link in (a, b):
        link.start()
    settle(hub)
    for i in range(60):
        a.publish(f"t/{i}", b"x")
    while hub.step():
        receipts += [e.id for e in drain(a, Published)]
        log += [e.topic for e in drain(b, Message)]
    return log, receipts, hub.now


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_a_storm_is_the_same_again_for_the_same_seed(seed: int) -> None:
    log, receipts, now = storm(seed, BAD)
    assert (log, receipts, now) == storm(seed, BAD)
    assert sorted(receipts) == list(range(1, 61))  # whatever happens, every publish gets one receipt


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_without_drops_everything_arrives_at_least_once(seed: int) -> None:
    log, _, _ = storm(seed, Chaos(duplicate=0.2, reorder=0.3, disconnect=0.05, seconds_away=2.0))
    assert set(log) == {f"t/{i}" for i in range(60)}


def test_a_good_network_keeps_the_order_and_repeats_nothing() -> None:
    log, receipts, _ = storm(7, Chaos(seconds_delay=0.5))
    assert log == [f"t/{i}" for i in range(60)]
    assert receipts == list(range(1, 61))
