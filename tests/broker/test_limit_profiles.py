"""A whole round within the limits of each hosted broker, and the proof that the limits bite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_runtime import life
from edge_runtime.config import BrokerConfig, Config
from tests.support.mosquitto import Mosquitto
from tests.support.profiles import PROFILES, Account, Violation, strict
from tests.support.transfer import Head, Tail, drive, order_for, random_file
from wire import topics
from wire.chunks import WINDOW_DOWN, WINDOW_UP
from wire.link import Address, Up
from wire.link.mqtt import MqttLink
from wire.messages import PIECE_BYTES, BlobRef

FEDERATION = "f" * 64
DEVICE = "d" * 64


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path_factory.mktemp("broker")) as running:
        yield running


@pytest.fixture(params=PROFILES)
def account(request: pytest.FixtureRequest) -> Account:
    return Account(PROFILES[request.param])


def held(broker: Mosquitto, account: Account, name: str) -> MqttLink:
    link = MqttLink(Address("127.0.0.1", broker.port), name, session_seconds=0, keepalive=20)
    return strict(link, account)


def up(link: MqttLink) -> None:
    link.start()
    while not isinstance(link.next(5.0), Up):
        pass


def test_a_round_with_the_longest_names_fits(broker: Mosquitto, account: Account, tmp_path: Path) -> None:
    """Order, shells, update and acknowledgements by the product's own code, then the pieces are cleared."""
    head = Head(held(broker, account, f"{FEDERATION}-coordinator"), tmp_path, FEDERATION)
    name = life.client_id(Config(DEVICE, BrokerConfig("mqtt://h"), federation=FEDERATION))
    tail = Tail(held(broker, account, name), tmp_path, DEVICE, FEDERATION)
    sizes = (700, 10 * PIECE_BYTES + 5, 2 * PIECE_BYTES, 33)
    blobs = [random_file(tmp_path / f"blob{i}", size, seed=i) for i, size in enumerate(sizes)]
    for index, ref in enumerate(blobs):
        head.spool.add_file(tmp_path / f"blob{index}", ref.digest)
    drive([head, tail], lambda: bool(tail.ups and head.mail.is_up))
    head.mail.publisher.want(blobs)
    order = order_for(DEVICE, *blobs)
    head.mail.send(DEVICE, order)
    drive([head, tail], lambda: tail.fetched == [order.id])
    update = random_file(tmp_path / "update", 20 * PIECE_BYTES + 1, seed=9)
    tail.offer(tmp_path / "update", update, order.id)
    drive([head, tail], lambda: tail.ended == [order.id])
    assert head.committed == [order.id]
    assert (tail.spool.path(blobs[1].digest).read_bytes()) == head.spool.path(blobs[1].digest).read_bytes()
    head.mail.retire(head.mail.publisher.live)
    drive([head, tail], lambda: not head.mail.publisher.busy)
    assert account.retained == {topics.lead(FEDERATION)}
    assert head.problems == []
    tail.link.stop()
    head.link.stop()
    # The limits were approached as the design says, so that passing them means something.
    assert account.most["packet"] > PIECE_BYTES
    assert account.most["filters"] == WINDOW_DOWN
    assert account.most["subscriptions"] == WINDOW_DOWN + 2
    assert account.most["in_flight"] >= WINDOW_UP
    assert account.most["slashes"] == 6


@pytest.mark.parametrize(
    ("name", "piece", "limit"),
    [("aws-iot", 131_072, "packet"), ("azure-event-grid", 65_536, "retained")],
)
def test_a_piece_too_large_is_a_violation(broker: Mosquitto, tmp_path: Path, name: str, piece: int, limit: str) -> None:
    account = Account(PROFILES[name])
    head = Head(held(broker, account, "head"), tmp_path, f"large-{name}")
    drive([head], lambda: head.mail.is_up)
    made = random_file(tmp_path / "blob", piece + 1)
    head.spool.add_file(tmp_path / "blob", made.digest)
    with pytest.raises(Violation) as caught:
        head.mail.publisher.want([BlobRef(made.digest, made.size, piece)])
    assert caught.value.limit == limit
    assert f"{name} allows {limit}" in str(caught.value)
    head.link.stop()


def publish(link: Any, topic: str, payload: bytes = b"x", retain: bool = False) -> None:
    link._client.publish(topic, payload, 1, retain, None)


BITES: dict[str, tuple[str, Callable[[Any], object]]] = {
    "packet": ("emqx-serverless", lambda link: publish(link, "t", bytes(1 << 20))),
    "retained": ("azure-event-grid", lambda link: publish(link, "t", bytes(1 << 16), True)),
    "retained_count": ("azure-event-grid", lambda link: [publish(link, f"n/{i}", b"x", True) for i in range(4)]),
    "topic_bytes": ("aws-iot", lambda link: publish(link, "t" * 257)),
    "slashes": ("aws-iot", lambda link: publish(link, "a/b/c/d/e/f/g/h/i")),
    "filters": ("aws-iot", lambda link: link._client.subscribe([(f"t{i}", 1) for i in range(9)])),
    "subscriptions": ("emqx-serverless", lambda link: link.subscribe([f"t{i}" for i in range(11)])),
    "in_flight": ("mosquitto", lambda link: [publish(link, "t") for _ in range(21)]),
}


@pytest.mark.parametrize("limit", BITES)
def test_each_limit_bites(broker: Mosquitto, limit: str) -> None:
    name, act = BITES[limit]
    limits = PROFILES[name]
    account = Account(replace(limits, retained_count=3) if limit == "retained_count" else limits)
    link = held(broker, account, f"bites-{limit}")
    up(link)
    with pytest.raises(Violation, match=f"{name} allows {limit}") as caught:
        act(link)
    assert caught.value.limit == limit
    link.stop()


@pytest.mark.parametrize(("name", "keepalive", "limit"), [("c" * 129, 20, "client_id"), ("c", 1201, "keepalive")])
def test_names_and_keepalives_are_judged_before_anything_is_opened(name: str, keepalive: int, limit: str) -> None:
    link = MqttLink(Address("127.0.0.1", 1), name, session_seconds=0, keepalive=keepalive)
    with pytest.raises(Violation, match=limit):
        strict(link, Account(PROFILES["aws-iot"]))
    link.stop()
