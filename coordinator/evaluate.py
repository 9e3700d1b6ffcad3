"""The local worker: an ordinary edge worker over the operator's evaluation data, for what no device should be asked.

It runs beside the rounds. When it is slower than they are, the newest model waits and older ones are left out; the last
one is always measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from coordinator.advance import Head, Outcome
from wire.child import Child, Ended, Said, surroundings
from wire.errors import WorkerLost
from wire.job import Done, Failed, Job
from wire.messages import BlobRef, Recipe
from wire.spool import Spool

_FAILURES_MAX = 3
_BUDGET = 1 << 40


@dataclass(frozen=True, slots=True)
class Measured:
    """What the model of a round is worth.

    Attributes:
        round: Number of the round whose result was measured.
        metrics: ``accuracy.K`` and ``loss.K`` for each width K.
    """

    round: int
    metrics: dict[str, float]


class Evaluator:
    """One local worker and the newest model that waits for it."""

    def __init__(self, post: Callable[[Said | Ended], None], data: str, spool: Spool) -> None:
        """`data` is a source for the worker, as JSON; the worker starts with the first model."""
        self._post = post
        self._data = data
        self._spool = spool
        self._child: Child | None = None
        self._waiting: tuple[Job, ...] = ()
        self._running: tuple[Job, ...] = ()
        self._found: list[dict[str, float]] = []
        self._failures = 0

    @property
    def idle(self) -> bool:
        """Whether everything that was asked has been measured (or given up)."""
        return not self._waiting and not self._running

    def start(self) -> None:
        """Start the worker ahead of the first model, so that loading its engine costs no round any time."""
        if self._child is None:
            argv = ["edge_runtime.worker_process", "--data", self._data]
            self._child = Child("local", argv, self._post, env=surroundings())

    def measure(self, round_number: int, order_id: str, run: str, spec: BlobRef, outcome: Outcome) -> None:
        """Have all widths of a model measured."""
        orders = outcome.evaluations(Head(order_id, run, round_number, spec, 0.0), Recipe(batch=256))
        self._waiting = tuple(
            Job(
                order=order,
                spec=str(self._spool.path(spec.digest)),
                shells=tuple(str(self._spool.path(s.digest)) for s in order.shells),
                out=str(self._spool.root),
                keep="",
                bytes_budget=_BUDGET,
                micro_batch=0,
                threads=1,
                masks="" if order.masks is None else str(self._spool.path(order.masks.digest)),
            )
            for order in orders
        )
        self.start()
        self._feed()

    def take(self, event: Said | Ended) -> Measured | Failed | None:
        """Take in the worker's word; gives a measurement, or why there is none."""
        if self._child is None or event.pid != self._child.pid:
            return None
        if isinstance(event, Ended):
            self._child.close()
            self._child = None
            self._retry()
            return None
        if not isinstance(event.frame, (Done, Failed)):
            return None
        jobs = self._running
        if isinstance(event.frame, Failed) or not jobs:
            self._running = ()
            self._feed()
            return event.frame if isinstance(event.frame, Failed) else None
        self._failures = 0
        self._found.append(dict(event.frame.metrics))
        if len(self._found) < len(jobs):
            self._send(jobs[len(self._found)])
            return None
        found = {name: value for metrics in self._found for name, value in metrics.items()}
        self._running = ()
        self._feed()
        return Measured(jobs[0].order.round, found)

    def needs(self) -> set[str]:
        """Name the blobs that are still to be read."""
        return {ref.digest for job in (*self._waiting, *self._running) for ref in job.order.blobs}

    def stop(self) -> None:
        """End the worker."""
        if self._child is not None:
            self._child.kill()
            self._child.close()
            self._child = None

    def _retry(self) -> None:
        self._failures += 1
        self._waiting = self._waiting or self._running
        self._running = ()
        if self._failures >= _FAILURES_MAX:
            self._waiting = ()
        elif self._waiting:
            self.start()
            self._feed()

    def _feed(self) -> None:
        if self._child is None or self._running or not self._waiting:
            return
        self._running, self._waiting, self._found = self._waiting, (), []
        self._send(self._running[0])

    def _send(self, job: Job) -> None:
        if self._child is None:
            return
        try:
            self._child.send(job)
        except WorkerLost:
            self._child.kill()
