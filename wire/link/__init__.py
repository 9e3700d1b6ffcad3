"""How messages are carried: `mqtt` over a broker, `memory` within one process.

A link has one owner. The owner asks for events with `Link.next` and tells the link what to do; nobody else touches it,
except through `Link.post`, which any thread and any signal handler may call. The network moves while the owner is inside
`Link.next`, so an owner that does not come back for longer than the keepalive counts as gone. Delivery is *at least once,
hop by hop*: the broker has a message when `Published` says so, it may come twice, and a broker that is killed may lose
what it had.
What must survive that is acknowledged end to end, above the link.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from wire.errors import ConfigError

Farewell = tuple[str, bytes, bool]
"""Topic, payload and whether it is retained."""


@dataclass(frozen=True, slots=True)
class Up:
    """The broker has accepted us.

    Attributes:
        session_present: It still had our session: subscriptions and what came for us meanwhile.
    """

    session_present: bool


@dataclass(frozen=True, slots=True)
class Down:
    """There is no broker; the link keeps trying. Said once per cause, not once per attempt.

    Attributes:
        why: One sentence for people.
        refused: The broker is there and said no (credentials, access rules): waiting alone will not help.
    """

    why: str
    refused: bool = False


@dataclass(frozen=True, slots=True)
class Message:
    """Something arrived. The owner calls `Link.done` when it is dealt with.

    Attributes:
        topic: Where it was published.
        payload: Its bytes; empty on a retained topic means that the topic was deleted.
        retained: It was kept by the broker and sent because we subscribed.
        token: The link's own name for this delivery; 0 needs no acknowledgement.
    """

    topic: str
    payload: bytes
    retained: bool
    token: int


@dataclass(frozen=True, slots=True)
class Published:
    """The broker has answered for one of our QoS 1 messages.

    Attributes:
        id: What `Link.publish` returned.
        problem: Empty, or why the broker will not carry it (access rules, size); sending it again would not help.
    """

    id: int
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Denied:
    """The broker will not let us subscribe.

    Attributes:
        topic: The filter.
        why: The broker's reason.
    """

    topic: str
    why: str


@dataclass(frozen=True, slots=True)
class Will:
    """What the broker says in our name when we are gone without a word.

    Attributes:
        topic: Where.
        payload: What.
        retain: Whether it is kept for later subscribers.
    """

    topic: str
    payload: bytes
    retain: bool = True


@dataclass(frozen=True, slots=True)
class Address:
    """Where a broker is and how to get in.

    Attributes:
        host: Name or number.
        port: TCP port.
        tls: Whether the connection is encrypted.
        user: Empty when the broker asks for none.
        password: Never shown.
        ca: File with the certificate authority; empty means the system's.
        cert: File with our certificate; empty for none.
        key: File with its key; empty when `cert` holds it too.
    """

    host: str
    port: int
    tls: bool = False
    user: str = ""
    password: str = field(default="", repr=False)
    ca: str = ""
    cert: str = ""
    key: str = ""

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"

    @staticmethod
    def parse(
        url: str, *, username: str = "", password_file: str = "", ca: str = "", cert: str = "", key: str = ""
    ) -> Address:
        """Read ``mqtt://[user[:password]@]host[:port]`` or ``mqtts://...``.

        A file's password counts more than one in the URL.

        Raises:
            ConfigError: It is not of that form, or `password_file` cannot be read.
        """
        from urllib.parse import unquote, urlsplit

        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"broker address {_hidden(url)!r}: {error}") from None
        if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname or parts.path.strip("/") or parts.query:
            raise ConfigError(f"broker address {_hidden(url)!r}: write mqtt://HOST[:PORT] or mqtts://HOST[:PORT]")
        tls = parts.scheme == "mqtts"
        if not tls and (ca or cert or key):
            raise ConfigError(f"broker address {_hidden(url)!r}: ca, cert and key need mqtts://")
        if key and not cert:
            raise ConfigError("broker key: give the certificate (cert) that belongs to it")
        password = _first_line(password_file) if password_file else unquote(parts.password or "")
        user = username or unquote(parts.username or "")
        if password and not user:
            raise ConfigError("broker password: give the user name that belongs to it")
        return Address(parts.hostname, port or (8883 if tls else 1883), tls, user, password, ca, cert, key)


def _hidden(url: str) -> str:
    """Cut a password out of an address that is about to be shown."""
    head, at, tail = url.rpartition("@")
    return f"{head.partition('://')[0]}://...@{tail}" if at else url


def _first_line(path: str) -> str:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"password_file {path}: {error}") from None
    if not lines or not lines[0]:
        raise ConfigError(f"password_file {path}: its first line is empty; write the password there")
    return lines[0]


class Link(Protocol):
    """Carries messages for one owner."""

    bytes_sent: int
    """Topics and payloads that were handed to the network, re-sends by the transport aside."""
    bytes_received: int
    """Topics and payloads that came in."""

    def next(self, timeout: float) -> object | None:
        """Give the next event: `Up`, `Down`, `Message`, `Published`, `Denied` or what was posted.

        None after `timeout` seconds without one.
        """
        ...

    def post(self, event: object) -> None:
        """Put an event of the owner's own into the queue; after `stop` it does nothing.

        Any thread and any signal handler may call it.
        """
        ...

    def publish(
        self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False, seconds_expiry: int | None = None
    ) -> int:
        """Send a message and return its id.

        QoS 1 waits out any outage and ends in `Published`; QoS 0 is sent now or never and ends in nothing. While a message
        waits, one that says the same may take its place, and of those that are to be retained on one topic the last may: they
        have one id, and one `Published`.
        """
        ...

    def subscribe(self, topics: Sequence[str], qos: int = 1) -> None:
        """Want these topics (wildcards allowed), now and after every reconnection."""
        ...

    def unsubscribe(self, topics: Sequence[str]) -> None:
        """No longer want them."""
        ...

    def done(self, message: Message) -> None:
        """Let the broker forget a delivery. It sends at most 16 that are not done: this is the back-pressure.

        Receipts go out in the order of arrival, so a message that is never done blocks the ones behind it. (mosquitto
        2.0 keeps to 16 only until the first receipt; what it sends beyond them waits in the socket.)
        """
        ...

    def start(self) -> None:
        """Begin to connect; returns at once."""
        ...

    def stop(self, farewell: Farewell | None = None) -> None:
        """Say `farewell` if there is a connection, take the last will back, and disconnect. At most 2 s."""
        ...
