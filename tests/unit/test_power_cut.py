"""A device that loses its power between the coordinator's commit and the word of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from edge_runtime import session as table
from edge_runtime.agent import Agent
from edge_runtime.config import load
from edge_runtime.desk import Finished
from tests.support.messages import an_order
from wire import topics
from wire.chunks import file_digest
from wire.job import Done, Job
from wire.messages import Ack, BlobRef, Usage

ORDER = an_order("d0", 7)


class Disk:
    """What a power cut leaves: of files that were flushed their bytes, of folders the names that they had by then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.durable: dict[int, object] = {}
        monkeypatch.setattr(os, "fsync", self.flush)

    def flush(self, number: int | object) -> None:
        number = number if isinstance(number, int) else number.fileno()  # type: ignore[attr-defined]  # a file, then
        path = Path(f"/proc/self/fd/{number}").readlink()
        self.durable[path.stat().st_ino] = {p.name for p in path.iterdir()} if path.is_dir() else path.read_bytes()

    def cut(self, folder: Path) -> None:
        for path in list(folder.iterdir()):
            names, number = self.durable.get(folder.stat().st_ino, set()), path.stat().st_ino
            assert isinstance(names, set)
            if path.is_dir():
                self.cut(path)
            elif path.name not in names:
                path.unlink()
            elif self.durable.get(number) != path.read_bytes():
                path.write_bytes(b"")


@pytest.fixture
def lives(tmp_path: Path) -> Iterator[list[Agent]]:
    made: list[Agent] = []
    yield made
    for agent in made:
        agent._link.stop()
        agent._claim.close()


def live(lives: list[Agent], root: Path) -> Agent:
    """Begin another life; the one before is over."""
    if lives:
        lives[-1]._claim.close()
    (root / "d.toml").write_text(
        f'federation = "f"\ndevice = "d0"\n[broker]\nurl = "mqtt://127.0.0.1:1"\n[state]\ndir = "{root}/state"\n'
    )
    lives.append(Agent(load(root / "d.toml")))
    lives[-1]._recall()
    return lives[-1]


def answer(agent: Agent) -> None:
    """Be through with the order."""
    update, keep = (agent._offers.out / f"{ORDER.id}.{end}" for end in ("update", "keep"))
    update.write_bytes(b"u" * 5000)
    keep.write_bytes(b"what belongs to this answer")
    ref = BlobRef(file_digest(update), 5000)
    agent._session = replace(agent._session, phase="working", order=ORDER)
    done = Done(ORDER.structures[0], str(update), ref, str(keep), file_digest(keep), 40, {}, Usage())
    agent._finished(Finished(Job(ORDER, "", (), "", "", 0, 8, 1), done))


def said(agent: Agent) -> list[str]:
    return [topics.parse(parcel.topic).kind for parcel in iter(agent._link._outbox.ready, None)]


@pytest.mark.parametrize("state", ["committed", "unwanted"])
def test_the_state_of_an_answer_counts_if_the_answer_did(
    lives: list[Agent], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """The note of which answer was offered was lost, and with it the state: its next life took it for nobody's."""
    disk, first = Disk(monkeypatch), live(lives, tmp_path)
    answer(first)
    assert said(first)[0] == "reply"
    for folder in ("out", "keep"):
        disk.cut(tmp_path / "state" / folder)
    second = live(lives, tmp_path)
    assert second._session.phase == "offering"
    second._happen(table.Silence())
    assert said(second) == ["reply"], "it asks what has become of it"
    second._happen(table.Acked(Ack(ORDER.id, state)))  # type: ignore[arg-type]  # a Literal
    held = second._keep.current("f", "sgd")
    assert (held is not None and held.read_bytes()) == (state == "committed" and b"what belongs to this answer")
    assert list((tmp_path / "state/keep/f").glob("*.staged")) == []
    assert list((tmp_path / "state/out").iterdir()) == []


def test_without_a_state_nothing_is_flushed(
    lives: list[Agent], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, disk = live(lives, tmp_path), Disk(monkeypatch)
    agent._session = replace(agent._session, phase="working", order=ORDER)
    done = Done(ORDER.structures[0], "", None, "", "", 40, {}, Usage())
    agent._finished(Finished(Job(ORDER, "", (), "", "", 0, 8, 1), done))
    assert said(agent) == ["reply"]
    assert disk.durable == {}
