"""The coordinator's half of the storm: the real round, fleet and fold in a small shell, and a lawless bus.

Nothing here knows a clock or a socket; one seeded `random.Random` decides what is delivered next and how often, what is
lost with a broker, and at which line of its turn the coordinator is killed.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from coordinator.events import (
    Abandon,
    Arm,
    Arrived,
    Close,
    Deadline,
    Effect,
    Event,
    Issued,
    Refused,
    Resumed,
    Send,
    Settle,
    Unwanted,
)
from coordinator.fleet import Fleet
from coordinator.journal import Abandoned, Closed, Entry, Planned, Record, RunStarted
from coordinator.round import Round, open_round, step, word
from coordinator.standing import Standing, absorb, fold
from tests.support.messages import RUN, an_order
from wire.messages import Ack, Beat, Lead, Presence, Refusal, Reply

SECONDS = 50.0


@dataclass(frozen=True, slots=True)
class Piece:
    """One piece of an update."""

    order: str
    index: int


@dataclass(frozen=True, slots=True)
class Letter:
    """A message on the bus; `to` is a device's name, empty for the coordinator."""

    to: str
    sender: str
    message: Any


@dataclass(frozen=True, slots=True)
class More:
    """Acknowledge the pieces of an upload that are durable by then."""

    device: str
    order: str


class Bus:
    """Letters in no order at all. Retained presences and the retained lead survive; QoS 1 letters may not."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.letters: list[Letter] = []
        self.presences: dict[str, Presence] = {}
        self.lead: Lead | None = None
        self.stormy = True

    def post(self, to: str, sender: str, message: Any) -> None:
        self.letters.append(Letter(to, sender, message))
        if self.stormy and self.rng.random() < 0.1:
            self.letters.append(Letter(to, sender, message))

    def present(self, presence: Presence) -> None:
        self.presences[presence.device] = presence
        self.post("", presence.device, presence)

    def take(self) -> Letter | None:
        if not self.letters:
            return None
        index = self.rng.randrange(len(self.letters)) if self.stormy else 0
        letter = self.letters.pop(index)
        if self.stormy and self.rng.random() < 0.05:
            self.letters.append(letter)  # it will come again, later
        return letter

    def killed(self) -> None:
        self.letters = [letter for letter in self.letters if self.rng.random() < 0.5]


class Disk(Protocol):
    """What the storm needs of a `Journal`."""

    def append(self, records: Sequence[Record]) -> int:
        """Keep a batch."""

    def replay(self) -> Iterable[Entry]:
        """Give everything back."""


class Memory:
    """A journal without a file: fast, and nothing of it is lost in a kill."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []

    def append(self, records: Sequence[Record]) -> int:
        self._entries += [Entry(len(self._entries) + i, 0.0, 0, record) for i, record in enumerate(records, 1)]
        return len(self._entries)

    def replay(self) -> Iterable[Entry]:
        return iter(self._entries)


