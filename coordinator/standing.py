"""Where a run stands, folded from its journal: everything that a coordinator needs to go on after kill -9."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from immutables import Map

from coordinator.events import Arrived, Born, Deadline, Issued, Lost, Refused, Stopped
from coordinator.fleet import memory_scale, oom_scale
from coordinator.journal import (
    Abandoned,
    Cleared,
    Closed,
    Entry,
    Evaluated,
    Finished,
    Planned,
    Published,
    Record,
    RunStarted,
)
from coordinator.round import Round, open_round, step
from wire.messages import BlobRef, Order

_NO_BLOBS: Map[str, BlobRef] = Map()
_NO_SCALES: Map[str, float] = Map()


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a run stands.

    Attributes:
        started: How the run began; None for an empty journal.
        state: Digest of the algorithm's latest state; empty when there is none.
        round: The last round that was planned, with its seats and replies as they were; None before the first. Give it
            to `open_round` as `earlier`, so that lost receipts of counted replies can be repeated.
        orders: That round's orders by device.
        done: Number of the last round that was closed or abandoned for good. When `round` is over and its number is
            higher, its `Close` or `Abandon` has still to be carried out: step `Resumed`.
        live: Blobs whose pieces may be at the broker, by digest.
        scales: Device to its `Device.memory_scale`.
        finished: Whether the run has ended; one that is given more rounds goes on.
        closed: Rounds that were closed: where there is none, the state is what the run began with.
    """

    started: RunStarted | None = None
    state: str = ""
    round: Round | None = None
    orders: Mapping[str, Order] = field(default_factory=dict)
    done: int = 0
    live: Map[str, BlobRef] = _NO_BLOBS
    scales: Map[str, float] = _NO_SCALES
    finished: bool = False
    closed: int = 0

    @property
    def settled(self) -> bool:
        """Whether there is no round that is open, or whose end has still to be carried out."""
        return self.round is None or self.done >= self.round.number


def fold(entries: Iterable[Entry]) -> Standing:
    """Fold a journal from its beginning. Cost: linear in its rows."""
    standing = Standing()
    for entry in entries:
        standing = absorb(standing, entry.record)
    return standing


def absorb(standing: Standing, record: Record) -> Standing:
    """Fold one record. Cost: O(log devices), for `Planned` O(devices)."""
    match record:
        case RunStarted():
            return Standing(started=record, state=record.state, live=standing.live, scales=standing.scales)
        case Planned():
            return _planned(standing, record)
        case Arrived() | Refused() | Lost() | Born() | Deadline() | Stopped():
            return _happened(standing, record)
        case Published():
            return replace(standing, live=standing.live.update({ref.digest: ref for ref in record.blobs}))
        case Cleared():
            gone = set(record.digests)
            return replace(standing, live=Map({d: ref for d, ref in standing.live.items() if d not in gone}))
        case Closed():
            closed = standing.closed + 1
            return replace(standing, done=record.round, state=record.state or standing.state, closed=closed)
        case Abandoned():
            return replace(standing, done=record.round)
        case Finished():
            return replace(standing, finished=True)
        case Evaluated():
            return standing


def _planned(standing: Standing, record: Planned) -> Standing:
    run = standing.started.run if standing.started is not None else ""
    planned = open_round(
        record.round,
        run,
        {order.device: order.id for order in record.orders},
        quorum=record.quorum,
        seconds=record.seconds,
        earlier=standing.round,
    )
    opened, _ = step(planned, Issued(0.0))
    orders = {order.device: order for order in record.orders}
    return replace(standing, round=opened, orders=orders, state=record.state or standing.state, finished=False)


def _happened(standing: Standing, record: Arrived | Refused | Lost | Born | Deadline | Stopped) -> Standing:
    if standing.round is None:
        return standing
    # A journalled deadline is one that took effect; the clock that it was read from may be gone.
    event = Deadline(float("inf")) if isinstance(record, Deadline) else record
    after, _ = step(standing.round, event)
    scales = standing.scales
    order = standing.orders.get(record.device) if isinstance(record, Arrived | Refused) else None
    if isinstance(record, Arrived | Refused) and order is not None and order.id == record.order:
        known = scales.get(record.device, 1.0)
        if isinstance(record, Arrived):
            scales = scales.set(record.device, memory_scale(known, record.reply.usage, order.bytes_peak))
        elif record.refusal.reason == "oom":
            scales = scales.set(record.device, oom_scale(known, record.refusal.bytes_needed, order.bytes_peak))
    return replace(standing, round=after, scales=scales)
