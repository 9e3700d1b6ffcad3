"""What an agent does while there is no broker, over a real link that reaches nobody."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from edge_runtime.agent import SECONDS_SILENCE, Agent
from edge_runtime.config import load
from edge_runtime.fetch import SECONDS_PATIENCE
from tests.support.messages import a_reply, an_order
from wire import topics
from wire.chunks import WINDOW_UP, file_digest
from wire.job import Ready
from wire.link.ledger import Parcel
from wire.messages import BlobRef


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    (tmp_path / "d.toml").write_text(
        f'federation = "f"\ndevice = "d0"\n[broker]\nurl = "mqtt://127.0.0.1:1"\n[state]\ndir = "{tmp_path}/state"\n'
    )
    made = Agent(load(tmp_path / "d.toml"))
    yield made
    made._link.stop()
    made._claim.close()


def waiting(agent: Agent) -> list[Parcel]:
    agent._link._outbox.window = 1 << 20
    return list(iter(agent._link._outbox.ready, None))


def test_a_month_of_silence_is_one_answer(agent: Agent, tmp_path: Path) -> None:
    """Each silence of five seconds left another copy of the reply, to be sent when the broker is back."""
    order = an_order("d0", 1)
    update = tmp_path / "state/out" / f"{order.id}.update"
    update.write_bytes(b"x" * 1_000_000)
    ref = BlobRef(file_digest(update), 1_000_000)
    agent._offers.keep(order, replace(a_reply("d0", order.id), update=ref))
    agent._recall()
    agent._offers.offer(replace(a_reply("d0", order.id, boot=agent._session.boot), update=ref))
    agent._offers.more(b"")
    start = time.monotonic()
    for number in range(1000):
        agent._tick(start + (number + 1) * 2 * SECONDS_SILENCE)
    found = [topics.parse(parcel.topic) for parcel in waiting(agent)]
    assert [place.kind for place in found if place.index < 0] == ["reply"]
    assert sorted(place.index for place in found if place.index >= 0) == list(range(WINDOW_UP))


def test_a_download_that_nobody_serves_asks_once_for_each_blob(agent: Agent) -> None:
    agent._fetcher.begin(an_order("d0", 1), 0.0)
    for number in range(1000):
        agent._fetcher.late(number * SECONDS_PATIENCE)
    assert {topics.parse(parcel.topic).kind for parcel in waiting(agent)} == {"need"}
    for number in range(1000):
        agent._fetcher.late(number * SECONDS_PATIENCE)
    assert len(waiting(agent)) == 2, "one window, pieces of two blobs"


def test_conditions_that_come_and_go_leave_the_last_word(agent: Agent) -> None:
    agent._life.ready = Ready("native", 1000, 40, 10, (1, 8, 8))
    for standing in ("away", "present") * 500:
        agent._life.guest.standing = standing
        agent._announce()
    (parcel,) = waiting(agent)
    assert b"online" in parcel.payload
