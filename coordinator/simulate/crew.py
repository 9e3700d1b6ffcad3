"""Processes that do the runs of a comparison, one after the other, so that each loads its engine once.

A process reads a line of JSON for each run, writes the result into the run's file, and says so in a line; what it says in
between is how far it is. One that dies costs the run that it had, which counts as failed, and is replaced.
"""

from __future__ import annotations

import dataclasses
import json
import os
import selectors
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from coordinator.show import RunView
from coordinator.simulate.run import simulate
from coordinator.simulate.trials import Trial, keep
from coordinator.simulate.world import Config
from wire.child import die_with_parent, surroundings
from wire.errors import NestlingError
from wire.schema import from_plain

_SECONDS_BETWEEN = 1.0
_TEXT_MAX = 2000


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is."""

    trial: Trial
    round: int
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class Ended:
    """A run is over; `error` is empty when its result is kept."""

    trial: Trial
    error: str
    seconds: float


@dataclass(slots=True)
class _Worker:
    process: subprocess.Popen[bytes]
    trial: Trial | None = None
    began: float = 0.0
    unread: bytes = b""


def work(trials: Sequence[tuple[Trial, Path]], jobs: int) -> Iterator[Progress | Ended]:
    """Do runs in so many processes, and tell of them as they go; every run ends exactly once.

    Args:
        trials: The runs and the files for their results.
        jobs: How many at a time.
    """
    waiting = deque(trials)
    with selectors.DefaultSelector() as selector:
        for _ in range(min(jobs, len(waiting))):
            _hire(selector)
        try:
            for worker in _workers(selector):
                _feed(worker, waiting)
            while any(worker.trial is not None for worker in _workers(selector)):
                for ready, _ in selector.select(1.0):
                    yield from _hear(selector, ready.data, waiting)
        finally:
            for worker in _workers(selector):
                _dismiss(worker)


def _workers(selector: selectors.BaseSelector) -> list[_Worker]:
    return [key.data for key in selector.get_map().values()]


def _hire(selector: selectors.BaseSelector) -> _Worker:
    process = subprocess.Popen(
        [sys.executable, "-m", "coordinator.simulate.crew", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **surroundings()},
    )
    worker = _Worker(process)
    selector.register(_pipe(process.stdout), selectors.EVENT_READ, worker)
    return worker


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:  # a Popen that was asked for pipes has them
        raise AssertionError
    return pipe


def _feed(worker: _Worker, waiting: deque[tuple[Trial, Path]]) -> None:
    """Give a process its next run; with none left it has nothing to do."""
    worker.trial = None
    if waiting:
        worker.trial, path = waiting.popleft()
        worker.began = time.monotonic()
        job = {"config": dataclasses.asdict(worker.trial.config), "path": str(path)}
        pipe = _pipe(worker.process.stdin)
        try:
            pipe.write(json.dumps(job, default=dict).encode() + b"\n")
            pipe.flush()
        except BrokenPipeError:
            pass  # its end is heard on the other pipe


def _hear(
    selector: selectors.BaseSelector, worker: _Worker, waiting: deque[tuple[Trial, Path]]
) -> Iterator[Progress | Ended]:
    """Take in what a process says: lines, or that it has ended."""
    heard = os.read(_pipe(worker.process.stdout).fileno(), 1 << 16)
    if not heard:
        trial, seconds = worker.trial, time.monotonic() - worker.began
        selector.unregister(_pipe(worker.process.stdout))
        code = _dismiss(worker)
        if trial is not None:
            _feed(_hire(selector), waiting)
            yield Ended(trial, f"its process ended with code {code}", seconds)
        return
    *lines, worker.unread = (worker.unread + heard).split(b"\n")
    for line in lines:
        said: dict[str, Any] = json.loads(line)
        trial, seconds = worker.trial, time.monotonic() - worker.began
        if trial is not None and "error" in said:
            _feed(worker, waiting)
            yield Ended(trial, str(said["error"]), seconds)
        elif trial is not None:
            yield Progress(trial, said["round"], said["accuracy"])


def _dismiss(worker: _Worker) -> int:
    """End a process, if it has not ended, and give its exit code."""
    worker.process.kill()
    for pipe in (worker.process.stdin, worker.process.stdout):
        with suppress(BrokenPipeError):
            _pipe(pipe).close()
    return worker.process.wait()


def main() -> None:
    """Be one of the processes: do what stands on stdin until it ends."""
    die_with_parent(int(sys.argv[1]))
    told = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever else prints must not stand between the lines
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps({"error": _done(job, told)}), file=told, flush=True)


def _done(job: dict[str, Any], told: IO[str]) -> str:
    """Do one run; gives why there is no result, or nothing."""
    last = time.monotonic()

    def tell(view: RunView) -> None:
        nonlocal last
        if time.monotonic() - last >= _SECONDS_BETWEEN:
            last = time.monotonic()
            measured = next((r for _, r in sorted(view.rounds.items(), reverse=True) if r.metrics), None)
            widths = measured.accuracy() if measured is not None else {}
            said = {"round": len(view.rounds), "accuracy": widths[max(widths)] if widths else None}
            print(json.dumps(said), file=told, flush=True)

    try:
        config = from_plain(Config, job["config"])
        keep(Path(job["path"]), config, simulate(config, tell))
    except NestlingError as error:
        return f"{type(error).__name__}: {error}"[:_TEXT_MAX]
    except Exception:  # noqa: BLE001 - one algorithm's mistake must not end the comparison of all others
        return traceback.format_exc()[-_TEXT_MAX:]
    return ""


if __name__ == "__main__":
    main()
