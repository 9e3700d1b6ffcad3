"""A real `Server` over a link on which devices answer by a script: what it decides, without a broker."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Any

from coordinator.config import Config, RoundConfig
from coordinator.mail import Mail
from coordinator.server import Server
from coordinator.start import prepare
from wire import codec, link, topics
from wire.messages import Ack, BlobRef, Caps, Lead, Order, Presence, Refusal, Reply, Usage

CAPS = Caps("0.1.0", ("torch", "native"), 1 << 30, 1, 100, 10, (1, 8, 8))
DEVICES = ("d1", "d2")


class Queue:
    """A link on which devices answer each order at once, by a script; `acks` are those that they got."""

    bytes_sent = bytes_received = 0

    def __init__(self, script: Any) -> None:
        self.script, self.sent = script, 0
        self.acks: list[Ack] = []
        self.events: deque[Any] = deque([link.Up(session_present=False)])

    def nothing(self, *_: object, **__: object) -> None:
        """Stand for what needs no broker here."""

    subscribe = unsubscribe = start = done = stop = nothing

    def post(self, event: object) -> None:
        self.events.append(event)

    def next(self, timeout: float) -> object:
        if not self.events:
            time.sleep(min(timeout, 0.01))
        return self.events.popleft() if self.events else None

    def publish(self, topic: str, payload: bytes, **_: object) -> int:
        self.sent += 1
        self.post(link.Published(self.sent))
        if topic.endswith("/order"):
            self.script(self, codec.decode(payload, Order))
        elif topic.endswith("/ack"):
            self.acks.append(codec.decode(payload, Ack))
        return self.sent

    def heard(self, topic: str, payload: bytes) -> None:
        self.post(link.Message(topic, payload, retained=False, token=0))


def ran(
    folder: Path,
    script: Any,
    until: Any = lambda *_: False,
    *,
    rounds: int = 1,
    terms: RoundConfig = RoundConfig(devices=2),  # noqa: B008 - frozen
) -> tuple[Server, list[str]]:
    """Run until the rounds are over, or `until` says so; fails after some seconds."""
    said: list[str] = []
    queue = Queue(script)
    config = Config(state=str(folder), algo="fedavg", model="digits-mlp", rounds=rounds, round=terms)
    store, standing = prepare(config, folder)
    assert standing.started is not None
    mail = Mail(queue, store.spool, "home", Lead("online", "1" * 16, standing.started.run, 20.0))  # type: ignore[arg-type]  # a stand-in
    server = Server(config, store, standing, mail, None, say=said.append)
    for name in DEVICES:
        born(queue, name)
    end = time.monotonic() + 20.0
    try:
        server.run(lambda: until(server, said) or time.monotonic() > end)
        assert time.monotonic() < end
    finally:
        store.journal.close()
    return server, said


def born(queue: Queue, name: str, seq: int = 1) -> None:
    queue.heard(topics.presence("home", name), codec.encode(Presence(name, "online", f"{seq:016x}", seq, CAPS)))


def refused(queue: Queue, order: Order, detail: str = "there are no pictures in /data") -> None:
    said = Refusal(order.id, order.device, "0" * 16, "data", detail)
    queue.heard(topics.up("home", order.device, "refusal"), codec.encode(said))


def offered(queue: Queue, order: Order, update: BlobRef, data: bytes = b"", *, pieces: int | None = None) -> None:
    """Answer an order, with all pieces of the update or the first few."""
    usage = Usage(seconds=1.0)
    reply = Reply(order.id, order.device, "0" * 16, order.structures[0], update, "", 10, {"loss": 1.0}, usage)
    queue.heard(topics.up("home", order.device, "reply"), codec.encode(reply))
    for index in range((update.pieces if pieces is None else pieces) if data else 0):
        piece = data[index * update.piece : (index + 1) * update.piece]
        queue.heard(topics.up_piece("home", order.device, order.id, index), piece)
