"""Keeps the pieces of the live blobs retained at the broker, a window at a time.

The broker is the cache that devices pull from (DESIGN decision 9). Only what is live stays there: a round's pieces are cleared
when it settles, except those that the next round shares. Memory: one piece per message in flight, whatever the model's size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from wire import topics
from wire.chunks import read_piece
from wire.link import Link
from wire.messages import BlobRef
from wire.spool import Spool

_WINDOW = 32
_EXPIRY = 86_400  # seconds: the net under the clearing, should a coordinator never come back


class Publisher:
    """What is retained, what is still to be sent, and what is in flight."""

    def __init__(self, link: Link, spool: Spool, federation: str) -> None:
        """Publish from `spool` for one federation."""
        self._link = link
        self._spool = spool
        self._federation = federation
        self._live: dict[str, BlobRef] = {}
        self._waiting: deque[tuple[BlobRef, int, bool]] = deque()
        self._flying: set[int] = set()

    @property
    def live(self) -> tuple[BlobRef, ...]:
        """The blobs that are, or are about to be, at the broker."""
        return tuple(self._live.values())

    @property
    def busy(self) -> bool:
        """Whether anything still waits for the broker."""
        return bool(self._waiting or self._flying)

    def want(self, refs: Iterable[BlobRef]) -> None:
        """Publish these, except those that are live already."""
        for ref in refs:
            if ref.digest not in self._live:
                self._live[ref.digest] = ref
                self._waiting.extend(_pieces(ref, keep=True))
        self.feed()

    def clear(self, refs: Iterable[BlobRef]) -> None:
        """Delete these at the broker: an empty retained message per piece."""
        for ref in refs:
            self._live.pop(ref.digest, None)
            self._waiting.extend(_pieces(ref, keep=False))
        self.feed()

    def renew(self, digest: str) -> bool:
        """Publish a live blob once more, because a device says that pieces are gone. False when it is not live."""
        ref = self._live.get(digest)
        if ref is None:
            return False
        if not any(waiting.digest == digest for waiting, _, _ in self._waiting):
            self._waiting.extend(_pieces(ref, keep=True))
            self.feed()
        return True

    def restore(self) -> None:
        """Publish everything live once more: the broker lost what it held."""
        self._waiting = deque(item for item in self._waiting if not item[2])
        for ref in self._live.values():
            self._waiting.extend(_pieces(ref, keep=True))
        self.feed()

    def sent(self, message_id: int) -> None:
        """Take the broker's receipt and send what its place in the window allows."""
        if message_id in self._flying:
            self._flying.discard(message_id)
            self.feed()

    def feed(self) -> None:
        """Fill the window."""
        while self._waiting and len(self._flying) < _WINDOW:
            ref, index, keep = self._waiting.popleft()
            if keep and ref.digest not in self._live:
                continue
            topic = topics.piece(self._federation, ref.digest, index)
            if keep:
                data = read_piece(self._spool.path(ref.digest), ref, index)
                sent = self._link.publish(topic, data, qos=1, retain=True, seconds_expiry=_EXPIRY)
            elif ref.digest in self._live:
                continue
            else:
                sent = self._link.publish(topic, b"", qos=1, retain=True)
            self._flying.add(sent)


def _pieces(ref: BlobRef, *, keep: bool) -> Iterator[tuple[BlobRef, int, bool]]:
    return ((ref, index, keep) for index in range(ref.pieces))
