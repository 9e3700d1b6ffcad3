"""What happened, append-only, in one SQLite file: the only thing that a coordinator needs to go on after a crash.

One writer appends; any number of viewers (page, status, demo) read the same file while it grows. `append` is one
transaction and one fsync for a whole batch, so the shell collects what one turn of its loop brought and pays once. The
file is in WAL mode with ``synchronous=FULL``: what `append` returned for survives kill -9 and a power cut. The module
`standing` folds the records back into what a restart needs.
"""

from __future__ import annotations

import sqlite3
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self

import msgpack

from coordinator import rows
from coordinator.events import Arrived, Born, Deadline, Lost, Refused, Stopped
from coordinator.facts import FACTS_MAX
from wire.errors import Malformed, StoreError
from wire.messages import BlobRef, Order
from wire.schema import Amount, Digest, Limit, Name, Natural, Text, Token, from_plain, to_plain

_SQUEEZE_BYTES = 2048
_RECORD_BYTES_MAX = 256 << 20


@dataclass(frozen=True, slots=True)
class RunStarted:
    """A run begins; what stood before belongs to an earlier one.

    Attributes:
        run: Its token.
        config: Digest of what the operator asked for, so that a restart can tell another request.
        state: Digest of the state before the first round; may be empty until `Planned` names one.
        about: For viewers: algorithm, model, seed and the like.
    """

    run: Token
    config: str = ""
    state: str = ""
    about: Mapping[str, str | int | float | bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Published:
    """These blobs are about to be retained at the broker in pieces; journalled before the first piece goes out."""

    blobs: tuple[BlobRef, ...]


@dataclass(frozen=True, slots=True)
class Cleared:
    """The pieces of these blobs were deleted at the broker; journalled after the last one."""

    digests: tuple[Digest, ...]


@dataclass(frozen=True, slots=True)
class Planned:
    """A round is laid out; its orders may go out as soon as this is durable.

    Attributes:
        round: From 1.
        state: Digest of the algorithm's state after planning.
        orders: One per device.
        quorum: As given to `round.open_round`.
        seconds: As given to `round.open_round`.
    """

    round: Natural
    state: str
    orders: tuple[Order, ...]
    quorum: Natural | None
    seconds: Amount


@dataclass(frozen=True, slots=True)
class Closed:
    """A round's replies are in the state `state`, whose blob is durable.

    Attributes:
        round: From 1.
        state: Digest of the algorithm's state after closing (or after planning on, when that is one step).
        devices: Whose replies were counted.
        seconds: From the round's issue to here.
        bytes_up: Topics and payload that the link received meanwhile; of a simulated round, bytes of the updates.
        bytes_down: Likewise sent: pieces once for all devices; of a simulated round, what all devices fetched together.
        facts: What the algorithm tells of the round (`coordinator.facts`).
    """

    round: Natural
    state: str
    devices: tuple[Name, ...]
    seconds: Amount = 0.0
    bytes_up: Natural = 0
    bytes_down: Natural = 0
    facts: Annotated[Mapping[Name, float], Limit(0, FACTS_MAX)] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Abandoned:
    """A round was given up; the state stays."""

    round: Natural
    why: Text = ""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The model after a round was measured: ``accuracy.K``, ``loss.K`` for each width K."""

    round: Natural
    metrics: Mapping[Name, float]


@dataclass(frozen=True, slots=True)
class Finished:
    """The run has ended, and goes on only if it is given more rounds."""

    why: Text = ""


Record = (
    RunStarted
    | Published
    | Cleared
    | Planned
    | Arrived
    | Refused
    | Lost
    | Born
    | Deadline
    | Stopped
    | Closed
    | Abandoned
    | Evaluated
    | Finished
)

KINDS: Mapping[str, type[Record]] = {
    "run": RunStarted,
    "published": Published,
    "cleared": Cleared,
    "planned": Planned,
    "arrived": Arrived,
    "refused": Refused,
    "lost": Lost,
    "born": Born,
    "deadline": Deadline,
    "stopped": Stopped,
    "closed": Closed,
    "abandoned": Abandoned,
    "evaluated": Evaluated,
    "finished": Finished,
}
"""Kind of a row to its class."""

_NAMES = {cls: kind for kind, cls in KINDS.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """One row.

    Attributes:
        seq: From 1, without gaps.
        seconds_wall: When it was appended, by the wall clock; for people only.
        round: The round that was planned last, 0 before the first one, or the record's own.
        record: What happened.
    """

    seq: int
    seconds_wall: float
    round: int
    record: Record


class Journal:
    """The file. One thread uses it; a second writer is refused."""

    def __init__(self, path: Path, *, viewing: bool = False, clock: Callable[[], float] = time.time) -> None:
        """Open the journal, or create it when it is not there and `viewing` is false.

        Args:
            path: The file; two neighbours with the endings ``-wal`` and ``-shm`` belong to it.
            viewing: Read only, beside a writer or without one.
            clock: Gives the wall time of the rows.

        Raises:
            StoreError: The file is missing (viewing), foreign, damaged, of a newer version, held by another writer, or
                not for this user.
        """
        self.path = path
        self._viewing = viewing
        self._clock = clock
        self._lock = -1 if viewing else rows.lock(path)
        try:
            self._rows, self._round, self._mark = rows.opened(path, viewing)
        except BaseException:
            rows.unlock(self._lock)
            raise

    def append(self, records: Sequence[Record]) -> int:
        """Make a batch durable: one transaction, one fsync; nothing at all for an empty batch.

        Returns:
            The `Entry.seq` of the last row of the file.

        Raises:
            StoreError: The disk is full or failing; none of the batch is in the file then.
        """
        if not records:
            return self.last()
        now = self._clock()
        lines = []
        for record in records:
            if isinstance(record, Planned):
                self._round = record.round
            lines.append((now, getattr(record, "round", self._round), _NAMES[type(record)], _pack(record)))
        try:
            self._rows.execute("BEGIN IMMEDIATE")
            self._rows.executemany("INSERT INTO record (seconds_wall, round, kind, body) VALUES (?, ?, ?, ?)", lines)
            self._rows.execute("COMMIT")
        except sqlite3.Error as error:
            if self._rows.in_transaction:
                self._rows.execute("ROLLBACK")
            raise StoreError(f"{self.path}: cannot write: {error}; {rows.DISK}") from error
        return self.last()

    def replay(self, after: int = 0) -> Iterator[Entry]:
        """Read the rows with a higher `Entry.seq` than `after`, oldest first, one in memory at a time.

        Raises:
            StoreError: A row cannot be read.
        """
        query = "SELECT seq, seconds_wall, round, kind, body FROM record WHERE seq > ? ORDER BY seq"
        try:
            for seq, seconds, number, kind, body in self._rows.execute(query, (after,)):
                yield Entry(seq, seconds, number, self._unpack(seq, kind, body))
        except sqlite3.Error as error:
            self._look()
            raise rows.unreadable(self.path, error) from error
        self._look()

    def last(self) -> int:
        """Give the highest `Entry.seq`; 0 when there is none. Viewers poll it: no row is decoded."""
        self._look()
        try:
            return int(self._rows.execute("SELECT coalesce(max(seq), 0) FROM record").fetchone()[0])
        except sqlite3.Error as error:
            raise rows.unreadable(self.path, error) from error

    def close(self) -> None:
        """Fold the WAL into the file and let another writer in."""
        self._rows.close()
        rows.unlock(self._lock)
        self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _look(self) -> None:
        """See that nobody writes a file that was opened as one that nobody writes."""
        if self._mark is not None and self._mark != rows.mark(self.path):
            raise StoreError(f"{self.path}: a coordinator began to write it meanwhile; ask again")

    def _unpack(self, seq: int, kind: str, body: bytes) -> Record:
        cls = KINDS.get(kind)
        if cls is None:
            raise StoreError(f"{self.path}: row {seq} is a {kind!r}, which this version does not know; use a newer one")
        try:
            return _parse(cls, body)
        except (Malformed, ValueError, TypeError, zlib.error, msgpack.UnpackException) as error:
            self._look()
            raise rows.unreadable(self.path, error, f"row {seq}: ") from error


def _pack(record: Record) -> bytes:
    body: bytes = msgpack.packb(to_plain(record))
    return zlib.compress(body, 1) if len(body) > _SQUEEZE_BYTES else body


def _parse(cls: type[Record], body: bytes) -> Record:
    if body[:1] == b"\x78":  # zlib's first byte; a msgpack map never begins so
        stream = zlib.decompressobj()
        body = stream.decompress(body, _RECORD_BYTES_MAX)
        if not stream.eof:
            raise ValueError("the compressed row is cut off or too large")
    plain: Any = msgpack.unpackb(body)
    return from_plain(cls, plain)
