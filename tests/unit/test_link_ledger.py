"""What a link remembers, without a socket; and how an address is read."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.keys.passwords import hashed, verify
from wire.errors import ConfigError
from wire.link import Address
from wire.link.ledger import Backoff, Inbox, Outbox, Parcel, Receipts, Wishes


def test_an_address_and_its_defaults() -> None:
    assert Address.parse("mqtt://host") == Address("host", 1883)
    assert Address.parse("mqtts://host") == Address("host", 8883, tls=True)
    assert Address.parse("mqtt://me:p%40ss@[::1]:1884/") == Address("::1", 1884, user="me", password="p@ss")
    assert str(Address.parse("mqtts://me:secret@[::1]:1884")) == "mqtts://[::1]:1884"
    assert "secret" not in repr(Address.parse("mqtt://me:secret@host"))


def test_a_password_file_counts_more(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("from file\n")
    parsed = Address.parse("mqtt://me:url@host", username="other", password_file=str(file))
    assert (parsed.user, parsed.password) == ("other", "from file")


@pytest.mark.parametrize(
    ("url", "more", "says"),
    [
        ("host:1883", {}, "mqtt://HOST"),
        ("http://host", {}, "mqtt://HOST"),
        ("mqtt://", {}, "mqtt://HOST"),
        ("mqtt://host:99999", {}, "Port"),
        ("mqtt://host:x", {}, "Port"),
        ("mqtt://host/path", {}, "mqtt://HOST"),
        ("mqtt://[::1", {}, "broker address"),
        ("mqtt://host", {"ca": "x"}, "mqtts://"),
        ("mqtts://host", {"key": "x"}, "cert"),
        ("mqtt://:secret@host", {}, "user name"),
        ("mqtt://host", {"username": "u", "password_file": "/nowhere"}, "/nowhere"),
        ("mqtt://me:secret@host:x", {}, "mqtt://..."),
    ],
)
def test_addresses_that_cannot_be(url: str, more: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Address.parse(url, **more)
    assert says in str(caught.value)
    assert "secret" not in str(caught.value)


def test_an_empty_password_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("\n")
    with pytest.raises(ConfigError, match="first line is empty"):
        Address.parse("mqtt://me@host", password_file=str(file))


def test_wishes_are_asked_for_in_small_batches_and_leaving_goes_first() -> None:
    wishes = Wishes()
    wishes.add([f"t{i}" for i in range(10)], 1)
    assert [len(wishes.adds()), len(wishes.adds()), len(wishes.adds())] == [8, 2, 0]
    wishes.drop(["t1", "never"])
    wishes.add(["t1"], 1)
    assert wishes.drops() == ["t1"]
    assert wishes.adds() == [("t1", 1)]


@given(
    st.lists(
        st.tuples(st.sampled_from(["add", "drop", "flush", "answer", "lose", "keep"]), st.sampled_from("abc")),
        max_size=40,
    )
)
def test_a_broker_that_hears_all_wishes_has_exactly_the_wanted_ones(steps: list[tuple[str, str]]) -> None:
    """The oracle is a set; `lose` and `keep` are reconnections, before which the last requests may be lost."""
    wishes = Wishes()
    wanted: set[str] = set()
    broker: set[str] = set()
    flying: list[tuple[int, str, list[str]]] = []
    number = 0

    def flush() -> None:
        nonlocal number
        for kind, take in (("drop", wishes.drops), ("add", lambda: [t for t, _ in wishes.adds()])):
            while batch := take():
                number += 1
                wishes.asked(number, batch)
                flying.append((number, kind, batch))

    def answer() -> None:
        for at, kind, batch in flying:
            (broker.update if kind == "add" else broker.difference_update)(batch)
            wishes.answered(at)
        flying.clear()

    for step, topic in steps:
        if step == "add":
            wishes.add([topic], 1)
            wanted.add(topic)
        elif step == "drop":
            wishes.drop([topic])
            wanted.discard(topic)
        elif step == "flush":
            flush()
        elif step == "answer":
            answer()
        else:
            if step == "lose":
                broker.clear()
            flying.clear()
            wishes.renew(session_present=step == "keep")
    flush()
    answer()
    assert broker == wanted


def test_receipts_go_out_in_order_of_arrival() -> None:
    receipts = Receipts()
    receipts.renew()
    first, second, third = (receipts.take(number) for number in (7, 9, 3))
    assert receipts.done(second) == []
    assert receipts.done(third) == []
    assert receipts.done(first) == [7, 9, 3]
    assert receipts.done(first) == []
    old = receipts.take(5)
    receipts.renew()
    assert receipts.done(old) == []
    assert receipts.done(0) == []
    assert receipts.done(receipts.take(5)) == [5]


def test_the_outbox_keeps_to_the_window_and_the_size() -> None:
    outbox = Outbox()
    outbox.greet(2, 100)
    parcels = [Parcel(outbox.new_id(), "t", b"%d" % size * (size // 2), False, None) for size in (10, 90, 12)]
    assert [outbox.add(parcel) for parcel in parcels] == [1, 2, 3]
    assert [outbox.fits(p) for p in parcels] == [True, False, True]
    for number in (1, 2):
        parcel = outbox.ready()
        assert parcel is not None
        outbox.flying[number] = parcel.id
    assert outbox.ready() is None
    del outbox.flying[1]
    assert outbox.ready() == parcels[2]
    outbox.greet(None, None)
    assert outbox.fits(parcels[1])


def test_nothing_waits_twice_and_of_what_is_retained_the_last_alone() -> None:
    """As by hand: a day of repeating is one message, in its old place; a value that comes back is still the last one."""
    outbox = Outbox()

    def say(topic: str, payload: bytes, *, retain: bool = False, seconds: int | None = None) -> int:
        return outbox.add(Parcel(outbox.new_id(), topic, payload, retain, seconds))

    reply, piece = say("reply", b"r"), say("piece", b"p")
    here = say("presence", b"online", retain=True, seconds=7)
    for _ in range(17_280):
        assert say("reply", b"r") == reply
        say("presence", b"bye", retain=True)
        assert say("presence", b"online", retain=True) == here
    other = say("reply", b"another")
    bye = outbox.hurry(Parcel(outbox.new_id(), "presence", b"lost", True, None))
    outbox.window = 100
    wait = [(p.id, p.topic, p.payload, p.seconds_expiry) for p in iter(outbox.ready, None)]
    assert wait == [
        (bye, "presence", b"lost", None),
        (reply, "reply", b"r", None),
        (piece, "piece", b"p", None),
        (other, "reply", b"another", None),
    ]
    assert bye == here
    assert say("reply", b"r") > bye, "what is under way is said again: its receipt may be lost"


def test_back_off_grows_to_its_most_and_starts_over_only_after_a_calm() -> None:
    backoff = Backoff()
    assert backoff.at == 0.0
    delays = []
    for _ in range(14):
        backoff.fail(100.0)
        delays.append(backoff.at - 100.0)
    for index, delay in enumerate(delays):
        full = min(30.0, 0.2 * 1.5**index)
        assert 0.5 * full <= delay <= full
    backoff.up(200.0)
    backoff.fail(201.0)
    assert backoff.at - 201.0 >= 15.0
    backoff.up(300.0)
    backoff.fail(306.0)
    assert backoff.at - 306.0 <= 0.2


def test_an_inbox_rings_once_and_not_after_its_end() -> None:
    inbox = Inbox()
    for event in range(1000):
        inbox.post(event)
    assert inbox.reader.recv(10) == b"\0"
    inbox.quiet()
    inbox.post("again")
    assert inbox.reader.recv(10) == b"\0"
    inbox.close()
    inbox.post("late")
    assert len(inbox.events) == 1002


def test_passwords_are_hashed_as_mosquitto_reads_them() -> None:
    stored = hashed("secret", b"0123456789ab")
    assert stored.startswith("$7$101$MDEyMzQ1Njc4OWFi$")
    assert verify("secret", stored)
    assert not verify("Secret", stored)
    assert not verify("secret", "junk")