@dataclass(slots=True)
class Shell:
    """The coordinator's shell in small: batches, files before rows before messages, and a disk that survives kills.

    Attributes:
        bus: Where messages go.
        disk: The journal.
        durable: Pieces by order that survive a kill, like the spool's partial files; only these are acknowledged.
        pieces: Pieces by order as far as this life knows.
        closing: What the child that aggregates works on; a kill takes it along.
        history: Every effect that was performed, for the laws.
    """

    bus: Bus
    disk: Disk
    rounds: int
    quorum: int | None
    now: float = 0.0
    boot: int = 0
    deadline: float = float("inf")
    durable: dict[str, frozenset[int]] = field(default_factory=dict)
    pieces: dict[str, set[int]] = field(default_factory=dict)
    offers: dict[str, Reply] = field(default_factory=dict)
    standing: Standing = field(default_factory=Standing)
    live: Round | None = None
    fleet: Fleet = field(default_factory=Fleet)
    rows: list[Record] = field(default_factory=list)
    pending: list[Effect | More] = field(default_factory=list)
    following: Round | None = None
    closing: Close | None = None
    history: list[Effect | More] = field(default_factory=list)
    steps: int = 0

    def start(self) -> None:
        """Begin a life from what the disk says."""
        self.boot += 1
        self.standing = fold(self.disk.replay())
        self.live = self.standing.round
        self.fleet = Fleet(scales=self.standing.scales)
        self.rows, self.pending, self.offers, self.following = [], [], {}, None
        self.pieces = {order: set(have) for order, have in self.durable.items()}
        self.closing = None
        self.deadline = float("inf")
        if self.bus.stormy and self.bus.rng.random() < 0.3:
            self.now = 0.0  # the machine was restarted, and its clock with it
        if self.standing.started is None:
            self.rows.append(RunStarted(RUN))
        self.bus.lead = Lead("online", f"{self.boot:016x}", RUN)
        for presence in self.bus.presences.values():
            self.bus.post("", presence.device, presence)
        if self.live is not None and self.standing.done < self.live.number:
            self.happen(Resumed(self.now))

    def happen(self, event: Event) -> None:
        if self.live is None:
            return
        before = self.live
        self.live, effects = step(before, event)
        self.steps += 1
        if self.live is not before and not isinstance(event, Issued | Resumed):
            self.rows.append(event)
        self.pending += effects
        for effect in effects:
            if isinstance(effect, Close):
                self.closing = effect
            elif isinstance(effect, Abandon):
                self.rows.append(Abandoned(self.live.number, effect.why))
        if self.live.over and not before.over:
            self.judge(event)

    def judge(self, event: Event) -> None:
        """A round ends by its deadline, or when nobody that is here has still to answer."""
        assert self.live is not None
        if isinstance(event, Deadline):
            assert self.now >= self.deadline
            return
        for name, seat in self.live.seats.items():
            device = self.fleet.devices.get(name)
            assert seat.state in ("arrived", "refused") or device is None or device.state != "online", seat

    def hear(self, sender: str, message: Any) -> None:
        match message:
            case Presence():
                self.fleet, told = self.fleet.present(message, self.now)
                if told is not None:
                    self.happen(told)
            case Beat():
                self.fleet, born = self.fleet.beat(sender, message, self.now)
                if born is not None:
                    self.happen(born)
            case Refusal():
                self.happen(Refused(sender, message.order, message))
            case Reply() if message.device == sender and self.live is not None:
                self.offered(message)
            case Piece():
                self.received(sender, message)
            case _:
                pass

    def offered(self, reply: Reply) -> None:
        assert self.live is not None
        said = word(self.live, reply.device, reply.order)
        if said != "more":
            receipt = Settle if said == "committed" else Unwanted
            self.pending.append(receipt(reply.device, reply.order))
            return
        self.offers[reply.order] = reply
        self.completed(reply)

    def received(self, sender: str, piece: Piece) -> None:
        reply = self.offers.get(piece.order)
        if reply is None or reply.device != sender:
            return
        self.pieces.setdefault(piece.order, set()).add(piece.index)
        self.completed(reply)

    def completed(self, reply: Reply) -> None:
        have = self.pieces.get(reply.order, set())
        if reply.update is None or len(have) == reply.update.pieces:
            del self.offers[reply.order]
            self.happen(Arrived(reply.device, reply.order, reply))
        else:
            self.pending.append(More(reply.device, reply.order))

    def tick(self, rng: random.Random, patience: float) -> None:
        """Look at the clock: silence, deadline, the child that aggregates, the next round."""
        if self.closing is not None and self.live is not None and (rng.random() < 0.5 or not self.bus.stormy):
            self.rows.append(Closed(self.live.number, "a" * 64, self.closing.devices))
            self.closing = None
        self.fleet, lost = self.fleet.expire(self.now, patience)
        for event in lost:
            self.happen(event)
        if self.now >= self.deadline or (self.bus.stormy and rng.random() < 0.05):
            self.happen(Deadline(self.now))
        here = [d.name for d in self.fleet.online()]
        settled = self.live is None or self.standing.done >= self.live.number
        if settled and here and not self.rows and self.standing.done < self.rounds:
            chosen = here if rng.random() < 0.7 else rng.sample(here, rng.randint(1, len(here)))
            number = self.standing.done + 1
            orders = tuple(an_order(name, number) for name in sorted(chosen))
            self.rows.append(Planned(number, "", orders, self.quorum, SECONDS))
            ids = {order.device: order.id for order in orders}
            self.following = open_round(number, RUN, ids, quorum=self.quorum, seconds=SECONDS, earlier=self.live)

    def flush(self, crash: str = "") -> None:
        """End a turn: rows, then messages. A crash may come before the rows, or at any message after them."""
        if crash == "before rows":
            return
        rows, self.rows = self.rows, []
        self.disk.append(rows)
        for row in rows:
            self.standing = absorb(self.standing, row)
        if crash == "after rows":
            return
        pending, self.pending = self.pending, []
        for count, effect in enumerate(pending):
            if crash == "between messages" and count >= len(pending) // 2:
                return
            self.perform(effect)
        if self.following is not None:
            self.live, self.following = self.following, None
            self.happen(Issued(self.now))
            self.flush(crash)

    def perform(self, effect: Effect | More) -> None:
        self.history.append(effect)
        match effect:
            case More():
                have = frozenset(self.pieces.get(effect.order, ()))
                self.durable[effect.order] = have
                self.bus.post(effect.device, "", Ack(effect.order, "more", bitmap(have)))
            case Arm():
                self.deadline = effect.at
            case Send():
                self.bus.post(effect.device, "", self.standing.orders[effect.device])
            case Settle():
                self.bus.post(effect.device, "", Ack(effect.order, "committed"))
            case Unwanted():
                self.bus.post(effect.device, "", Ack(effect.order, "unwanted"))
            case Close() | Abandon():
                pass

    @property
    def done(self) -> bool:
        return self.standing.done >= self.rounds and not self.rows and not self.pending and self.closing is None


def bitmap(have: frozenset[int]) -> bytes:
    return sum(1 << i for i in have).to_bytes(8, "little")
