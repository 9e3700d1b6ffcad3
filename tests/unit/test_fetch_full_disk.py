"""A disk that is full while an order is fetched."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from edge_runtime.agent import Agent, Stop
from edge_runtime.config import load
from edge_runtime.fetch import Fetcher
from tests.unit.test_agent_parts import Notes, blob, order_for
from wire import codec, topics
from wire.chunks import WINDOW_DOWN, Assembly
from wire.errors import StoreError
from wire.link import Farewell, Message
from wire.messages import Presence, Refusal
from wire.spool import Spool


def full(*_: object) -> None:
    raise StoreError("No space left on device")


class Script:
    """A link over which these events come, one after the other; notes what is wanted when there are no more."""

    def __init__(self, *events: object) -> None:
        self.notes = Notes()
        self.publish = self.notes.publish
        self.subscribe, self.unsubscribe = self.notes.subscribe, self.notes.unsubscribe
        self.events = [*events, Stop()]
        self.wanted_last: set[str] = set()
        self.farewell: Farewell | None = None

    def next(self, _: float) -> object:
        if len(self.events) == 1:
            self.wanted_last = set(self.notes.wanted)
        return self.events.pop(0)

    def done(self, _: Message) -> None:
        pass

    def start(self) -> None:
        pass

    def stop(self, farewell: Farewell) -> None:
        self.farewell = farewell


def test_an_agent_refuses_pulls_nothing_more_and_says_goodbye(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d.toml").write_text(
        f'federation = "f"\ndevice = "d0"\n[broker]\nurl = "mqtt://127.0.0.1:1"\n[state]\ndir = "{tmp_path}/state"\n'
    )
    (one, data), (two, _) = blob(1, 3), blob(2, 12)
    order = order_for(one, two)
    pieces = [Message(topics.piece("f", one.digest, i), data[10 * i : 10 * i + 10], True, 1) for i in (0, 1, 2)]
    link = Script(Message(topics.down("f", "d0", "order"), codec.encode(order), False, 1), *pieces, None, None)
    agent = Agent(load(tmp_path / "d.toml"))
    agent._link.stop()
    agent._link = agent._fetcher._link = link  # type: ignore[assignment]  # as much of a link as it takes
    agent._life.renewal = None
    monkeypatch.setattr(agent._desk, "start", lambda _: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    put = Assembly.put

    def last_one(assembly: Assembly, index: int, piece: bytes) -> bool:
        put(assembly, index, piece)
        monkeypatch.setattr(Assembly, "put", full)
        monkeypatch.setattr(Assembly, "save", full)
        return True

    monkeypatch.setattr(Assembly, "put", last_one)
    agent.run()
    assert len(link.notes.said[0][1]) + len(link.notes.said[1][1]) == 2 + WINDOW_DOWN, "it had begun"
    asked = [topics.parse(topic).kind for topic, _ in link.notes.sent]
    assert asked == ["refusal"]
    refusal = codec.decode(link.notes.sent[0][1], Refusal)
    assert (refusal.order, refusal.reason) == (order.id, "data")
    assert "No space left" in refusal.detail
    assert link.wanted_last == {topics.down("f", "d0", "+"), topics.lead("f")}, "no pieces of what was refused"
    assert agent._fetcher.due == float("inf")
    assert link.farewell is not None
    assert codec.decode(link.farewell[1], Presence).state == "bye"


def test_it_does_not_keep_the_agent_from_stopping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It went on to pull pieces after the order had ended, and the agent could not say goodbye."""
    notes = Notes()
    fetcher = Fetcher(notes, Spool(tmp_path, 10_000), "f", "d0")  # type: ignore[arg-type]  # as much of a link as it takes
    (one, data), (two, _) = blob(1, 3), blob(2, 2)
    fetcher.begin(order_for(one, two), 0.0)
    fetcher.piece(one.digest[:32], 0, data[:10], 0.0)

    monkeypatch.setattr(Assembly, "save", full)
    fetcher.stop()
    assert (fetcher.due, fetcher._open, notes.wanted) == (float("inf"), {}, set())
