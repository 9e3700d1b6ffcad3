"""Links within one process, over a make-believe broker with a virtual clock: for simulation and for storms by seed.

`Hub` keeps what a broker keeps (subscriptions, sessions, retained messages, wills) and does one thing per `Hub.step`, in
order of virtual time. Nothing waits and nothing is random but by the seed, so a run can be had again, byte by byte.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from wire.link import Down, Farewell, Link, Message, Published, Up, Will

UNDONE_MAX = 16


@dataclass(frozen=True, slots=True)
class Chaos:
    """How bad the network is. Chances are per delivery; all 0 is a network without faults.

    Attributes:
        drop: Chance that the broker loses a message that it has acknowledged, as when it is killed.
        duplicate: Chance that a message comes twice.
        reorder: Chance that a message overtakes those that already wait for the same receiver.
        disconnect: Chance that the receiver's connection breaks instead, and its last will is published.
        seconds_delay: Greatest delay of each hop.
        seconds_away: Greatest time until a broken connection is back.
    """

    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    disconnect: float = 0.0
    seconds_delay: float = 0.001
    seconds_away: float = 1.0


@dataclass(frozen=True, slots=True)
class Letter:
    """One message inside the broker."""

    topic: str
    payload: bytes
    retain: bool
    expires: float | None


@dataclass(frozen=True, slots=True)
class Client:
    """Who a link is at the broker: its name, how long it is remembered while away, and its last will."""

    name: str
    session_seconds: float
    will: Will | None


@dataclass(slots=True)
class Session:
    """What the broker keeps of one client; `link` is None while the client is away."""

    filters: dict[str, None] = field(default_factory=dict)
    queue: deque[tuple[Letter, bool]] = field(default_factory=deque)
    undone: dict[int, tuple[Letter, bool]] = field(default_factory=dict)
    link: MemoryLink | None = None
    left: float = 0.0


class Hub:
    """The broker and the clock. Cost of a publish: one look-up per exact topic, one match per wildcard subscription."""

    def __init__(self, seed: int = 0, chaos: Chaos | None = None) -> None:
        """Start at time 0 with nothing."""
        self.now = 0.0
        self.chaos = chaos or Chaos()
        self.retained: dict[str, Letter] = {}
        self.sessions: dict[str, Session] = {}
        self._random = random.Random(seed)
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._exact: dict[str, dict[str, None]] = {}
        self._wild: dict[tuple[str, str], tuple[str, ...]] = {}
        self._count = 0

    def link(self, client_id: str, *, session_seconds: float = 3600.0, will: Will | None = None) -> MemoryLink:
        """Make a client. A second one of the same name throws the first one out when it starts."""
        return MemoryLink(self, Client(client_id, session_seconds, will))

    def step(self) -> bool:
        """Do the next thing, moving the clock to it. False when there is nothing left to do."""
        if not self._agenda:
            return False
        self.now, _, action = heapq.heappop(self._agenda)
        action()
        return True

    def run(self, until: float) -> None:
        """Do everything that is due up to a time, and move the clock there."""
        while self._agenda and self._agenda[0][0] <= until:
            self.step()
        self.now = max(self.now, until)

    def next_at(self) -> float | None:
        """Time of the next thing to do."""
        return self._agenda[0][0] if self._agenda else None

    def later(self, action: Callable[[], None], seconds: float = 0.0, not_before: float = 0.0) -> float:
        """Put something on the agenda, after `seconds` and a hop's delay; give its time."""
        self._count += 1
        at = max(not_before, self.now + seconds + self._random.random() * self.chaos.seconds_delay)
        heapq.heappush(self._agenda, (at, self._count, action))
        return at

    def cut(
        self, client_id: str, seconds: float | None = None, why: str = "the connection broke", *, will: bool = True
    ) -> None:
        """Break a client's connection; it is back after `seconds`, or never by itself (None: its process was killed)."""
        session = self.sessions.get(client_id)
        if session is None or session.link is None:
            return
        gone, session.link, session.left = session.link, None, self.now
        session.queue.extendleft(reversed(session.undone.values()))
        session.undone.clear()
        gone.broken(why)
        last = gone.client.will
        if will and last is not None:
            self.route(Letter(last.topic, last.payload, last.retain, None))
        if seconds is not None:
            self.later(partial(self.greet, gone), seconds)

    def forget(self, seconds: float = 0.1) -> None:
        """Kill the broker and start it again without its memory: no sessions, no retained messages, no wills."""
        links = [session.link for session in self.sessions.values() if session.link is not None]
        for table in (self.sessions, self.retained, self._exact, self._wild):
            table.clear()
        for link in links:
            link.broken("the broker was killed")
            self.later(partial(self.greet, link), seconds)

    def greet(self, link: MemoryLink) -> None:
        """Let a client in."""
        if link.state in ("stopped", "up"):
            return
        session = self.sessions.get(link.client.name)
        if session is not None and session.link is not None and session.link is not link:
            self.cut(link.client.name, None, "another client of this name took over")
        if session is not None and session.link is None and self.now - session.left > link.client.session_seconds:
            self.unsubscribe(link.client.name, list(session.filters))
            session = None
        known = session is not None
        if session is None:
            session = self.sessions[link.client.name] = Session()
        session.link = link
        link.accepted(known)
        self._wake(link.client.name)

    def arrive(self, sender: MemoryLink, life: int, number: int, letter: Letter) -> None:
        """Take a message from a client, unless the connection broke on the way (the client sends it again)."""
        if sender.state == "up" and sender.life == life:
            self.route(letter)
            sender.heard = self.later(lambda: sender.receipt(life, number), not_before=sender.heard)

    def route(self, letter: Letter) -> None:
        """Keep a message if it is to be retained, and queue it for everybody who wants it."""
        if letter.retain:
            if letter.payload:
                self.retained[letter.topic] = letter
            else:
                self.retained.pop(letter.topic, None)
        levels = letter.topic.split("/")
        wanting = dict(self._exact.get(letter.topic, ()))
        wanting.update((client, None) for (client, _), parts in self._wild.items() if _matches(parts, levels))
        for client in wanting:
            self._queue(client, letter, retained=False)

    def subscribe(self, client_id: str, topics: Sequence[str]) -> None:
        """Add subscriptions and send what is retained there."""
        for topic in topics:
            self.sessions[client_id].filters[topic] = None
            parts = tuple(topic.split("/"))
            if "+" in parts or "#" in parts:
                self._wild[client_id, topic] = parts
                found = [letter for name, letter in self.retained.items() if _matches(parts, name.split("/"))]
            else:
                self._exact.setdefault(topic, {})[client_id] = None
                found = [self.retained[topic]] if topic in self.retained else []
            for letter in found:
                self._queue(client_id, letter, retained=True)

    def unsubscribe(self, client_id: str, topics: Sequence[str]) -> None:
        """Take subscriptions away."""
        for topic in topics:
            self.sessions[client_id].filters.pop(topic, None)
            self._wild.pop((client_id, topic), None)
            self._exact.get(topic, {}).pop(client_id, None)

    def _queue(self, client_id: str, letter: Letter, *, retained: bool) -> None:
        chance = self._random.random
        if chance() < self.chaos.drop:
            return
        queue = self.sessions[client_id].queue
        for _ in range(2 if chance() < self.chaos.duplicate else 1):
            if queue and chance() < self.chaos.reorder:
                queue.insert(self._random.randrange(len(queue)), (letter, retained))
            else:
                queue.append((letter, retained))
        self._wake(client_id)

    def _wake(self, client_id: str) -> None:
        self.later(lambda: self.deliver(client_id))

    def deliver(self, client_id: str) -> None:
        """Hand over what waits for a client, up to the sixteen that it has not done with."""
        session = self.sessions.get(client_id)
        while session is not None and session.link is not None and session.queue and len(session.undone) < UNDONE_MAX:
            if self.chaos.disconnect and self._random.random() < self.chaos.disconnect:
                self.cut(client_id, self._random.random() * self.chaos.seconds_away)
                return
            letter, retained = session.queue.popleft()
            if letter.expires is None or letter.expires > self.now:
                token = session.link.take(letter, retained=retained)
                session.undone[token] = (letter, retained)


