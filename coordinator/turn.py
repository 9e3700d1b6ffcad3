"""What the server holds between two turns of its loop and within one."""

from __future__ import annotations

from dataclasses import dataclass, field

from coordinator.journal import Record
from coordinator.round import Round
from wire.messages import Ack, BlobRef, Order


@dataclass(slots=True)
class Turn:
    """What one turn of the loop has decided and not yet done.

    Attributes:
        rows: For the journal.
        files: Digests to make durable before the rows.
        sends: Device and message, to go out after the rows.
        following: The round that the rows plan, to be issued after them.
    """

    rows: list[Record] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    sends: list[tuple[str, Order | Ack]] = field(default_factory=list)
    following: Round | None = None


@dataclass(slots=True)
class Pace:
    """Instants on the monotonic clock, and counters since then.

    Attributes:
        deadline: Of the open round.
        retry: No round is planned before.
        issued: When the open round was issued.
        bytes_up: The link's counter at that time.
        bytes_down: Likewise.
        clearing: Blobs whose pieces are being deleted at the broker.
        bytes_old: Written to the spool since it was last swept.
        rounds_old: Rounds since then.
    """

    deadline: float = float("inf")
    retry: float = 0.0
    issued: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    clearing: tuple[BlobRef, ...] = ()
    bytes_old: int = 0
    rounds_old: int = 0
