"""The local worker: an ordinary edge worker over the operator's evaluation data, for what no device should be asked.

It runs beside the rounds. When it is slower than they are, the newest model waits and older ones are left out; the last
one is always measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from coordinator.advance import Outcome
from wire.child import Child, Ended, Said
from wire.errors import WorkerLost
from wire.job import Done, Failed, Job
from wire.messages import BlobRef, Order, Recipe
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
        self._waiting: Job | None = None
        self._running: Job | None = None
        self._failures = 0

    @property
    def idle(self) -> bool:
        """Whether everything that was asked has been measured (or given up)."""
        return self._waiting is None and self._running is None

    def start(self) -> None:
        """Start the worker ahead of the first model, so that loading its engine costs no round any time."""
        if self._child is None:
            self._child = Child("local", ["edge_runtime.worker", "--data", self._data], self._post)

    def measure(self, round_number: int, order_id: str, run: str, spec: BlobRef, outcome: Outcome) -> None:
        """Have all widths of a model measured."""
        order = Order(
            id=order_id,
            run=run,
            round=round_number,
            device="local",
            verb="evaluate",
            spec=spec,
            shells=outcome.shells,
            structures=outcome.structures,
            recipe=Recipe(batch=256),
            masks=outcome.masks,
        )
        self._waiting = Job(
            order=order,
            spec=str(self._spool.path(spec.digest)),
            shells=tuple(str(self._spool.path(s.digest)) for s in outcome.shells),
            out=str(self._spool.root),
            keep="",
            bytes_budget=_BUDGET,
            micro_batch=0,
            threads=1,
            masks="" if outcome.masks is None else str(self._spool.path(outcome.masks.digest)),
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
        job, self._running = self._running, None
        self._feed()
        if isinstance(event.frame, Failed) or job is None:
            return event.frame if isinstance(event.frame, Failed) else None
        self._failures = 0
        return Measured(job.order.round, dict(event.frame.metrics))

    def needs(self) -> set[str]:
        """Name the blobs that are still to be read."""
        jobs = [job for job in (self._waiting, self._running) if job is not None]
        return {ref.digest for job in jobs for ref in job.order.blobs}

    def stop(self) -> None:
        """End the worker."""
        if self._child is not None:
            self._child.kill()
            self._child.close()
            self._child = None

    def _retry(self) -> None:
        self._failures += 1
        self._waiting = self._waiting or self._running
        self._running = None
        if self._failures >= _FAILURES_MAX:
            self._waiting = None
        elif self._waiting is not None:
            self.start()
            self._feed()

    def _feed(self) -> None:
        if self._child is None or self._running is not None or self._waiting is None:
            return
        job, self._waiting = self._waiting, None
        self._running = job
        try:
            self._child.send(job)
        except WorkerLost:
            self._child.kill()
