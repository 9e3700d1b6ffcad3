"""Transfers over a real broker and a bad network: what was there before the fault does not travel again after it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edge_runtime import fetch
from tests.support.mosquitto import Mosquitto
from tests.support.relay import Relay
from tests.support.transfer import Head, Tail, drive, link_to, order_for, random_file
from wire.chunks import WINDOW_DOWN, WINDOW_UP
from wire.messages import PIECE_BYTES, BlobRef

PIECES = 40
SIZE = PIECES * PIECE_BYTES - 7
RATE = 8_000_000
ORDER = "a" * 16
REPEATS_MAX = WINDOW_UP  # what the wire had carried and the receipt of which had not come back; usually 2 to 5


class Field:
    """A broker, the coordinator's end, and a device's end behind a relay."""

    def __init__(self, broker: Mosquitto, relay: Relay, root: Path, keepalive: float) -> None:
        self.broker, self.relay, self.root = broker, relay, root
        self.head = Head(link_to(broker.port, "head"), root)
        self.tail = Tail(link_to(relay.port, "tail", keepalive=keepalive), root)
        self.until(lambda: bool(self.tail.ups and self.head.mail.is_up))

    def until(self, done: Callable[[], bool], seconds: float = 15.0) -> None:
        drive([self.head, self.tail], done, seconds)

    def begin_upload(self) -> BlobRef:
        ref = random_file(self.root / "update", SIZE, seed=1)
        self.tail.offer(self.root / "update", ref, ORDER)
        return ref

    def publish(self, size: int = SIZE, seed: int = 2) -> BlobRef:
        ref = random_file(self.root / "model", size, seed)
        self.head.spool.add_file(self.root / "model", ref.digest)
        self.head.mail.publisher.want([ref])
        self.until(lambda: not self.head.mail.publisher.busy)
        return ref

    def begin_download(self) -> BlobRef:
        ref = self.publish()
        self.tail.fetch(order_for("d0", ref))
        return ref

    def finish_upload(self, ref: BlobRef) -> None:
        self.until(lambda: bool(self.tail.ended))
        assert set(self.head.committed) == {ORDER}, "said again to who asks again: counting once is the round's"
        assert self.head.spool.ref(ref.digest) == ref
        assert set(self.head.pieces) == set(range(PIECES))

    def finish_download(self, ref: BlobRef) -> None:
        self.until(lambda: bool(self.tail.fetched))
        assert self.tail.spool.ref(ref.digest) == ref
        assert set(self.tail.pieces) == set(range(PIECES))


@contextmanager
def field(
    root: Path, *, rate: float | None = RATE, keepalive: float = 10.0, delay: float = 0.0, loss: float = 0.0
) -> Iterator[Field]:
    with Mosquitto(root / "broker") as broker, Relay(broker.port, rate=rate, delay=delay, loss=loss) as relay:
        made = Field(broker, relay, root, keepalive)
        try:
            yield made
        finally:
            made.tail.link.stop()
            made.head.link.stop()


def test_an_upload_resumes_from_the_missing_piece_after_each_disconnect(tmp_path: Path) -> None:
    with field(tmp_path) as at:
        ref = at.begin_upload()
        for half in (PIECES // 3, 2 * PIECES // 3):
            at.until(lambda half=half: len(at.head.pieces) >= half)
            at.relay.reset()
        at.finish_upload(ref)
        assert at.tail.ups == 3
        assert at.head.pieces.total() <= PIECES + 2 * REPEATS_MAX
        assert at.relay.bytes_up < SIZE + 2 * (REPEATS_MAX + 1) * PIECE_BYTES


def test_a_download_resumes_from_the_missing_piece_after_each_disconnect(tmp_path: Path) -> None:
    with field(tmp_path) as at:
        ref = at.begin_download()
        for half in (PIECES // 3, 2 * PIECES // 3):
            at.until(lambda half=half: len(at.tail.pieces) >= half)
            at.relay.reset()
        at.finish_download(ref)
        assert at.tail.ups == 3
        assert at.tail.pieces.total() <= PIECES + 2 * REPEATS_MAX


def test_an_outage_longer_than_the_patience_asks_nobody_for_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "SECONDS_PATIENCE", 0.2)
    with field(tmp_path) as at:
        ref = at.begin_download()
        at.until(lambda: len(at.tail.pieces) >= PIECES // 2)
        at.relay.cut(1.5)
        at.finish_download(ref)
        assert at.head.needs == []
        assert at.tail.pieces.total() <= PIECES + REPEATS_MAX


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_connection_that_is_half_open_is_given_up_and_taken_over(tmp_path: Path, way: str) -> None:
    with field(tmp_path, keepalive=1) as at:
        ref = at.begin_upload() if way == "up" else at.begin_download()
        pieces = at.head.pieces if way == "up" else at.tail.pieces
        at.until(lambda: len(pieces) >= PIECES // 2)
        at.relay.half_open()
        (at.finish_upload if way == "up" else at.finish_download)(ref)
        assert at.tail.ups == 2
        assert pieces.total() <= PIECES + WINDOW_UP


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_late_and_lossy_link_is_slow_but_nothing_is_sent_twice(tmp_path: Path, way: str) -> None:
    with field(tmp_path, delay=0.02, loss=0.02) as at:
        ref = at.begin_upload() if way == "up" else at.begin_download()
        (at.finish_upload if way == "up" else at.finish_download)(ref)
        assert at.relay.lost > 0
        assert at.tail.ups == 1
        assert (at.head.pieces if way == "up" else at.tail.pieces).total() == PIECES


def test_what_a_killed_broker_had_acknowledged_and_lost_is_sent_again(tmp_path: Path) -> None:
    """The coordinator is cut off behind its broker, so that the pieces die there, receipted to the device."""
    with Mosquitto(tmp_path / "broker") as broker, Relay(broker.port) as behind:
        head = Head(link_to(behind.port, "head"), tmp_path)
        tail = Tail(link_to(broker.port, "tail"), tmp_path)
        drive([head, tail], lambda: bool(tail.ups and head.mail.is_up))
        behind.half_open()
        ref = random_file(tmp_path / "update", SIZE)
        tail.offer(tmp_path / "update", ref, ORDER)
        drive([head, tail], lambda: not tail.offers._under_way)  # the broker has answered for all of the window
        assert not head.pieces
        broker.kill()
        broker.start()
        behind.reset()
        drive([head, tail], lambda: bool(tail.ended))
        assert head.committed == [ORDER]
        assert head.spool.ref(ref.digest) == ref
        assert head.pieces.total() == PIECES  # the lost ones came again, the others came once
        for end in (tail, head):
            end.link.stop()


def test_pieces_that_a_killed_broker_forgot_are_published_again_and_only_the_missing_ones_pulled(
    tmp_path: Path,
) -> None:
    with field(tmp_path) as at:
        ref = at.begin_download()
        at.until(lambda: len(at.tail.pieces) >= PIECES // 2)
        at.broker.kill()
        at.broker.start()
        at.finish_download(ref)
        assert at.tail.pieces.total() < PIECES + WINDOW_DOWN  # with its session gone, a window is asked for as a whole


def test_a_known_blob_is_never_sent_again(tmp_path: Path) -> None:
    with field(tmp_path, rate=None) as at:
        ref = at.begin_download()
        at.finish_download(ref)
        small = at.publish(100, seed=3)
        sent, down = at.head.link.bytes_sent, at.relay.bytes_down
        at.head.mail.publisher.want([ref, small])
        second = order_for("d0", ref, small, number=2)
        at.tail.fetch(second)  # shares a shell with the first one
        at.until(lambda: second.id in at.tail.fetched)
        assert at.head.link.bytes_sent == sent
        assert at.relay.bytes_down - down < 1000
        at.tail.link.stop()
        at.tail = Tail(link_to(at.relay.port, "tail"), tmp_path)  # a new life over the same disk
        at.until(lambda: bool(at.tail.ups))
        down = at.relay.bytes_down
        at.tail.fetch(second)
        assert at.tail.fetched == [second.id]
        at.until(lambda: at.tail.link.next(0.1) is None)
        assert at.relay.bytes_down - down < 1000


def test_an_update_that_is_there_already_is_settled_by_the_reply_alone(tmp_path: Path) -> None:
    """The last acknowledgement was lost: a second offer of the same answer moves no piece."""
    with field(tmp_path, rate=None) as at:
        ref = at.begin_upload()
        reply = at.tail.reply
        at.until(lambda: bool(at.tail.ended))
        update = at.tail.offers.out / f"{ORDER}.update"
        update.write_bytes(at.head.spool.path(ref.digest).read_bytes())
        at.tail.offers._hold(reply)  # as a new life that recalls it
        at.tail.reply = reply
        up = at.relay.bytes_up
        at.tail._again()
        at.until(lambda: len(at.tail.ended) == 2)
        assert at.head.pieces.total() == PIECES
        assert at.relay.bytes_up - up < 1000


def test_the_relay_keeps_to_its_rate_and_counts(tmp_path: Path) -> None:
    size = 600_000
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        with Relay(server.getsockname()[1], rate=2_000_000, delay=0.05) as relay:
            with socket.create_connection(("127.0.0.1", relay.port)) as client:
                far, _ = server.accept()
                with far:
                    far.settimeout(5.0)
                    began = time.monotonic()
                    pushing = threading.Thread(target=client.sendall, args=(bytes(size),))
                    pushing.start()
                    got = first = 0.0
                    while got < size:
                        got += len(far.recv(65_536))
                        first = first or time.monotonic() - began
                    seconds = time.monotonic() - began
                    pushing.join()
            assert first >= 0.05
            assert seconds >= 0.28
            assert (relay.bytes_up, relay.bytes_down) == (size, 0)
            relay.cut(0.3)
            assert relay.is_cut
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", relay.port))
