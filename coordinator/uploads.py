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


@dataclass(slots=True)
class Upload:
    """One update that is being received.

    Attributes:
        reply: The message that opened it.
        assembly: Its partial file.
        fresh: Pieces since the last acknowledgement.
        asked: The device opened it (again) and waits for an answer.
    """

    reply: Reply
    assembly: Assembly
    fresh: int = 0
    asked: bool = True


class Uploads:
    """All open uploads by order."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._open: dict[str, Upload] = {}

    def offer(self, reply: Reply) -> bool:
        """Open an upload, or go on with it. True when there is nothing to receive because the blob is here already."""
        if reply.update is None or self._spool.has(reply.update.digest):
            return True
        known = self._open.get(reply.order)
        if known is not None and known.reply.update == reply.update:
            known.reply = reply
            known.asked = True
            return False
        if known is not None:
            known.assembly.close()
        self._open[reply.order] = Upload(reply, self._spool.assembly(reply.update))
        return False

    def piece(self, order: str, device: str, index: int, data: bytes) -> None:
        """Write one piece. Pieces of unknown uploads, of strangers, or of the wrong size change nothing."""
        upload = self._open.get(order)
        if upload is None or upload.reply.device != device:
            return
        try:
            new = upload.assembly.put(index, data)
        except Malformed:
            return
        upload.fresh += 1
        upload.asked = upload.asked or not new

    def complete(self) -> list[Reply]:
        """Take out the uploads whose last piece is here, verified by digest; a wrong one starts from nothing."""
        done = []
        for order, upload in list(self._open.items()):
            if not upload.assembly.complete:
                continue
            try:
                self._spool.adopt(upload.assembly)
            except DigestMismatch:
                upload.asked = True
                continue
            del self._open[order]
            done.append(upload.reply)
        return done

    def due(self) -> list[tuple[Reply, bytes]]:
        """Make durable what must be acknowledged now and say what each such upload has."""
        result = []
        for upload in self._open.values():
            if upload.asked or upload.fresh >= _ACK_EVERY:
                upload.assembly.sync()
                upload.fresh = 0
                upload.asked = False
                result.append((upload.reply, upload.assembly.have))
        return result

    def drop(self, order: str) -> None:
        """Forget an upload and its bytes."""
        upload = self._open.pop(order, None)
        if upload is not None:
            upload.assembly.close()
