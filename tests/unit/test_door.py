"""The door: what goes through it as descriptors, and what either end may not make the other do."""

from __future__ import annotations

import array
import collections
import contextlib
import dataclasses
import io
import itertools
import os
import queue
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import pytest

from edge_runtime import door
from edge_runtime.door import Pipe, Reception, Visit, landed, seal, unseal
from tests.support.models import random_arrays
from tests.support.orders import job as make_job
from wire import zoo
from wire.child import Ended
from wire.errors import Malformed, StoreError, WorkerLost
from wire.job import Done, Failed, Job, Ready, write_frame
from wire.messages import Usage
from wire.spec import Structure

LINEAR = zoo.by_name("linear")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return make_job(tmp_path, LINEAR, random_arrays(LINEAR, Structure()), [Structure()])


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    agent, worker = socket.socketpair()
    with agent, worker:
        yield agent, worker


@pytest.fixture
def reception(sockets: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch) -> Reception:
    monkeypatch.setattr(door, "_leave_with", lambda *_: None)
    return Reception(sockets[1])


def send(agent: socket.socket, job: Job, files: list[int]) -> None:
    write_frame(cast("IO[bytes]", door._Outlet(agent, files)), job)
    for file in files:
        os.close(file)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_jobs_files_can_be_read_and_written_by_descriptor_alone(
    sockets: tuple[socket.socket, socket.socket], reception: Reception, job: Job, tmp_path: Path
) -> None:
    sealed, files = seal(dataclasses.replace(job, keep=job.spec))
    assert str(tmp_path) not in repr(sealed), "the worker does not even hear where the agent's files are"
    assert len(files) == 2 + len(job.shells) + 2
    before = open_files()
    send(sockets[0], sealed, files)
    found = reception.take()
    assert found is not None
    assert Path(found.spec).read_bytes() == Path(job.spec).read_bytes() == Path(found.keep).read_bytes()
    assert Path(found.shells[0]).read_bytes() == Path(job.shells[0]).read_bytes()
    for _ in range(2):
        (Path(found.out) / f"{job.order.id}.update").write_bytes(b"moves")
    (Path(found.out) / f"{job.order.id}.keep").write_bytes(b"state")
    assert (Path(job.out) / f"{job.order.id}.update").read_bytes() == b"moves"
    assert (Path(job.out) / f"{job.order.id}.keep").read_bytes() == b"state"
    sealed, files = seal(job)
    send(sockets[0], sealed, files)
    again = reception.take()
    assert again is not None
    assert again.keep == ""
    assert open_files() == before - 1, "those of the job before are closed, and there is no state this time"
    sockets[0].close()
    assert reception.take() is None
    assert not Path(again.out).exists()


def test_what_is_not_there_is_the_agents_own_fault_and_leaks_nothing(job: Job) -> None:
    before = open_files()
    with pytest.raises(StoreError, match="nowhere"):
        seal(dataclasses.replace(job, shells=("/nowhere/at/all",)))
    (Path(job.out) / "link").symlink_to("/etc/passwd")
    with pytest.raises(StoreError):
        seal(dataclasses.replace(job, spec=str(Path(job.out) / "link")))
    assert open_files() == before


@pytest.mark.parametrize("place", ["7", "-1", "00007", "x", "/etc/passwd", "\u0661"])
def test_a_job_whose_files_did_not_come(job: Job, tmp_path: Path, place: str) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(Malformed, match="without its files"):
        unseal(dataclasses.replace(job, spec=place, shells=(), out="0"), [5, 6, 7], tmp_path / "in")
    with pytest.raises(Malformed):
        unseal(dataclasses.replace(job, spec="0", shells=(), out=place), [5, 6, 7], tmp_path / "in")


def test_more_files_than_a_job_has(sockets: tuple[socket.socket, socket.socket], reception: Reception) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    for _ in range(2):
        rights = array.array("i", [null] * 60)
        sockets[0].sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    os.close(null)
    assert reception.read(1) == b"\0"
    with pytest.raises(Malformed, match="more than 72 files"):
        reception.read(1)
    reception._close()


