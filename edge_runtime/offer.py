"""The answer in hand: on disk until its end is told, and on its way up under a window.

The reply goes out with the first window of pieces behind it, because the usual case is that all goes well. When it has to be
offered again, only the reply goes, and the coordinator's word on what it has decides what else travels: so an upload resumes
over lost connections, a killed broker, a coordinator that comes back, and a new life of this agent.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import msgpack

from wire import codec, messages, topics
from wire.chunks import Push, file_digest, read_piece
from wire.errors import NestlingError, StoreError
from wire.link import Link
from wire.messages import Order, Reply
from wire.schema import unpack
from wire.spool import flush

_BYTES_MAX = 3 * messages.MESSAGE_BYTES


class Offers:
    """At most one answer, its update being the file ``ORDER.update`` in the folder `out`, where the worker left it."""

    def __init__(self, link: Link, out: Path, federation: str) -> None:
        """Use `out`.

        Raises:
            StoreError: The folder cannot be made.
        """
        self.out = out
        self._link = link
        self._federation = federation
        self._reply: Reply | None = None
        self._push = Push(0)
        self._under_way: dict[int, int] = {}
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{out}: {error.strerror}") from error

    def keep(self, order: Order, reply: Reply) -> None:
        """Write down what will be offered, so that a new life can.

        Durable together with the update when this returns, if a state of the device's own hangs on it: after a power cut the
        coordinator alone knows whether the answer counted, and it says so to whoever offers it again. Otherwise a power cut
        costs the work and no more, and nothing is flushed.

        Raises:
            StoreError: The disk refuses.
        """
        both = msgpack.packb({"order": codec.encode(order), "reply": codec.encode(reply)})
        try:
            self._note.write_bytes(both)
        except OSError as error:
            raise StoreError(f"{self._note}: {error.strerror}") from error
        if reply.keep:
            if reply.update is not None:
                flush(self._update(order.id))
            flush(self._note)
            flush(self.out)

    def recall(self, device: str, boot: str) -> tuple[Order, Reply] | None:
        """Give the answer that an earlier life was offering, said anew by this one; None when there is none that is whole."""
        try:
            plain = unpack(self._note.read_bytes(), _BYTES_MAX)
            order = codec.decode(plain["order"], Order)
            reply = codec.decode(plain["reply"], Reply)
            whole = reply.update is None or file_digest(self._update(reply.order)) == reply.update.digest
        except (OSError, NestlingError, KeyError, TypeError):
            return None
        if not whole or order.device != device or order.id != reply.order:
            return None
        reply = replace(reply, boot=boot)
        self._hold(reply)
        return order, reply

    def offer(self, reply: Reply) -> None:
        """Send the reply; the first time, the first window of its update as well.

        Raises:
            StoreError: The update cannot be read.
        """
        again = self._reply is not None and self._reply.order == reply.order
        self._link.publish(topics.up(self._federation, reply.device, "reply"), codec.encode(reply))
        if again:
            self._push.rewind(self._under_way.values())
            return
        self._hold(reply)
        self._send()

    def more(self, have: bytes) -> None:
        """Send what the coordinator lacks, as far as the window goes.

        Raises:
            StoreError: The update cannot be read.
        """
        self._push.acked(have)
        self._send()

    def sent(self, message_id: int) -> None:
        """Take the broker's receipt: until it comes, a piece is the link's to repeat and not ours."""
        self._under_way.pop(message_id, None)

    def drop(self, order: str) -> None:
        """Forget the answer to an order, its files included. What a worker has begun to write for it goes as well."""
        if self._reply is not None:
            with contextlib.suppress(OSError):
                self._note.unlink(missing_ok=True)
        self._reply = None
        self._push = Push(0)
        self._under_way = {}
        for end in ("update", "keep"):
            with contextlib.suppress(OSError):
                (self.out / f"{order}.{end}").unlink(missing_ok=True)

    def tidy(self, keep: str) -> None:
        """Delete all files but those of one order."""
        for path in self.out.iterdir():
            if path != self._note and path.stem != keep:
                with contextlib.suppress(OSError):
                    path.unlink()

    def _hold(self, reply: Reply) -> None:
        self._reply = reply
        self._push = Push(reply.update.pieces if reply.update is not None else 0)
        self._under_way = {}

    def _send(self) -> None:
        reply = self._reply
        if reply is None or reply.update is None:
            return
        path = self._update(reply.order)
        for index in self._push.to_send():
            topic = topics.up_piece(self._federation, reply.device, reply.order, index)
            self._under_way[self._link.publish(topic, read_piece(path, reply.update, index))] = index

    def _update(self, order: str) -> Path:
        return self.out / f"{order}.update"

    @property
    def _note(self) -> Path:
        return self.out / "answer"
