"""Updates on their way up: one partial file per order, acknowledged by bitmap once its bytes are durable.

A device opens an upload with its `Reply` and pushes pieces; it never counts a piece as delivered before an `Ack` says so,
because a broker that is killed loses messages it acknowledged (QoS 1 is hop by hop). Everything here is idempotent: a piece
that comes twice changes nothing, and an upload that is opened again goes on where it was.
"""

from __future__ import annotations

from dataclasses import dataclass

from wire.chunks import Assembly
from wire.errors import DigestMismatch, Malformed
from wire.messages import Reply
from wire.spool import Spool

_ACK_EVERY = 8
_SECONDS_FIRST = 0.2


@dataclass(slots=True)
class Upload:
    """One update that is being received.

    Attributes:
        reply: The message that opened it.
        assembly: Its partial file.
        fresh: Pieces since the last acknowledgement.
        due: When the device is to be told what is here, on the caller's clock.
    """

    reply: Reply
    assembly: Assembly
    fresh: int = 0
    due: float = float("inf")


class Uploads:
    """All open uploads by order."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._open: dict[str, Upload] = {}

    def offer(self, reply: Reply, now: float) -> bool:
        """Open an upload, or go on with it. True when there is nothing to receive because the blob is here already.

        A first offer is followed by pieces, so that it is answered only if they stay away; a repeated one waits for the
        answer.
        """
        if reply.update is None or self._spool.has(reply.update.digest):
            return True
        known = self._open.get(reply.order)
        if known is not None and known.reply.update == reply.update:
            known.reply = reply
            known.due = now
            return False
        self.drop(reply.order)
        self._open[reply.order] = Upload(reply, self._spool.assembly(reply.update), due=now + _SECONDS_FIRST)
        return False

    def piece(self, order: str, device: str, index: int, data: bytes, now: float) -> None:
        """Write one piece. Pieces of unknown uploads, of strangers, or of the wrong size change nothing."""
        upload = self._open.get(order)
        if upload is None or upload.reply.device != device:
            return
        try:
            new = upload.assembly.put(index, data)
        except Malformed:
            return
        upload.fresh += 1
        upload.due = now if not new or upload.fresh >= _ACK_EVERY else now + _SECONDS_FIRST

    def complete(self) -> list[Reply]:
        """Take out the uploads whose last piece is here, verified by digest; a wrong one starts from nothing."""
        done = []
        for order, upload in list(self._open.items()):
            if not upload.assembly.complete:
                continue
            try:
                self._spool.adopt(upload.assembly)
            except DigestMismatch:
                upload.due = 0.0
                continue
            del self._open[order]
            done.append(upload.reply)
        return done

    def due(self, now: float) -> list[tuple[Reply, bytes]]:
        """Make durable what must be acknowledged now and say what each such upload has."""
        result = []
        for upload in self._open.values():
            if now >= upload.due:
                upload.assembly.sync()
                upload.fresh = 0
                upload.due = float("inf")
                result.append((upload.reply, upload.assembly.have))
        return result

    def drop(self, order: str) -> None:
        """Forget an upload, and its bytes unless another order brings the same ones."""
        upload = self._open.pop(order, None)
        if upload is not None and all(other.assembly is not upload.assembly for other in self._open.values()):
            self._spool.discard(upload.assembly)