def test_anything_else_than_a_job_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "frames").open("w+b") as file:
        write_frame(file, Failed("crash", "x", 0, 0))
        file.seek(0)
        with pytest.raises(Malformed, match="Failed"):
            Pipe(file).take()
        assert Pipe(file).take() is None


def test_the_agent_takes_only_what_it_made_itself(job: Job) -> None:
    done = Done(Structure(), "/etc/passwd", None, "/etc/shadow", "", 1, {}, Usage())
    found = landed(done, job)
    assert found.update == str(Path(job.out) / f"{job.order.id}.update")
    assert found.keep == str(Path(job.out) / f"{job.order.id}.keep")
    assert landed(dataclasses.replace(done, keep=""), job).keep == ""


def heard(events: queue.Queue[Any], kind: type) -> Any:
    event = events.get(timeout=10)
    frame = event if isinstance(event, Ended) else event.frame
    assert isinstance(frame, kind), frame
    return frame


def test_a_visit_from_greeting_to_end(job: Job, tmp_path: Path) -> None:
    events: queue.Queue[Any] = queue.Queue()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "door"))
        listening.listen()
        visit = Visit("worker", str(tmp_path / "door"), events.put)
        other = Visit("worker", str(tmp_path / "door"), events.put)
        assert 0 > visit.pid != other.pid < 0, "no process id: nobody may be signalled by it"
        worker, _ = listening.accept()
        with worker, worker.makefile("wb") as answers:
            write_frame(answers, Ready("", 77, 1, 2, (3,)))
            assert heard(events, Ready).samples == 1
            assert visit.bytes_held == 77
            visit.send(job)
        assert heard(events, Ended).code == door.UNSEEN
        with pytest.raises(WorkerLost):
            visit.send(job)
        visit.close()
        visit.close()
        other.close()


def test_nobody_at_the_door_is_an_event(tmp_path: Path) -> None:
    events: queue.Queue[Any] = queue.Queue()
    visit = Visit("worker", str(tmp_path / "door"), events.put)
    assert "edge-trainer.socket" in heard(events, Ended).problem
    visit.kill()
    visit.close()


def test_a_worker_that_reads_nothing_does_not_hold_the_agent_up(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: queue.Queue[Any] = queue.Queue()
    monkeypatch.setattr(door, "_SECONDS_SEND", 1)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "door"))
        listening.listen()
        visit = Visit("worker", str(tmp_path / "door"), events.put)
        since = time.monotonic()
        with pytest.raises(WorkerLost):
            collections.deque(map(visit.send, itertools.repeat(job, 10_000)), 0)
        assert time.monotonic() - since < 8
        visit.close()


def test_bytes_that_are_no_frame_end_the_visit(tmp_path: Path) -> None:
    events: queue.Queue[Any] = queue.Queue()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "door"))
        listening.listen()
        visit = Visit("worker", str(tmp_path / "door"), events.put)
        worker, _ = listening.accept()
        with worker:
            worker.sendall(b"\xff" * 64)
            assert "limit" in heard(events, Ended).problem
            assert worker.recv(1) == b"", "hung up on"
        visit.close()


def test_a_worker_that_talks_without_end_is_heard_slowly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the agent has not read yet waits in the worker, not in the agent's memory."""
    monkeypatch.setattr(door, "_SECONDS_BETWEEN", 0.05)
    events: queue.Queue[Any] = queue.Queue()
    frame = io.BytesIO()
    write_frame(frame, Failed("crash", "x" * 2000, 0, 0))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "door"))
        listening.listen()
        visit = Visit("worker", str(tmp_path / "door"), events.put)
        worker, _ = listening.accept()
        with worker:
            worker.setblocking(False)
            since = time.monotonic()
            with contextlib.suppress(BlockingIOError):
                while worker.send(frame.getvalue()) == len(frame.getvalue()):
                    pass
            heard(events, Failed)
            heard(events, Failed)
            assert 2 + events.qsize() <= 1 + (time.monotonic() - since) / 0.05
        monkeypatch.setattr(door, "_SECONDS_BETWEEN", 0.0)
        visit.close()
        while not isinstance(events.get(timeout=10), Ended):
            pass
