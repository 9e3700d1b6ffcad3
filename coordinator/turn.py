"""What the server holds between two turns of its loop and within one."""

from __future__ import annotations

from dataclasses import dataclass, field

from coordinator.events import Arrived
from coordinator.journal import Cleared, Closed, Evaluated, Record
from coordinator.round import Round
from wire.messages import Ack, BlobRef, Order
from wire.spool import Spool

SECONDS_GATHER = 0.1
_SECONDS_VAIN = 1.0
_SECONDS_VAIN_MOST = 300.0


@dataclass(slots=True)
class Turn:
    """What the loop has decided and not yet done.

    Attributes:
        rows: For the journal.
        files: Digests to make durable before the rows.
        updates: Likewise, of answers that have arrived.
        sends: Device and message, to go out after the rows.
        following: The round that the rows plan, to be issued after them.
        since: When rows began to gather here, on the monotonic clock.
    """

    rows: list[Record] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    updates: list[str] = field(default_factory=list)
    sends: list[tuple[str, Order | Ack]] = field(default_factory=list)
    following: Round | None = None
    since: float = float("inf")

    def wait(self, now: float) -> float:
        """Give the seconds that this may wait for more: 0 unless nobody is in a hurry for any of it.

        A device that has answered need not hear at once that its answer counts, so that answers which come close together
        share one wait for the disk, at the latest `SECONDS_GATHER` after the first of them.
        """
        patient = bool(self.rows) and all(isinstance(row, Arrived | Cleared | Evaluated) for row in self.rows)
        if not patient or any(not isinstance(word, Ack) or word.state != "committed" for _, word in self.sends):
            return 0.0
        self.since = min(self.since, now)
        return max(0.0, self.since + SECONDS_GATHER - now)

    def look(self, now: float, tick: float) -> float:
        """Give the seconds that the loop may wait for an event: `tick`, or less when rows wait for theirs."""
        return min(tick, self.wait(now)) if self.rows else tick

    def make_durable(self, spool: Spool) -> int:
        """Flush the files that the rows speak of; gives their bytes.

        Updates are flushed only where the rows do not close their round as well: a closed round's new state stands for
        them, and nobody reads them again.
        """
        closed = any(isinstance(row, Closed) for row in self.rows)
        spool.sync(self.files if closed else self.files + self.updates)
        return sum(spool.ref(digest).size for digest in self.files + self.updates)


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
        resumed: The instant `issued` where an earlier life of the coordinator issued the round; nobody knows how long ago.
        vain: Rounds in a row that everybody refused.
    """

    deadline: float = float("inf")
    retry: float = 0.0
    issued: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    clearing: tuple[BlobRef, ...] = ()
    bytes_old: int = 0
    rounds_old: int = 0
    resumed: float = -1.0
    vain: int = 0

    def turn(self, now: float) -> float:
        """Give the seconds since the open round was issued; 0, which means not known, where that was in an earlier life."""
        return 0.0 if self.issued == self.resumed else now - self.issued

    def abandoned(self, now: float, current: Round) -> float:
        """Give the seconds until another round may be planned, after this one was given up.

        None, unless everybody refused: whoever cannot take part would refuse the next round just as fast, and all rounds would
        be gone before anybody has read why. So each such round in a row doubles the wait, up to `_SECONDS_VAIN_MOST`.
        """
        self.vain = self.vain + 1 if current.refused == len(current.seats) else 0
        wait = min(_SECONDS_VAIN_MOST, _SECONDS_VAIN * 2.0 ** min(self.vain - 1, 20)) if self.vain else 0.0
        self.retry = now + wait
        return wait
