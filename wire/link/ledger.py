"""What a link has to remember over reconnections, as plain bookkeeping without a socket.

`Inbox` collects events, `Outbox` what the broker has not answered for, `Wishes` the subscriptions, `Receipts` the
deliveries that are not done, `Backoff` the time of the next attempt.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

FILTERS = 8
"""Most filters in one SUBSCRIBE: the least of all brokers' limits."""


class Inbox:
    """Events for the owner, and a socket that becomes readable when another thread adds one."""

    def __init__(self) -> None:
        """Open the pair of sockets."""
        self.events: deque[object] = deque()
        self.reader, self._writer = socket.socketpair()
        self.reader.setblocking(False)
        self._writer.setblocking(False)
        self._rung = False

    def post(self, event: object) -> None:
        """Add an event and wake the owner; safe in any thread and in a signal handler."""
        self.events.append(event)
        self.ring()

    def ring(self) -> None:
        """Wake the owner. One byte is enough however many events there are."""
        if not self._rung:
            self._rung = True
            try:
                self._writer.send(b"\0")
            except OSError:  # stopped, or already full of wake-ups
                return

    def quiet(self) -> None:
        """Take the wake-up, before looking at `events`: what is posted in between rings again."""
        with contextlib.suppress(BlockingIOError):
            self.reader.recv(64)
        self._rung = False

    def close(self) -> None:
        """Give the sockets back."""
        self.reader.close()
        self._writer.close()


@dataclass(frozen=True, slots=True)
class Parcel:
    """A QoS 1 message that the broker does not have yet."""

    id: int
    topic: str
    payload: bytes
    retain: bool
    seconds_expiry: int | None


class Outbox:
    """Messages that wait, and the few that are under way, by the number that the transport gave them.

    Nothing waits twice: whoever repeats a message through an outage has it sent once at its end, and of what a broker keeps
    (one value for each topic) the last alone. So an outage takes as much memory as there are different things to say,
    however long it is.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._waiting: OrderedDict[str | tuple[str, bytes], Parcel] = OrderedDict()
        self.flying: dict[int, int] = {}
        self.window = 20
        self.packet_max = 0
        self._last = 0

    def new_id(self) -> int:
        """Name the next message."""
        self._last += 1
        return self._last

    def greet(self, receive_max: int | None, packet_max: int | None) -> None:
        """Take the limits that a broker states when it accepts us; None means that it states none."""
        self.window = max(1, min(20, receive_max or 20))
        self.packet_max = packet_max or 0

    def add(self, parcel: Parcel) -> int:
        """Let a message wait behind the others, or in the place of one that says no more; give the name that it has here."""
        place = _place(parcel)
        known = self._waiting.get(place, parcel)
        self._waiting[place] = replace(parcel, id=known.id)
        return known.id

    def hurry(self, parcel: Parcel) -> int:
        """The same, but before the others."""
        number = self.add(parcel)
        self._waiting.move_to_end(_place(parcel), last=False)
        return number

    def ready(self) -> Parcel | None:
        """Take the next message if there is one and the broker may get it now."""
        return self._waiting.popitem(last=False)[1] if self._waiting and len(self.flying) < self.window else None

    def fits(self, parcel: Parcel) -> bool:
        """Whether the broker would take it; a packet beyond its limit costs the connection, again and again."""
        return not self.packet_max or len(parcel.topic) * 3 + len(parcel.payload) + 32 <= self.packet_max


def _place(parcel: Parcel) -> str | tuple[str, bytes]:
    """Name what one message of a kind is enough of."""
    return parcel.topic if parcel.retain else (parcel.topic, parcel.payload)


class Wishes:
    """Which topics are wanted, and which of these the broker still has to be told of."""

    def __init__(self) -> None:
        """Start with none."""
        self._wanted: dict[str, int] = {}
        self._to_add: dict[str, int] = {}
        self._to_drop: dict[str, None] = {}
        self._asked: dict[int, tuple[str, ...]] = {}

    def add(self, topics: Sequence[str], qos: int) -> None:
        """Want `topics`."""
        for topic in topics:
            self._wanted[topic] = self._to_add[topic] = qos

    def drop(self, topics: Sequence[str]) -> None:
        """No longer want `topics`."""
        for topic in topics:
            self._to_add.pop(topic, None)
            if self._wanted.pop(topic, None) is not None:
                self._to_drop[topic] = None

    def renew(self, session_present: bool) -> None:
        """Start over with a broker: what it never confirmed, or all if it knows nothing of us."""
        if not session_present:
            self._to_add = dict(self._wanted)
            self._to_drop.clear()
        for topics in self._asked.values():
            for topic in topics:
                if topic in self._wanted:
                    self._to_add[topic] = self._wanted[topic]
                elif session_present:
                    self._to_drop[topic] = None
        self._asked.clear()

    def drops(self) -> list[str]:
        """Take the next filters to leave; these go first, so that leaving and coming back works."""
        return [self._to_drop.popitem()[0] for _ in range(min(FILTERS, len(self._to_drop)))]

    def adds(self) -> list[tuple[str, int]]:
        """Take the next filters to ask for, in the order in which they were wanted."""
        batch = list(self._to_add.items())[:FILTERS]
        for topic, _ in batch:
            del self._to_add[topic]
        return batch

    def asked(self, number: int, topics: Sequence[str]) -> None:
        """Note under which number the broker will answer."""
        self._asked[number] = tuple(topics)

    def answered(self, number: int) -> tuple[str, ...]:
        """Take the filters that an answer is about."""
        return self._asked.pop(number, ())


class Receipts:
    """Deliveries in order of arrival. MQTT wants receipts in that order, and some brokers hang up otherwise."""

    def __init__(self) -> None:
        """Start with none, before the first connection."""
        self._life = 0
        self._open: dict[int, bool] = {}

    def renew(self) -> None:
        """Forget all: a new connection delivers them again."""
        self._life += 1
        self._open.clear()

    def take(self, number: int) -> int:
        """Note a delivery and return its token."""
        token = self._life << 16 | number
        self._open[token] = False
        return token

    def done(self, token: int) -> list[int]:
        """Mark a delivery; return the numbers whose receipt may go out now.

        Tokens of an older connection count nothing.
        """
        if token in self._open:
            self._open[token] = True
        numbers = []
        while self._open:
            first = next(iter(self._open))
            if not self._open[first]:
                break
            del self._open[first]
            numbers.append(first & 0xFFFF)
        return numbers


class Backoff:
    """When to try next: at once, then ever later, with jitter so that a fleet does not come back in one instant."""

    LEAST = 0.2
    MOST = 30.0
    CALM = 5.0
    GROWTH = 1.5  # coming back takes about half as long again as the outage; doubling costs twice that

    def __init__(self) -> None:
        """The first attempt is due now."""
        self.at = 0.0
        self._delay = 0.0
        self._up_at: float | None = None

    def up(self, now: float) -> None:
        """Note a success. It only counts once it has lasted: a broker that hangs up at once is no success."""
        self._up_at = now

    def fail(self, now: float) -> None:
        """Note the end of a connection or of an attempt, and set the time of the next one."""
        if self._up_at is not None and now - self._up_at >= self.CALM:
            self._delay = 0.0
        self._up_at = None
        self._delay = min(self.MOST, max(self.LEAST, self._delay * self.GROWTH))
        self.at = now + self._delay * (0.5 + int.from_bytes(os.urandom(2), "big") / 131_072)