class MemoryLink:
    """A `Link` to a `Hub`. `next` never waits: whoever runs the hub moves the clock."""

    def __init__(self, hub: Hub, client: Client) -> None:
        """Prepare; nothing happens before `start`."""
        self.bytes_sent = 0
        self.bytes_received = 0
        self.client = client
        self.state = "new"
        self.life = 0
        self.heard = 0.0
        self._hub = hub
        self._events: deque[object] = deque()
        self._filters: dict[str, None] = {}
        self._open: dict[int, Letter] = {}
        self._last = 0
        self._arrives = 0.0

    def start(self) -> None:
        """See `Link.start`."""
        self.state = "down"
        self._hub.later(lambda: self._hub.greet(self))

    def next(self, timeout: float = 0.0) -> object | None:
        """Give the next event that is there already; `timeout` is ignored."""
        del timeout
        return self._events.popleft() if self._events else None

    def post(self, event: object) -> None:
        """See `Link.post`."""
        if self.state != "stopped":
            self._events.append(event)

    def publish(
        self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False, seconds_expiry: int | None = None
    ) -> int:
        """See `Link.publish`."""
        self._last += 1
        expires = None if seconds_expiry is None else self._hub.now + seconds_expiry
        letter = Letter(topic, payload, retain, expires)
        if qos > 0:
            self._open[self._last] = letter
        if self.state == "up":
            self._send(self._last, letter)
        return self._last

    def subscribe(self, topics: Sequence[str], qos: int = 1) -> None:
        """See `Link.subscribe`; every delivery is at QoS 1."""
        del qos
        self._filters.update(dict.fromkeys(topics))
        if self.state == "up":
            self._hub.subscribe(self.client.name, topics)

    def unsubscribe(self, topics: Sequence[str]) -> None:
        """See `Link.unsubscribe`."""
        for topic in topics:
            self._filters.pop(topic, None)
        if self.state == "up":
            self._hub.unsubscribe(self.client.name, topics)

    def done(self, message: Message) -> None:
        """See `Link.done`."""
        session = self._hub.sessions.get(self.client.name)
        if session is not None and session.link is self and session.undone.pop(message.token, None) is not None:
            self._hub.later(lambda: self._hub.deliver(self.client.name))

    def stop(self, farewell: Farewell | None = None) -> None:
        """See `Link.stop`."""
        session = self._hub.sessions.get(self.client.name)
        if session is not None and session.link is self:
            if farewell is not None:
                self._hub.route(Letter(farewell[0], farewell[1], farewell[2], None))
            self._hub.cut(self.client.name, will=False)
        self.state = "stopped"

    # --- what the hub calls ----------------------------------------------------------------------------------------

    def accepted(self, session_present: bool) -> None:
        """Be connected: subscribe again if that was forgotten, send again what has no receipt."""
        self.state = "up"
        self.life += 1
        self._events.append(Up(session_present))
        known = self._hub.sessions[self.client.name].filters
        self._hub.unsubscribe(
            self.client.name, [topic for topic in known if self.life > 1 and topic not in self._filters]
        )
        self._hub.subscribe(self.client.name, [topic for topic in self._filters if topic not in known])
        for number, letter in self._open.items():
            self._send(number, letter)

    def broken(self, why: str) -> None:
        """Be disconnected."""
        self.state = "down"
        self._events.append(Down(why))

    def receipt(self, life: int, number: int) -> None:
        """Hear that the broker has a message."""
        if life == self.life and self.state == "up" and self._open.pop(number, None) is not None:
            self._events.append(Published(number))

    def take(self, letter: Letter, *, retained: bool) -> int:
        """Receive a message and name the delivery."""
        self._last += 1
        self.bytes_received += len(letter.topic) + len(letter.payload)
        self._events.append(Message(letter.topic, letter.payload, retained, self._last))
        return self._last

    def _send(self, number: int, letter: Letter) -> None:
        self.bytes_sent += len(letter.topic) + len(letter.payload)
        life = self.life
        # One connection keeps its order, whatever the delay of each message.
        self._arrives = self._hub.later(lambda: self._hub.arrive(self, life, number, letter), not_before=self._arrives)


def _matches(parts: Sequence[str], levels: Sequence[str]) -> bool:
    for index, part in enumerate(parts):
        if part == "#":
            return True
        if index >= len(levels) or part not in ("+", levels[index]):
            return False
    return len(parts) == len(levels)


_: type[Link] = MemoryLink
