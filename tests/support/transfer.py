"""Both ends of a transfer without the round around it: what the coordinator and the agent do with pieces, and no more.

`Head` is the coordinator's mail and `Tail` the agent's fetcher and offers, each over a link of its own. They do what
`coordinator.server` and `edge_runtime.agent` do with the same events; one thread turns both.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from coordinator.mail import Mail
from edge_runtime.fetch import Fetcher
from edge_runtime.offer import Offers
from tests.support.messages import RUN, a_reply, an_order
from wire import codec, link, topics
from wire.link import Address
from wire.link.mqtt import MqttLink
from wire.messages import Ack, BlobRef, Lead, Need, Order, Reply
from wire.spool import Spool

FEDERATION = "f"
SECONDS_SILENCE = 5.0


def random_file(path: Path, size: int, seed: int = 0) -> BlobRef:
    """Write bytes that no compression shortens, and name them."""
    digest = hashlib.sha256()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for start in range(0, size, 1 << 20):
            data = hashlib.shake_256(f"{seed}/{start}".encode()).digest(min(1 << 20, size - start))
            digest.update(data)
            file.write(data)
    return BlobRef(digest.hexdigest(), size)


def order_for(device: str, *refs: BlobRef, number: int = 1) -> Order:
    return replace(an_order("d0", number), device=device, spec=refs[0], shells=refs[1:] or refs)


class Head:
    """The coordinator's end."""

    def __init__(self, carrier: Any, root: Path, federation: str = FEDERATION) -> None:
        self.link = carrier
        self.spool = Spool(root / "head")
        self.lead = Lead("online", "c0" * 8, RUN, 4.0)
        self.mail = Mail(carrier, self.spool, federation, self.lead)
        self.committed: list[str] = []
        self.pieces: Counter[int] = Counter()
        self.needs: list[Need] = []
        self.problems: list[str] = []
        self.mail.start()

    def turn(self, seconds: float = 0.0) -> None:
        event = self.link.next(seconds)
        while event is not None:
            self._take(event)
            event = self.link.next(0.0)
        uploads = self.mail.uploads
        for reply in uploads.complete():
            self._commit(reply)
        for reply, have in uploads.due(time.monotonic()):
            self.mail.send(reply.device, Ack(reply.order, "more", have))

    def _take(self, event: Any) -> None:
        if isinstance(event, link.Message):
            self._message(event)
            self.link.done(event)
        elif isinstance(event, link.Published):
            self.mail.publisher.sent(event.id)
            self.problems += [event.problem] if event.problem else []
        elif isinstance(event, link.Up):
            self.mail.up(event.session_present)
        elif isinstance(event, link.Down):
            self.mail.down()

    def _message(self, message: link.Message) -> None:
        place = topics.parse(message.topic)
        if place.room != "u":
            return
        if place.index >= 0:
            self.pieces[place.index] += 1
            self.mail.uploads.piece(place.kind, place.device, place.index, message.payload, time.monotonic())
        elif place.kind == "need":
            self.needs.append(codec.decode(message.payload, Need))
            self.mail.publisher.renew(self.needs[-1].blob)
        elif place.kind == "reply":
            reply = codec.decode(message.payload, Reply)
            if self.mail.uploads.offer(reply, time.monotonic()):
                self._commit(reply)

    def _commit(self, reply: Reply) -> None:
        assert reply.update is not None
        self.spool.sync([reply.update.digest])
        self.committed.append(reply.order)
        self.mail.send(reply.device, Ack(reply.order, "committed"))


class Tail:
    """The device's end."""

    def __init__(self, carrier: Any, root: Path, device: str = "d0", federation: str = FEDERATION) -> None:
        self.link = carrier
        self.device = device
        self.spool = Spool(root / device)
        self.fetcher = Fetcher(carrier, self.spool, federation, device)
        self.offers = Offers(carrier, root / f"{device}.out", federation)
        self.reply: Reply | None = None
        self.ended: list[str] = []
        self.fetched: list[str] = []
        self.pieces: Counter[int] = Counter()
        self.ups = 0
        self.seconds_away = 0.0
        self._order = ""
        self._silence = float("inf")
        self._gone: float | None = None
        carrier.subscribe([topics.down(federation, device, "+"), topics.lead(federation)])
        carrier.start()

    def fetch(self, order: Order) -> None:
        self._order = order.id
        if self.fetcher.begin(order, time.monotonic()):
            self.fetched.append(order.id)

    def offer(self, path: Path, ref: BlobRef, order: str) -> None:
        """Offer a file as the update for an order; it is moved."""
        path.rename(self.offers.out / f"{order}.update")
        self.reply = replace(a_reply(self.device, order), update=ref)
        self._again()

    def turn(self, seconds: float = 0.0) -> None:
        event = self.link.next(seconds)
        while event is not None:
            self._take(event)
            event = self.link.next(0.0)
        now = time.monotonic()
        if now >= self.fetcher.due:
            self.fetcher.late(now)
        if now >= self._silence:
            self._again()

    def _take(self, event: Any) -> None:
        if isinstance(event, link.Message):
            self._message(event)
            self.link.done(event)
        elif isinstance(event, link.Up):
            self.ups += 1
            if self._gone is not None:
                self.seconds_away += time.monotonic() - self._gone
                self._gone = None
            self.fetcher.up(time.monotonic())
            if self.ups > 1:  # an agent says that it is here, and hears its order again
                self._again()
        elif isinstance(event, link.Down):
            self._gone = self._gone or time.monotonic()
            self.fetcher.down()
        elif isinstance(event, link.Published):
            self.offers.sent(event.id)

    def _message(self, message: link.Message) -> None:
        place = topics.parse(message.topic)
        if place.room == "b" and message.payload:
            self.pieces[place.index] += 1
            if self.fetcher.piece(place.kind, place.index, message.payload, time.monotonic()):
                self.fetched.append(self._order)
        elif place.room == "d" and place.kind == "order":
            self.fetch(codec.decode(message.payload, Order))
        elif place.room == "d" and place.kind == "ack":
            self._acked(codec.decode(message.payload, Ack))

    def _acked(self, ack: Ack) -> None:
        if self.reply is None or ack.order != self.reply.order:
            return
        self._silence = time.monotonic() + SECONDS_SILENCE
        if ack.state == "more":
            self.offers.more(ack.have)
            return
        self.ended.append(ack.order)
        self.offers.drop(ack.order)
        self.reply, self._silence = None, float("inf")

    def _again(self) -> None:
        if self.reply is not None:
            self._silence = time.monotonic() + SECONDS_SILENCE
            self.offers.offer(self.reply)


def link_to(port: int, name: str, *, keepalive: float = 10.0) -> MqttLink:
    return MqttLink(Address("127.0.0.1", port), f"{name}-{os.getpid()}", session_seconds=60, keepalive=keepalive)


def drive(ends: list[Any], done: Callable[[], bool], seconds: float = 15.0, wait: float = 0.002) -> float:
    """Turn all ends until something holds; gives the seconds that it took."""
    began = time.monotonic()
    while not done():
        assert time.monotonic() < began + seconds, f"not within {seconds} s"
        for end in ends:
            end.turn(wait)
    return time.monotonic() - began
