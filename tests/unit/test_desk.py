"""The agent's desk by hand: what may not hang, leak or give up when a worker misbehaves."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from edge_runtime import desk as desk_module
from edge_runtime.config import BrokerConfig, Config, WorkerConfig
from edge_runtime.desk import Desk
from edge_runtime.door import UNSEEN
from tests.support.messages import an_order
from wire.child import Ended, Said
from wire.errors import StoreError
from wire.job import Failed, Job, Progress


def test_a_worker_that_never_stays_is_tried_for_ever() -> None:
    """For as long as a device is switched on: seventeen hours of it made a number that is none."""
    desk = Desk(Config("d", BrokerConfig("mqtt://localhost")), lambda _: None)
    desk._failures = 2000
    desk._child = SimpleNamespace(pid=1, close=lambda: None)  # type: ignore[assignment]  # a stand-in
    assert desk.take(Ended("worker", 1, 1), 10.0) is None
    assert desk.due == 10.0 + 60.0


class _Still:
    """As much of a child as a desk gives a job to."""

    pid, name, frozen = 0, "worker", True

    def __init__(self, *_: object, **__: object) -> None:
        self.calls: list[str] = []

    def thaw(self) -> None:
        self.calls.append("thaw")

    def send(self, _: object) -> None:
        self.calls.append("send")
        raise StoreError("no such file")

    def kill(self) -> None:
        self.calls.append("kill")

    def let_go(self) -> None:
        self.calls.append("let go")


def test_a_warm_worker_that_stands_still_goes_on_to_read_and_one_without_its_files_is_let_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stopped worker does not empty its pipe; and an order that cannot be handed over must not leave a busy desk."""
    monkeypatch.setattr(desk_module, "Child", _Still)
    desk, child = Desk(Config("d", BrokerConfig("mqtt://localhost")), lambda _: None), _Still()
    monkeypatch.setattr(desk_module.priority, "lower", lambda *_: None)
    monkeypatch.setattr(desk_module.priority, "release", lambda _: None)
    desk._child = child  # type: ignore[assignment]  # a stand-in
    job = Job(an_order("d0", 1), "spec", (), "out", "", 0, 0, 1)
    with pytest.raises(StoreError):
        desk.give(job, 1.0)
    assert child.calls == ["thaw", "send", "kill", "let go"]
    assert (desk.due, desk._job) == (float("inf"), None)


@pytest.mark.parametrize(("left", "bound", "stays"), [(3.9, 41.5, True), (6.0, 35.5, True), (6.0, 36.5, False)])
def test_a_worker_in_which_too_much_was_left_is_replaced(
    monkeypatch: pytest.MonkeyPatch, left: float, bound: float, *, stays: bool
) -> None:
    """The budget has to hold both what earlier orders have left and what this one is predicted to take."""
    mebibyte, held = 1 << 20, _Still()
    monkeypatch.setattr(desk_module, "Child", _Still)
    monkeypatch.setattr(_Still, "send", lambda *_: None)
    monkeypatch.setattr(desk_module.probe, "resident", lambda _: int((200 + left) * mebibyte))
    monkeypatch.setattr(desk_module.priority, "lower", lambda *_: None)
    monkeypatch.setattr(desk_module.priority, "release", lambda _: None)
    desk = Desk(Config("d", BrokerConfig("mqtt://localhost")), lambda _: None)
    monkeypatch.setattr(desk, "start", lambda *_: setattr(desk, "_child", desk._child or _Still()))
    desk._bases, desk._child = {"": 200 * mebibyte}, held  # type: ignore[assignment]  # a stand-in
    desk.give(Job(an_order("d0", 1), "spec", (), "out", "", 42 * mebibyte, 0, 1), 1.0, int(bound * mebibyte))
    assert (desk._child is held) is stays


@pytest.mark.parametrize("mode", ["warm", "auto", "spawn"])
def test_what_loading_took_is_told_of_a_worker_that_an_order_was_the_first_of(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """A worker that is kept warm is told at its start what to load, and yet it is the order that waits for it."""
    monkeypatch.setattr(desk_module, "Child", _Still)
    monkeypatch.setattr(_Still, "send", lambda *_: None)
    monkeypatch.setattr(desk_module.probe, "resident", lambda _: 0)
    monkeypatch.setattr(desk_module.priority, "lower", lambda *_: None)
    monkeypatch.setattr(desk_module.priority, "release", lambda _: None)
    worker = WorkerConfig(mode=mode)  # type: ignore[arg-type]  # one of its words
    config = Config("d", BrokerConfig("mqtt://localhost"), worker=worker)
    desk = Desk(config, lambda _: None)
    for number, (engine, loading) in enumerate((("native", 2.0), ("native", 0.0), ("torch", 2.0)), 1):
        job = Job(an_order("d0", number), "spec", (), "out", "", 0, 0, 1, engine=engine)
        desk.give(job, 10.0 * number)
        desk.take(Said("worker", 0, Progress(0.0, None, 0)), 10.0 * number + 2.0)
        found = desk.take(Said("worker", 0, Failed("data", "why", 0, 0)), 10.0 * number + 5.0)
        assert isinstance(found, desk_module.Finished)
        assert found.took == (3.0, 2.0 if mode == "spawn" else loading)


@pytest.mark.parametrize(("sent", "reason"), [(False, "crash"), (True, "oom")])
def test_a_trainer_that_nobody_reaches_says_nothing_of_memory(reason: str, *, sent: bool) -> None:
    """The coordinator plans for more memory on a device that ran out of it, and gives it narrower widths."""
    desk = Desk(Config("d", BrokerConfig("mqtt://localhost"), worker=WorkerConfig(socket="/none")), lambda _: None)
    desk._child = SimpleNamespace(pid=-5, close=lambda: None)  # type: ignore[assignment]  # a stand-in
    desk._job, desk._failures = Job(an_order("d0", 1), "spec", (), "out", "", 0, 0, 1), desk_module._TRIES
    desk._course.sent = sent
    found = desk.take(Ended("worker", -5, UNSEEN, "nobody at the door"), 10.0)
    assert isinstance(found, desk_module.Finished)
    assert isinstance(found.result, Failed)
    assert (found.result.reason, found.sent) == (reason, sent)
    assert "nobody at the door" in found.result.detail
