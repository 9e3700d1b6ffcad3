"""What hosted brokers allow, enforced on a real link: whatever breaks a limit fails at once, by the limit's name.

`strict` puts a gate between an `MqttLink` and its transport, where the packets are: batches, sizes and counts are those
that would go over the wire. The figures are the providers' documented ones (2026); a field that is 0 is not limited, or
not documented. Not here, because a broker answers them by waiting and not by an error: bytes and messages per second
(AWS 512 KB and 100, Event Grid 1 MB, EMQX Serverless 10 messages) and Event Grid's 64 KB that are under way at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from wire.link.mqtt import MqttLink


@dataclass(frozen=True, slots=True)
class Limits:
    """One provider.

    Attributes:
        name: As in the issue.
        packet: Bytes of one PUBLISH, all included.
        retained: Bytes of one retained PUBLISH.
        retained_count: Retained messages of the whole account.
        topic_bytes: Of one topic or filter.
        slashes: In one topic or filter.
        filters: In one SUBSCRIBE or UNSUBSCRIBE.
        subscriptions: Of one client at a time.
        in_flight: QoS 1 messages of one client that the broker has not answered for.
        client_id: Bytes.
        keepalive: Seconds, least and most.
    """

    name: str
    packet: int
    retained: int = 0
    retained_count: int = 0
    topic_bytes: int = 65_535
    slashes: int = 0
    filters: int = 0
    subscriptions: int = 0
    in_flight: int = 0
    client_id: int = 0
    keepalive: tuple[int, int] = (1, 65_535)


KIB = 1024
PROFILES = {
    limits.name: limits
    for limits in (
        Limits(
            "aws-iot",
            packet=128 * KIB,
            topic_bytes=256,
            slashes=7,
            filters=8,
            subscriptions=50,
            in_flight=100,
            client_id=128,
            keepalive=(5, 1200),
        ),
        Limits(
            "azure-event-grid",
            packet=512 * KIB,
            retained=64 * KIB,
            retained_count=10_000,
            in_flight=1000,
            keepalive=(1, 1160),
        ),
        Limits(
            "emqx-serverless",
            packet=KIB * KIB,
            retained=KIB * KIB,
            retained_count=2000,
            slashes=9,
            subscriptions=10,
            client_id=1024,
        ),
        Limits("mosquitto", packet=307_200, in_flight=20),
    )
}


class Violation(Exception):
    """A limit was broken.

    Attributes:
        limit: Name of the field of `Limits`.
    """

    def __init__(self, limits: Limits, limit: str, found: object) -> None:
        super().__init__(f"{limits.name} allows {limit} {getattr(limits, limit)}, and this is {found}")
        self.limit = limit


@dataclass
class Account:
    """What all clients of one provider share, and how far each limit was used."""

    limits: Limits
    retained: set[str] = field(default_factory=set)
    most: dict[str, int] = field(default_factory=dict)

    def check(self, limit: str, found: int) -> None:
        """Note a figure and refuse one beyond the limit."""
        self.most[limit] = max(found, self.most.get(limit, 0))
        allowed = getattr(self.limits, limit)
        if allowed and found > allowed:
            raise Violation(self.limits, limit, found)

    def check_topic(self, topic: str) -> None:
        self.check("topic_bytes", len(topic.encode()))
        self.check("slashes", topic.count("/"))


class Gate:
    """Stands where a link's paho client stood: checks what goes out and hands it on."""

    def __init__(self, client: Any, account: Account) -> None:
        self._client = client
        self._account = account
        self._subscribed: set[str] = set()
        self._flying: set[int] = set()
        self._answered = client.on_publish
        client.on_publish = self._on_publish
        account.check("client_id", len(client._client_id))
        least, most = account.limits.keepalive
        if not least <= client.keepalive <= most:
            raise Violation(account.limits, "keepalive", client.keepalive)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def publish(self, topic: str, payload: bytes, qos: int, retain: bool, properties: Any) -> Any:
        account = self._account
        account.check_topic(topic)
        size = packet_bytes(topic, payload, properties)
        account.check("packet", size)
        if retain and payload:
            account.check("retained", size)
            account.retained.add(topic)
            account.check("retained_count", len(account.retained))
        elif retain:
            account.retained.discard(topic)
        if qos:
            account.check("in_flight", len(self._flying) + 1)
        sent = self._client.publish(topic, payload, qos, retain, properties)
        if qos:
            self._flying.add(sent.mid)
        return sent

    def subscribe(self, filters: Sequence[tuple[str, int]]) -> Any:
        for topic, _ in filters:
            self._account.check_topic(topic)
        self._account.check("filters", len(filters))
        self._subscribed |= {topic for topic, _ in filters}
        self._account.check("subscriptions", len(self._subscribed))
        return self._client.subscribe(filters)

    def unsubscribe(self, filters: Sequence[str]) -> Any:
        self._account.check("filters", len(filters))
        self._subscribed -= set(filters)
        return self._client.unsubscribe(filters)

    def _on_publish(self, client: Any, userdata: Any, number: int, reason: Any, properties: Any) -> None:
        self._flying.discard(number)
        self._answered(client, userdata, number, reason, properties)


def strict(link: MqttLink, account: Account) -> MqttLink:
    """Hold a link that has not started yet to an account's limits."""
    link._client = Gate(link._client, account)
    return link


def packet_bytes(topic: str, payload: bytes, properties: Any) -> int:
    """Count the bytes of a QoS 1 PUBLISH of MQTT 5."""
    rest = 2 + len(topic.encode()) + 2 + (len(properties.pack()) if properties is not None else 1) + len(payload)
    return 1 + max(1, -(-rest.bit_length() // 7)) + rest
