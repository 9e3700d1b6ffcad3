"""What a device names as its update: whatever it is, the round's own blobs stay, and so does the coordinator."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.config import Config, RoundConfig
from coordinator.mail import Mail
from coordinator.server import Server
from coordinator.start import prepare
from wire import codec, link, tensor, topics
from wire.messages import BlobRef, Caps, Lead, Order, Presence, Reply, Usage
from wire.spec import Structure, tensor_shapes

CAPS = Caps("0.1.0", ("torch", "native"), 1 << 30, 1, 100, 10, (1, 8, 8))
DEVICES = ("d1", "d2")


class Queue:
    """A link on which two devices answer each order at once, by a script."""

    bytes_sent = bytes_received = 0

    def __init__(self, script: Any) -> None:
        self.script, self.sent = script, 0
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
        return self.sent

    def heard(self, topic: str, payload: bytes) -> None:
        self.post(link.Message(topic, payload, retained=False, token=0))


def ran(folder: Path, script: Any, until: Any) -> tuple[Server, list[str]]:
    """Run one round until it is over, or `until` says so; fails after some seconds."""
    said: list[str] = []
    queue = Queue(script)
    config = Config(state=str(folder), algo="fedavg", model="digits-mlp", rounds=1, round=RoundConfig(devices=2))
    store, standing = prepare(config, folder)
    assert standing.started is not None
    mail = Mail(queue, store.spool, "home", Lead("online", "1" * 16, standing.started.run, 20.0))  # type: ignore[arg-type]  # a stand-in
    server = Server(config, store, standing, mail, None, say=said.append)
    for name in DEVICES:
        here = Presence(name, "online", f"{1:016x}", 1, CAPS)
        queue.heard(topics.presence("home", name), codec.encode(here))
    end = time.monotonic() + 20.0
    try:
        server.run(lambda: until(server, said) or time.monotonic() > end)
        assert time.monotonic() < end
    finally:
        store.journal.close()
    return server, said


def offered(queue: Queue, order: Order, update: BlobRef, data: bytes = b"") -> None:
    usage = Usage(seconds=1.0)
    reply = Reply(order.id, order.device, "0" * 16, order.structures[0], update, "", 10, {"loss": 1.0}, usage)
    queue.heard(topics.up("home", order.device, "reply"), codec.encode(reply))
    for index in range(update.pieces if data else 0):
        piece = data[index * update.piece : (index + 1) * update.piece]
        queue.heard(topics.up_piece("home", order.device, order.id, index), piece)


@pytest.mark.parametrize("which", ["shell", "spec"])
def test_a_device_that_names_a_blob_of_the_round_is_refused_and_the_blob_stays(tmp_path: Path, which: str) -> None:
    named: list[BlobRef] = []

    def script(queue: Queue, order: Order) -> None:
        if order.device == "d1":
            named.append(order.shells[0] if which == "shell" else order.spec)
            offered(queue, order, named[0])

    server, said = ran(tmp_path, script, lambda s, _: s._round is not None and s._round.refused == 1)
    assert named
    assert server._store.spool.has(named[0].digest)
    assert not any("abandoned" in line for line in said)


def test_two_unusable_updates_that_are_the_same_bytes_are_both_refused(tmp_path: Path) -> None:
    def script(queue: Queue, order: Order) -> None:
        path = tmp_path / "update"
        shapes = tensor_shapes(spec, Structure())
        ref = tensor.write_blob(path, "update", {n: np.full(shape, np.nan, np.float32) for n, shape in shapes.items()})
        offered(queue, order, ref, path.read_bytes())

    store, _ = prepare(Config(state=str(tmp_path / "s"), algo="fedavg", model="digits-mlp"), tmp_path / "first")
    spec = store.spec
    store.journal.close()
    _, said = ran(tmp_path / "s", script, lambda _, said: any("abandoned" in line for line in said))
    assert any("all 2 devices refused" in line for line in said)
