"""The agent's side of its worker: start it, keep it warm or not, watch it, and read its end as an event."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge_runtime import exits, priority
from edge_runtime.choice import Means
from edge_runtime.config import Config
from edge_runtime.door import Visit, landed
from edge_runtime.engines import available
from edge_runtime.memory import probe
from edge_runtime.memory.limit import Grant
from edge_runtime.spawn import command, surroundings
from wire.child import Child, Ended, Said
from wire.errors import StoreError, WorkerLost
from wire.job import Done, Failed, Job, Progress, Ready
from wire.messages import Reason
from wire.schema import to_plain

log = logging.getLogger("edge_runtime")

NEVER = float("inf")
_MEBIBYTE = 1 << 20
_BYTES_LEFT = 4 * _MEBIBYTE
"""What orders may leave in a worker whatever the budget, half of a bound's slack: a fresh one costs seconds of work."""
TIMINGS = "timings.json"
"""File in the state folder for what workers find out about this device's speed."""
_SECONDS_RETRY_MAX = 60.0
_SECONDS_AFRESH = 2.0
_DOUBLINGS = 6
_TRIES = 6
"""How often a socket's worker is asked for before an order is given back: half a minute in all."""
BASE_GUESS = {"torch": 240 << 20, "native": 40 << 20}
"""What a worker with a loaded engine takes, until one has told: torch on x86-64 and aarch64 measured 220 to 245 MiB."""
_OUT_OF_MEMORY = frozenset({-9, -11, -7, -6, exits.WORKER_MEMORY})
"""Exit codes: the kernel's out-of-memory killer, three signals that torch dies of at its memory limit, the worker's own."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The worker is through with a job.

    Attributes:
        job: Which.
        result: `Failed` also for a worker that crashed, was killed or stalled.
        took: Seconds with the engine loaded, and those before, in which a fresh worker loaded it; 0 for what is not known.
        sent: Whether a worker had it: otherwise its end says nothing of the order, nor of an engine.
    """

    job: Job
    result: Done | Failed
    took: tuple[float, float] = (0.0, 0.0)
    sent: bool = True


