"""The agent's side of its worker: start it, keep it warm or not, watch it, and read its end as an event."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass

from edge_runtime.config import Config
from edge_runtime.memory import probe
from edge_runtime.spawn import command, surroundings
from wire.child import Child, Ended, Said
from wire.errors import WorkerLost
from wire.job import Done, Failed, Job, Progress, Ready
from wire.schema import to_plain

log = logging.getLogger("edge_runtime")


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
    """At most one worker and one job."""

    def __init__(self, config: Config, post: Callable[[object], None]) -> None:
        self._config = config
        self._post = post
        self._child: Child | None = None
        self._job: Job | None = None
        self._idle_since = 0.0
        self._alive = 0.0
        self.ready: Ready | None = None
        self.progress = Progress(0.0, None, 0)
        self.problem = ""

    @property
    def due(self) -> float:
        """When `tick` wants to be called."""
        if self._child is None:
            return float("inf")
        if self._job is not None:
            return self._alive + self._config.worker.seconds_stall
        if self._config.worker.mode == "auto":
            return self._idle_since + self._config.worker.seconds_warm
        return float("inf")

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
        )
        self._idle_since = now
        self._child = Child("worker", argv, self._post, env=surroundings(worker.threads))

    def give(self, job: Job, now: float) -> None:
        """Have a job done; `take` tells its end."""
        self.progress = Progress(0.0, None, 0)
        self._job = job
        self._alive = now
        self.start(now)
        assert self._child is not None
        try:
            self._child.send(job)
        except WorkerLost:
            self._child.kill()

    def take(self, event: Said | Ended, now: float) -> Finished | Ready | None:
        """Take in a worker's word. Words of workers that were given up mean nothing."""
        if self._child is None or event.pid != self._child.pid:
            return None
        self._alive = now
        if isinstance(event, Ended):
            return self._ended(event)
        frame = event.frame
        if isinstance(frame, Progress):
            self.progress = frame
        elif isinstance(frame, Ready):
            self.ready = frame
            return frame
        elif isinstance(frame, (Done, Failed)):
            if self._job is None:
                self.problem = frame.detail if isinstance(frame, Failed) else ""
                return None
            job, self._job = self._job, None
            self._idle_since = now
            if self._config.worker.mode == "spawn" or not self._affordable():
                self.stop()
            return Finished(job, frame)
        return None

    def tick(self, now: float) -> Finished | None:
        """Let an idle worker go, or kill a stalled one."""
        if self._child is None or now < self.due:
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
        if self._child is not None:
            self._child.kill()
            self._child.close()
            self._child = None

    def _affordable(self) -> bool:
        """Whether memory allows to keep the worker: what it holds must not eat into the reserve."""
        free = probe.available()
        return self._config.worker.mode == "warm" or not free or free > self._config.bytes_reserve

    def _ended(self, event: Ended) -> Finished | None:
        assert self._child is not None
        self._child.close()
        self._child = None
        job, self._job = self._job, None
        if job is None:
            log.warning(
                "the worker ended with %s while idle: %s", event.code, event.problem or self.problem or "no word"
            )
            return None
        reason = "oom" if event.code in (-9, -11, -7, 3) else "crash"
        detail = f"the worker ended with {event.code} {event.problem}".strip()
        return Finished(job, Failed(reason, detail, 0, self.progress.bytes_peak))
