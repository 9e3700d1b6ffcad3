"""The agent's parts one by one, over a link that only takes notes: fetching, offering, one life."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from edge_runtime import life
from edge_runtime.config import BrokerConfig, Config
from edge_runtime.desk import Desk
from edge_runtime.fetch import SECONDS_PATIENCE, Fetcher
from edge_runtime.memory import probe
from edge_runtime.offer import Offers
from tests.support.messages import a_reply, an_order
from wire import codec, topics
from wire.chunks import WINDOW_DOWN, WINDOW_UP
from wire.errors import ConfigError, DigestMismatch, StoreError
from wire.job import Ready
from wire.messages import BlobRef, Lead, Need, Order, Reply
from wire.spool import Spool

BOOT = "5" * 16


class Notes:
    """A link that goes nowhere."""

    def __init__(self) -> None:
        self.bytes_sent = self.bytes_received = 0
        self.sent: list[tuple[str, bytes]] = []
        self.said: list[tuple[str, tuple[str, ...]]] = []
        self.wanted: set[str] = set()

    def publish(self, topic: str, payload: bytes, **_: object) -> int:
        self.sent.append((topic, payload))
        return len(self.sent)

    def subscribe(self, topics: Sequence[str], qos: int = 1) -> None:
        self.said.append(("subscribe", tuple(topics)))
        self.wanted |= set(topics)

    def unsubscribe(self, topics: Sequence[str]) -> None:
        self.said.append(("unsubscribe", tuple(topics)))
        self.wanted -= set(topics)

    def take(self) -> list[tuple[str, bytes]]:
        sent, self.sent = self.sent, []
        return sent


def blob(seed: int, pieces: int, piece: int = 10) -> tuple[BlobRef, bytes]:
    data = (hashlib.sha256(bytes([seed])).digest() * (pieces * piece))[: pieces * piece - 3]
    return BlobRef(hashlib.sha256(data).hexdigest(), len(data), piece), data


def order_for(*refs: BlobRef, number: int = 1) -> Order:
    return replace(an_order("d0", number), spec=refs[0], shells=refs[1:])


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture
def fetcher(notes: Notes, tmp_path: Path) -> Fetcher:
    return Fetcher(notes, Spool(tmp_path, 10_000), "f", "d0")  # type: ignore[arg-type]  # as much of a link as it takes


def serve(notes: Notes, fetcher: Fetcher, blobs: dict[str, tuple[BlobRef, bytes]], now: float = 0.0) -> bool:
    """Give what is subscribed to, until everything is there."""
    while notes.wanted:
        for topic in sorted(notes.wanted):
            place = topics.parse(topic)
            ref, data = blobs[place.kind]
            piece = data[place.index * ref.piece : (place.index + 1) * ref.piece]
            if fetcher.piece(place.kind, place.index, piece, now):
                return True
    return False


class TestFetcher:
    def test_windows_cross_blobs_and_are_left_before_the_next_one(self, notes: Notes, fetcher: Fetcher) -> None:
        blobs = [blob(1, 3), blob(2, 9)]
        by_prefix = {ref.digest[:32]: (ref, data) for ref, data in blobs}
        order = order_for(*(ref for ref, _ in blobs))
        assert not fetcher.begin(order, 0.0)
        assert [len(t) for w, t in notes.said if w == "subscribe"] == [WINDOW_DOWN]
        assert serve(notes, fetcher, by_prefix)
        assert [(w, len(t)) for w, t in notes.said] == [
            ("subscribe", 8),
            ("unsubscribe", 8),
            ("subscribe", 4),
            ("unsubscribe", 4),
        ]
        assert fetcher.due == float("inf")
        assert fetcher.begin(order, 0.0)  # all of it is here

    def test_repeated_and_foreign_and_empty_and_misshapen_pieces_change_nothing(
        self, notes: Notes, fetcher: Fetcher
    ) -> None:
        ref, data = blob(1, 2)
        fetcher.begin(order_for(ref, ref), 0.0)
        prefix = ref.digest[:32]
        for name, index, piece in (
            ("0" * 32, 0, data[:10]),
            (prefix, 0, b""),  # somebody clears it
            (prefix, 0, data[:9]),
            (prefix, 7, data[:10]),
            (prefix, 0, data[:10]),
            (prefix, 0, data[:10]),
        ):
            assert not fetcher.piece(name, index, piece, 0.0)
        assert fetcher.piece(prefix, 1, data[10:], 0.0)

    def test_silence_pulls_the_window_again_and_then_asks(self, notes: Notes, fetcher: Fetcher) -> None:
        ref, data = blob(1, 3)
        fetcher.begin(order_for(ref, ref), 0.0)
        fetcher.piece(ref.digest[:32], 1, data[10:20], 1.0)
        assert fetcher.due == 1.0 + SECONDS_PATIENCE
        notes.said.clear()
        fetcher.late(4.0)
        rest = tuple(topics.piece("f", ref.digest, i) for i in (0, 2))
        assert notes.said == [("unsubscribe", rest), ("subscribe", rest)]
        assert notes.sent == []
        fetcher.late(8.0)
        ((topic, payload),) = notes.take()
        assert topic == topics.up("f", "d0", "need")
        assert codec.decode(payload, Need) == Need(ref.digest, order_for(ref, ref).id)
        assert fetcher.due > 8.0 + SECONDS_PATIENCE  # more patience each time

    def test_without_a_link_nobody_is_late(self, notes: Notes, fetcher: Fetcher) -> None:
        fetcher.down()
        fetcher.up(0.0)
        assert fetcher.due == float("inf")
        ref, data = blob(1, 2)
        fetcher.begin(order_for(ref, ref), 0.0)
        fetcher.down()
        assert fetcher.due == float("inf")
        fetcher.up(50.0)
        assert fetcher.due == 50.0 + SECONDS_PATIENCE
        fetcher.late(60.0)
        assert notes.sent == []  # the first silence asks nobody but the broker
        fetcher.piece(ref.digest[:32], 0, data[:10], 61.0)
        assert fetcher.piece(ref.digest[:32], 1, data[10:], 62.0)
        fetcher.up(70.0)
        assert fetcher.due == float("inf")

    def test_wrong_bytes_are_fetched_again_but_not_for_ever(self, notes: Notes, fetcher: Fetcher) -> None:
        ref, _ = blob(1, 1)
        prefix = ref.digest[:32]
        fetcher.begin(order_for(ref, ref), 0.0)
        for _ in range(2):
            assert not fetcher.piece(prefix, 0, b"x" * ref.size, 0.0)
            assert notes.wanted
        with pytest.raises(DigestMismatch):
            fetcher.piece(prefix, 0, b"x" * ref.size, 0.0)

    def test_a_stopped_download_goes_on_in_a_new_life(self, notes: Notes, fetcher: Fetcher, tmp_path: Path) -> None:
        ref, data = blob(1, 12)
        fetcher.begin(order_for(ref, ref), 0.0)
        for index in range(5):
            fetcher.piece(ref.digest[:32], index, data[index * 10 : index * 10 + 10], 0.0)
        fetcher.stop()
        assert not notes.wanted
        later = Fetcher(notes, Spool(tmp_path), "f", "d0")  # type: ignore[arg-type]  # as much of a link as it takes
        assert not later.begin(order_for(ref, ref), 0.0)
        assert {topics.parse(t).index for t in notes.wanted} == {5, 6, 7, 8, 9, 10, 11}

    def test_weights_of_older_rounds_go(self, notes: Notes, fetcher: Fetcher, tmp_path: Path) -> None:
        spec, first, second = blob(1, 1), blob(2, 2), blob(3, 2)
        by_prefix = {ref.digest[:32]: (ref, data) for ref, data in (spec, first, second)}
        fetcher.begin(order_for(spec[0], first[0]), 0.0)
        serve(notes, fetcher, by_prefix)
        fetcher.begin(order_for(spec[0], second[0], number=2), 0.0)
        serve(notes, fetcher, by_prefix)
        assert Spool(tmp_path).digests() == sorted([spec[0].digest, second[0].digest])

    def test_a_blob_that_a_power_cut_has_spoilt_is_not_trusted(
        self, notes: Notes, fetcher: Fetcher, tmp_path: Path
    ) -> None:
        ref, data = blob(1, 1)
        (tmp_path / ref.digest).write_bytes(b"\0" * ref.size)
        assert not fetcher.begin(order_for(ref, ref), 0.0)
        assert fetcher.piece(ref.digest[:32], 0, data, 0.0)

    def test_an_order_beyond_the_bound_is_an_error(self, fetcher: Fetcher) -> None:
        with pytest.raises(StoreError, match="do not fit"):
            fetcher.begin(order_for(BlobRef("a" * 64, 9_000), BlobRef("b" * 64, 2_000)), 0.0)


class TestOffers:
    @staticmethod
    def make(notes: Notes, folder: Path) -> Offers:
        return Offers(notes, folder, "f")  # type: ignore[arg-type]  # as much of a link as it takes

    @staticmethod
    def answer(offers: Offers, pieces: int = 40) -> tuple[Order, Reply]:
        ref, data = blob(4, pieces)
        order = an_order("d0", 1)
        (offers.out / f"{order.id}.update").write_bytes(data)
        return order, replace(a_reply("d0", order.id, boot=BOOT), update=ref)

    @staticmethod
    def pieces(notes: Notes) -> list[int]:
        return [topics.parse(t).index for t, _ in notes.take() if topics.parse(t).index >= 0]

    def test_reply_first_then_one_window_then_as_the_word_goes(self, notes: Notes, tmp_path: Path) -> None:
        offers = self.make(notes, tmp_path / "out")
        _, reply = self.answer(offers)
        offers.offer(reply)
        assert notes.sent[0] == (topics.up("f", "d0", "reply"), codec.encode(reply))
        assert self.pieces(notes) == list(range(WINDOW_UP))
        offers.more(b"\xff")
        assert self.pieces(notes) == list(range(WINDOW_UP, WINDOW_UP + 8))

    def test_again_means_the_reply_alone_and_then_what_is_missing(self, notes: Notes, tmp_path: Path) -> None:
        offers = self.make(notes, tmp_path / "out")
        _, reply = self.answer(offers)
        offers.offer(reply)
        for message_id, _ in enumerate(notes.take(), 1):
            offers.sent(message_id)
        offers.offer(reply)
        assert [t for t, _ in notes.take()] == [topics.up("f", "d0", "reply")]
        offers.more(b"\x0f")
        assert self.pieces(notes) == list(range(4, 4 + WINDOW_UP))

    def test_what_the_link_has_not_delivered_yet_is_not_sent_beside_it(self, notes: Notes, tmp_path: Path) -> None:
        offers = self.make(notes, tmp_path / "out")
        _, reply = self.answer(offers)
        offers.offer(reply)
        notes.take()
        for message_id in range(1, 8):  # the reply and pieces 0 to 5; the connection broke before the other receipts
            offers.sent(message_id)
        offers.offer(reply)
        notes.take()
        offers.more(b"\x07")
        assert self.pieces(notes) == [3, 4, 5, *range(WINDOW_UP, WINDOW_UP + 3)]

    def test_a_new_life_offers_the_same_in_its_own_name(self, notes: Notes, tmp_path: Path) -> None:
        first = self.make(notes, tmp_path / "out")
        order, reply = self.answer(first)
        first.keep(order, reply)
        second = self.make(notes, tmp_path / "out")
        assert second.recall("d0", "6" * 16) == (order, replace(reply, boot="6" * 16))
        second.tidy(order.id)
        second.offer(replace(reply, boot="6" * 16))
        assert len(notes.take()) == 1
        second.more(b"")
        assert self.pieces(notes) == list(range(WINDOW_UP))

    def test_nothing_to_recall(self, notes: Notes, tmp_path: Path) -> None:
        offers = self.make(notes, tmp_path / "out")
        assert offers.recall("d0", BOOT) is None
        order, reply = self.answer(offers)
        offers.keep(order, reply)
        assert self.make(notes, tmp_path / "out").recall("d1", BOOT) is None
        update = offers.out / f"{order.id}.update"
        update.write_bytes(b"\0" * update.stat().st_size)
        assert self.make(notes, tmp_path / "out").recall("d0", BOOT) is None
        update.unlink()
        assert self.make(notes, tmp_path / "out").recall("d0", BOOT) is None
        (offers.out / "answer").write_bytes((offers.out / "answer").read_bytes()[:-5])
        assert self.make(notes, tmp_path / "out").recall("d0", BOOT) is None
        (offers.out / "answer").write_bytes(b"\x93\1\2\3")
        assert self.make(notes, tmp_path / "out").recall("d0", BOOT) is None

    def test_what_is_over_leaves_nothing(self, notes: Notes, tmp_path: Path) -> None:
        offers = self.make(notes, tmp_path / "out")
        order, reply = self.answer(offers)
        offers.keep(order, reply)
        offers.offer(reply)
        offers.drop(order.id)
        assert list(offers.out.iterdir()) == []
        notes.take()
        offers.more(b"")
        assert notes.take() == []

    def test_tidying_leaves_the_one_that_is_offered(self, notes: Notes, tmp_path: Path) -> None:
        offers = self.make(notes, tmp_path / "out")
        order, _ = self.answer(offers)
        (offers.out / "0000000000000099.update").write_bytes(b"old")
        (offers.out / "0000000000000099.keep").write_bytes(b"old")
        offers.tidy(order.id)
        assert [p.name for p in offers.out.iterdir()] == [f"{order.id}.update"]

    def test_a_lost_update_is_an_error(self, notes: Notes, tmp_path: Path) -> None:
        offers = self.make(notes, tmp_path / "out")
        order, reply = self.answer(offers)
        (offers.out / f"{order.id}.update").unlink()
        with pytest.raises(StoreError):
            offers.offer(reply)


class TestLife:
    def test_lives_are_numbered_upward_and_by_the_clock(self, tmp_path: Path) -> None:
        assert life.next_seq(tmp_path, 1000.9) == 1000
        assert life.next_seq(tmp_path, 1000.9) == 1001
        assert life.next_seq(tmp_path, 5.0) == 1002  # a clock that went back
        (tmp_path / "lives").write_text("torn by a po")
        assert life.next_seq(tmp_path, 2000.0) == 2000

    def test_one_agent_per_folder(self, tmp_path: Path) -> None:
        mine = life.claim(tmp_path / "state")
        with pytest.raises(ConfigError, match="another agent runs"):
            life.claim(tmp_path / "state")
        mine.close()
        life.claim(tmp_path / "state").close()

    def test_an_unusable_folder_is_the_disk_s_fault(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(StoreError):
            life.claim(tmp_path / "file")
        with pytest.raises(StoreError):
            life.next_seq(tmp_path / "gone", 0.0)

    def test_only_new_facts_are_news(self) -> None:
        one = life.Life(1)
        ready = Ready("torch", 1000, 100, 10, (8, 8))
        assert one.learnt(ready)
        assert not one.learnt(replace(ready, bytes_base=2000))
        assert one.learnt(replace(ready, samples=99))

    def test_a_coordinator_sets_the_pace_once_there_is_something_to_say(self) -> None:
        one = life.Life(1)
        one.led(Lead("online", BOOT, BOOT, 4.0))
        assert (one.keepalive, one.beat) == (4.0, life.NEVER)
        one.learnt(Ready("", 0, 1, 1, (1,)))
        one.led(Lead("online", BOOT, BOOT, 4.0))
        assert one.due < life.NEVER

    def test_memory_is_given_back_once_after_a_second_of_rest(self, monkeypatch: pytest.MonkeyPatch) -> None:
        one, clock, given, waited = life.Life(1), [100.0], [], []
        link = SimpleNamespace(next=waited.append)
        monkeypatch.setattr(life, "give_back", lambda: given.append(clock[0]))
        monkeypatch.setattr(life.time, "monotonic", lambda: clock[0])
        one.next(link, 1.0)
        for now in (100.0, 100.9, 101.8, 102.7, 102.8, 103.0):
            clock[0] = now
            one.next(link, 1.0)
            if now < 102.0:
                one.used(now)
                assert one.due == now + 1.0, "it wakes up for that"
        assert given == [102.8], "rounds that follow each other at once push it off"
        assert one.due == life.NEVER
        assert len(waited) == 7

    def test_the_device_is_its_own_user_where_there_is_a_password(self, tmp_path: Path) -> None:
        secret = tmp_path / "secret"
        secret.write_text("hush\n")
        config = Config("pi", BrokerConfig("mqtt://h", password_file=str(secret)))
        found = life.address(config)
        assert (found.user, found.password) == ("pi", "hush")
        assert life.address(Config("pi", BrokerConfig("mqtt://h"))).user == ""
        assert life.client_id(config) == "home:pi"
        longest = Config("d" * 64, BrokerConfig("mqtt://h"), federation="f" * 64)
        assert len(life.client_id(longest)) == 64
        assert life.client_id(longest) != life.client_id(
            Config("e" * 64, BrokerConfig("mqtt://h"), federation="f" * 64)
        )

    def test_systemd_hears_what_it_wants(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
            ear.bind(str(tmp_path / "ear"))
            ear.settimeout(5)
            monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "ear"))
            monkeypatch.setenv("WATCHDOG_USEC", "4000000")
            life.notify("READY=1")
            assert ear.recv(100) == b"READY=1"
            assert life.Life(1).seconds_watchdog == 2.0
            abstract = f"nestling-{os.getpid()}"
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
                other.bind("\0" + abstract)
                other.settimeout(5)
                monkeypatch.setenv("NOTIFY_SOCKET", "@" + abstract)
                life.notify("WATCHDOG=1")
                assert other.recv(100) == b"WATCHDOG=1"
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
        life.notify("READY=1")  # nobody listens: no harm


def test_what_the_order_in_hand_takes_is_there_for_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that comes back online, or hears from its operator, in mid-order does not announce what is left beside it."""
    desk, held = Desk(Config("d", BrokerConfig("mqtt://localhost")), lambda _: None), [0]
    monkeypatch.setattr(probe, "resident", lambda _: held[0])
    assert desk.bytes_coming("torch") == 240 << 20, "a guess, as long as no worker has told"
    desk._child = SimpleNamespace(pid=1)  # type: ignore[assignment]  # as much of a child as is looked at
    held[0] = 300 << 20
    assert desk.bytes_coming("torch") == 0, "what it holds may be its base"
    desk._bases["torch"] = 200 << 20
    assert desk.bytes_coming("torch") == -(100 << 20)
    held[0] = 150 << 20
    assert desk.bytes_coming("torch") == 50 << 20