@dataclass(slots=True)
class _Course:
    """How far the worker is.

    Attributes:
        engine: What it has loaded, or will have when it is through with its job; empty as long as it has none.
        sent: Whether it has its job.
        given: When it was given it.
        begun: When it had loaded its engine for it; 0 where that is not known, below 0 where it says nothing.
        fresh: Whether it had to load it for this job.
    """

    engine: str = ""
    sent: bool = False
    given: float = 0.0
    begun: float = 0.0
    fresh: bool = False

    def took(self, now: float) -> tuple[float, float]:
        """Give the seconds of the job, and those of loading."""
        if not self.begun > 0.0:
            return 0.0, 0.0
        return now - self.begun, self.begun - self.given if self.fresh else 0.0


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
        self._child: Child | Visit | None = None
        self._job: Job | None = None
        self._course = _Course()
        self._since = 0.0  # the latest sign of life of a busy worker, or the beginning of idleness
        self._retry = NEVER
        self._failures = 0
        self._ready = False
        self._bases: dict[str, int] = {}

    @property
    def due(self) -> float:
        """When `tick` wants to be called."""
        if self._child is None:
            return self._retry
        if self._job is not None:
            return NEVER if self._frozen else self._since + self._config.worker.seconds_stall
        if self._config.worker.mode == "auto" and self._ready:
            return self._since + self._config.worker.seconds_warm
        return NEVER

    @property
    def busy(self) -> bool:
        """Whether there is a job."""
        return self._job is not None

    def bytes_coming(self, engine: str) -> int:
        """Memory that a worker with an engine will take before an order's own begins: all of it when none runs.

        Below 0 where it holds more than that: what an order has taken is there for the next one, and what a worker with
        another engine holds is as well, since it is replaced.
        """
        if isinstance(self._child, Visit):
            held = self._child.bytes_held
        else:
            held = probe.resident(self._child.pid) if self._child is not None else 0
        base = self._bases.get(engine, 0)
        return base - held if base else max(0, BASE_GUESS.get(engine, max(BASE_GUESS.values())) - held)

    def means(self, grant: Grant) -> tuple[Means, ...]:
        """Give the engines that may be used here, the best first, with what an order may take on each as of this second."""
        named = self._config.worker.engine
        engines = (named,) if named else available() or tuple(BASE_GUESS)[:1]
        loaded = self._course.engine if self._child is not None else ""
        return tuple(Means(name, grant.now(self.bytes_coming(name), name), name == loaded) for name in engines)

    def start(self, now: float, engine: str = "") -> None:
        """Start a worker if there is none; one that is kept warm loads this engine at once, or else the best."""
        if self._child is not None:
            return
        worker = self._config.worker
        warm = worker.mode == "warm" and not worker.socket
        self._course = _Course((engine or worker.engine or next(iter(available()), "")) if warm else "")
        self._since = now
        self._retry = NEVER
        self._ready = False
        if worker.socket:
            self._child = Visit("worker", worker.socket, self._post)
            return
        argv = command(
            json.dumps(to_plain(self._config.data)),
            engine=self._course.engine or worker.engine,
            threads=worker.threads,
            preload=worker.mode == "warm",
            timings=str(Path(self._config.state.dir) / TIMINGS),
            limit=str(self._config.budget_file),
            reserve=self._config.bytes_reserve,
        )
        self._child = Child("worker", argv, self._post, env=surroundings(worker.threads))

    def give(self, job: Job, now: float, bytes_bound: int = 0) -> None:
        """Have a job done; `take` tells its end.

        Args:
            job: Which.
            now: On the monotonic clock.
            bytes_bound: What it is predicted to take. A worker in which earlier orders have left so much that the budget
                does not hold both is replaced, and so is one with another engine.

        Raises:
            StoreError: One of its files cannot be opened.
        """
        self.progress = Progress(0.0, None, 0)
        self._job = job
        left = -self.bytes_coming(job.engine) if job.engine in self._bases else 0
        if left > _BYTES_LEFT and 0 < job.bytes_budget < bytes_bound + left:
            self.stop()
        if self._course.engine not in ("", job.engine):
            self.stop()
        anew = self._child is None  # also where it is told at its start what to load: it is the order that waits
        self.start(now, job.engine)
        self._course = _Course(job.engine, given=now, fresh=anew or self._course.engine != job.engine)
        self._since = now
        self.go_on(now)  # a warm one that stands still would not read
        if isinstance(self._child, Child):  # a unit says it itself: Nice=, CPUSchedulingPolicy=, IOSchedulingClass=
            priority.lower(self._child.pid, self._config.worker.priority)
        if self._ready or not self._config.worker.socket:
            self._send()

    def _send(self) -> None:
        assert self._child is not None
        assert self._job is not None
        self._course.sent, self._course.engine = True, self._job.engine
        try:
            self._child.send(self._job)
        except WorkerLost:
            self._child.kill()  # its end follows
        except StoreError:
            self.drop()
            raise

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
            self._course.begun = self._course.begun or now
            return self._measured(frame)
        if isinstance(frame, Ready):
            self._ready, self._failures = True, 0
            if self._config.worker.mode == "warm" and frame.engine:
                self._bases[frame.engine] = max(self._bases.get(frame.engine, 0), frame.bytes_base)
            return self._late(frame)
        if isinstance(frame, (Done, Failed)):
            if self._job is None:
                self.problem = frame.detail if isinstance(frame, Failed) else ""
                return None
            job, self._job = self._job, None
            if isinstance(frame, Done):
                frame = landed(frame, job) if isinstance(self._child, Visit) else frame
                self._bases |= {frame.usage.engine: frame.usage.bytes_base} if frame.usage.engine else {}
            broken = isinstance(frame, Failed) and frame.reason in ("oom", "crash")  # it is about to end
            if self._config.worker.mode == "spawn" or broken or not self._affordable():
                self.stop()
                self._retry = now + _SECONDS_AFRESH if self._config.worker.mode == "warm" else NEVER
            return Finished(job, frame, self._course.took(now))
        return None

    def _late(self, ready: Ready) -> Finished | Ready:
        """Hand over the job that a worker behind a socket was started for."""
        if self._job is None or self._course.sent:
            return ready
        job = self._job
        try:
            self._send()
        except StoreError as error:
            return Finished(job, Failed("data", str(error), 0, 0))
        return ready

    def tick(self, now: float, breach: str = "") -> Finished | None:
        """Let an idle worker go, kill a stalled one, or try again to start one that had ended.

        Args:
            now: On the monotonic clock.
            breach: Why a busy one must end at once, for want of memory; empty when it need not.
        """
        if breach and self._job is not None:
            return self._cut_off(self._job, "oom", breach)
        if now < self.due:
            return None
        if self._child is None:
            self.start(now)
            return None
        if self._job is None:
            self.stop()
            return None
        detail = f"no progress for {self._config.worker.seconds_stall:g} s; the worker was killed"
        return self._cut_off(self._job, "stalled", detail)

    def _measured(self, progress: Progress) -> Finished | None:
        """Kill a worker that takes more than its job allows: the wall around it is wider, as it counts more."""
        job, peak = self._job, progress.bytes_peak
        if job is None or not 0 < job.bytes_budget < peak:
            return None
        detail = f"it took {peak / _MEBIBYTE:.1f} MiB of the {job.bytes_budget / _MEBIBYTE:.1f} MiB that it may"
        return self._cut_off(job, "oom", f"{detail}; the worker was killed")

    def _cut_off(self, job: Job, reason: Reason, detail: str) -> Finished:
        self._job = None
        self.stop()
        return Finished(job, Failed(reason, detail, 0, self.progress.bytes_peak))

    def drop(self) -> None:
        """Give the job in hand up; a worker that is in the middle of it is killed."""
        if self._job is not None:
            self._job = None
            self.stop()

    def still(self) -> None:
        """Let a worker stand still in the middle of its job. One behind a socket cannot, and goes on until `drop`."""
        if self._job is not None and isinstance(self._child, Child):
            self._child.freeze()
            self._course.begun = -NEVER  # what it takes says nothing from here on

    def go_on(self, now: float) -> None:
        """Let it go on."""
        if isinstance(self._child, Child) and self._child.frozen:
            self._since = now
            self._child.thaw()

    @property
    def _frozen(self) -> bool:
        return isinstance(self._child, Child) and self._child.frozen

    def stop(self) -> None:
        """End the worker; its memory is free when this returns, where the kernel can do that."""
        self._retry = NEVER
        child, self._child = self._child, None
        if isinstance(child, Child):
            child.kill()
            priority.release(child.pid)
            child.let_go()  # in the idle class, its end may take longer than the watchdog waits
        elif child is not None:
            child.kill()
            child.close()

    def _affordable(self) -> bool:
        """Whether memory allows to keep the worker: what it holds must not eat into the reserve."""
        free = probe.available()
        return self._config.worker.mode == "warm" or not free or free > self._config.bytes_reserve

    def _ended(self, event: Ended, now: float) -> Finished | None:
        assert self._child is not None
        self._child.close()
        self._child = None
        if self._job is not None and not self._course.sent and self._failures < _TRIES:
            self._failures += 1  # the unit before may still be going away, and then no other is let in
            self._retry = now + 2.0**self._failures / 4
            return None
        job, self._job = self._job, None
        if job is None:
            self._failures += 1
            seconds = min(_SECONDS_RETRY_MAX, 2.0 ** min(self._failures, _DOUBLINGS))
            if self._config.worker.mode == "warm" or not self._ready:
                self._retry = now + seconds
            log.warning(
                "the worker ended with %d while idle: %s", event.code, event.problem or self.problem or "no word"
            )
            return None
        if not self._course.sent:
            detail = f"no worker took the order in {self._failures + 1} tries: {event.problem}"
            return Finished(job, Failed("crash", detail, 0, 0), sent=False)
        reason: Reason = "oom" if event.code in _OUT_OF_MEMORY else "crash"
        detail = f"the worker ended with {event.code} {event.problem}".strip()
        return Finished(job, Failed(reason, detail, 0, self.progress.bytes_peak))
