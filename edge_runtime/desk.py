"""The agent's side of its worker: start it, keep it warm or not, watch it, and read its end as an event."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.config import Config
from edge_runtime.memory import limit, probe
from edge_runtime.spawn import command, surroundings
from wire.child import Child, Ended, Said
from wire.errors import WorkerLost
from wire.job import Done, Failed, Job, Progress, Ready
from wire.messages import Reason
from wire.schema import to_plain

log = logging.getLogger("edge_runtime")

NEVER = float("inf")
TIMINGS = "timings.json"
"""File in the state folder for what workers find out about this device's speed."""
_SECONDS_RETRY_MAX = 60.0
_BASE_GUESS = 240 << 20
"""What a worker with a loaded engine takes, until one has told: torch on x86-64 and aarch64 measured 220 to 245 MiB."""
_OUT_OF_MEMORY = frozenset({-9, -11, -7, 3})
"""Exit codes: the kernel's out-of-memory killer, the two signals that torch dies of at its memory limit, the worker's own."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The worker is through with a job.

    Attributes:
        job: Which.
        result: `Failed` also for a worker that crashed, was killed or stalled.
    """

    job: Job
    result: Done | Failed


class Desk:
    """At most one worker and one job.

    Attributes:
        progress: The job's, as far as it is known.
        problem: What the worker said before it ended without a job; empty when there was nothing.
    """

    def __init__(self, config: Config, post: Callable[[object], None]) -> None:
        self.progress = Progress(0.0, None, 0)
        self.problem = ""
        self._config = config
        self._post = post
        self._child: Child | None = None
        self._job: Job | None = None
        self._since = 0.0  # the latest sign of life of a busy worker, or the beginning of idleness
        self._retry = NEVER
        self._failures = 0
        self._ready = False
        self._bytes_base = 0

    @property
    def due(self) -> float:
        """When `tick` wants to be called."""
        if self._child is None:
            return self._retry
        if self._job is not None:
            return self._since + self._config.worker.seconds_stall
        if self._config.worker.mode == "auto" and self._ready:
            return self._since + self._config.worker.seconds_warm
        return NEVER

    @property
    def bytes_coming(self) -> int:
        """Memory that the worker itself will take before an order's own begins: all of it when none runs.

        Below 0 where it holds more than that: what an order has taken is there for the next one.
        """
        held = probe.resident(self._child.pid) if self._child is not None else 0
        return self._bytes_base - held if self._bytes_base else max(0, _BASE_GUESS - held)

    def start(self, now: float) -> None:
        """Start a worker if there is none."""
        if self._child is not None:
            return
        worker = self._config.worker
        argv = command(
            json.dumps(to_plain(self._config.data)),
            engine=worker.engine,
            threads=worker.threads,
            preload=worker.mode == "warm",
            timings=str(Path(self._config.state.dir) / TIMINGS),
            limit=str(Path(self._config.state.dir) / limit.FILE),
            reserve=self._config.bytes_reserve,
        )
        self._since = now
        self._retry = NEVER
        self._ready = False
        self._child = Child("worker", argv, self._post, env=surroundings(worker.threads))

    def give(self, job: Job, now: float) -> None:
        """Have a job done; `take` tells its end."""
        self.progress = Progress(0.0, None, 0)
        self._job = job
        self.start(now)
        self._since = now
        assert self._child is not None
        try:
            self._child.send(job)
        except WorkerLost:
            self._child.kill()

    def take(self, event: Said | Ended, now: float) -> Finished | Ready | None:
        """Take in a worker's word. Words of workers that were given up mean nothing."""
        if self._child is None or event.pid != self._child.pid:
            return None
        self._since = now
        if isinstance(event, Ended):
            return self._ended(event, now)
        frame = event.frame
        if isinstance(frame, Progress):
            self.progress = frame
        elif isinstance(frame, Ready):
            self._ready, self._failures = True, 0
            if self._config.worker.mode == "warm":
                self._bytes_base = max(self._bytes_base, frame.bytes_base)
            return frame
        elif isinstance(frame, (Done, Failed)):
            if self._job is None:
                self.problem = frame.detail if isinstance(frame, Failed) else ""
                return None
            job, self._job = self._job, None
            if isinstance(frame, Done) and frame.usage.engine:
                self._bytes_base = frame.usage.bytes_base
            if self._config.worker.mode == "spawn" or not self._affordable():
                self.stop()
            return Finished(job, frame)
        return None

    def tick(self, now: float) -> Finished | None:
        """Let an idle worker go, kill a stalled one, or try again to start one that had ended."""
        if now < self.due:
            return None
        if self._child is None:
            self.start(now)
            return None
        if self._job is None:
            self.stop()
            return None
        job, self._job = self._job, None
        self.stop()
        detail = f"no progress for {self._config.worker.seconds_stall:g} s; the worker was killed"
        return Finished(job, Failed("stalled", detail, 0, self.progress.bytes_peak))

    def drop(self) -> None:
        """Give the job in hand up; a worker that is in the middle of it is killed."""
        if self._job is not None:
            self._job = None
            self.stop()

    def stop(self) -> None:
        """End the worker."""
        self._retry = NEVER
        if self._child is not None:
            self._child.kill()
            self._child.close()
            self._child = None

    def _affordable(self) -> bool:
        """Whether memory allows to keep the worker: what it holds must not eat into the reserve."""
        free = probe.available()
        return self._config.worker.mode == "warm" or not free or free > self._config.bytes_reserve

    def _ended(self, event: Ended, now: float) -> Finished | None:
        assert self._child is not None
        self._child.close()
        self._child = None
        job, self._job = self._job, None
        if job is None:
            self._failures += 1
            seconds = min(_SECONDS_RETRY_MAX, 2.0**self._failures)
            if self._config.worker.mode == "warm" or not self._ready:
                self._retry = now + seconds
            log.warning(
                "the worker ended with %d while idle: %s", event.code, event.problem or self.problem or "no word"
            )
            return None
        reason: Reason = "oom" if event.code in _OUT_OF_MEMORY else "crash"
        detail = f"the worker ended with {event.code} {event.problem}".strip()
        return Finished(job, Failed(reason, detail, 0, self.progress.bytes_peak))
