"""An order that ran out of memory, done again as something smaller by a fresh worker; a bounded number of times.

A worker at its limit is not asked to go on: what it has mapped is never given back, so that a smaller batch fails in it
too. What is tried next is planned as the order was, with what may be taken by then, and must be predicted to take a
quarter less than what failed, or a tenth where there is nothing better. Smaller micro-batches and recomputation come first,
as they answer for the same width, then narrower widths. Batch norms see one micro-batch alone: with them recomputation comes
first, then narrower widths, and smaller micro-batches last.

Light: the agent loads it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from edge_runtime.memory import plan as planning
from edge_runtime.session import Again
from edge_runtime.session import Failed as Refusing
from wire.job import Done, Failed, Job
from wire.messages import Order
from wire.segments import Cuts
from wire.spec import ModelSpec, Structure, statistics

log = logging.getLogger("edge_runtime")

TRIES = 4
"""Workers that one order may cost."""
SECONDS_PAUSE = 0.5
"""Between the end of one and the next: what the first held has gone back to the system by then."""
_LESS, _LEAST = 0.75, 0.9
_FORGETTING = 0.9
_MEBIBYTE = 1 << 20
NEVER = float("inf")


@dataclass(frozen=True, slots=True)
class Way:
    """How an order is done.

    Attributes:
        order: The order, perhaps for a narrower width than was asked.
        micro_batch: Samples that go through the model at once.
        bytes_peak: Expected peak above base.
        bytes_bound: The same with its margin.
        cuts: Where the model is cut into segments that run again; empty for none.
    """

    order: Order
    micro_batch: int
    bytes_peak: int
    bytes_bound: int
    cuts: Cuts = ()


class Tries:
    """The tries of the order in hand, and by how much this device's predictions were too low so far.

    Attributes:
        due: When to try again, on the monotonic clock.
        scale: Measured over predicted memory of earlier orders, at least 1: up at once, down by a tenth of the excess.
    """

    __slots__ = ("_ended", "_order", "_peak", "_said", "_way", "due", "scale")

    def __init__(self) -> None:
        self.due = NEVER
        self.scale = 1.0
        self._order = ""
        self._way: Way | None = None
        self._ended = 0
        self._peak = 0
        self._said = ""

    def fit(self, order: Order, spec: ModelSpec, bytes_budget: int) -> Way | Refusing:
        """Say how to do an order now: as large as fits at first, smaller than what failed after that.

        Args:
            order: What was asked.
            spec: Its model.
            bytes_budget: What may be taken above base; 0 for no limit.

        Raises:
            SpecError: The structure does not belong to the model.

        Cost: some predictions, a millisecond each.
        """
        self.due = NEVER
        if order.id != self._order:
            self._order, self._way, self._ended, self._peak = order.id, None, 0, 0
        if self._way is None or not self._ended:
            fits = planning.plan(order, spec, bytes_budget, self.scale)
            if isinstance(fits, planning.Refused):
                return Refusing(order.id, "memory", fits.detail, fits.bytes_needed, fits.bytes_free)
            self._way = self._priced(spec, order, (fits.micro_batch, fits.cuts))
            return self._way
        found = self._smaller(order, spec, bytes_budget, self._way)
        if found is None:
            return self._given_up("nothing smaller fits", self._way.bytes_bound, bytes_budget)
        self._way = found
        return found

    def failed(self, job: Job, result: Failed, now: float) -> Refusing | None:
        """Take in how a job failed.

        Returns:
            What to tell the coordinator; None when it is to be tried again at `due`.
        """
        self._peak = max(self._peak, result.bytes_peak)
        needed = max(result.bytes_needed, self._peak)
        if result.reason != "oom" or self._way is None:
            return Refusing(job.order.id, result.reason, result.detail, needed, job.bytes_budget)
        self._learn(job, result.bytes_peak)
        self._ended += 1
        self._said = result.detail
        if self._ended >= TRIES:
            return self._given_up("that is enough", needed, job.bytes_budget)
        self.due = now + SECONDS_PAUSE
        named = {"fields": {"order": job.order.id, "bytes_peak": result.bytes_peak, "bytes_budget": job.bytes_budget}}
        log.warning("a worker ran out of memory, something smaller is tried: %s", result.detail, extra=named)
        return None

    def done(self, job: Job, result: Done) -> None:
        """Take in what an order has cost."""
        known = self.scale
        self.scale = 1.0 + (known - 1.0) * _FORGETTING if known > 1.001 else 1.0
        self._learn(job, result.usage.bytes_peak)

    def again(self) -> Again:
        """Say that it is time."""
        self.due = NEVER
        return Again(self._order)

    def _learn(self, job: Job, bytes_peak: int) -> None:
        # What earlier orders have left in a worker, and what is held dense for speed, may exceed a bound within the budget.
        way = self._way
        if way is None or job.order.id != self._order:
            return
        if bytes_peak > max(way.bytes_bound, job.bytes_budget):
            self.scale *= bytes_peak / way.bytes_bound

    def _given_up(self, why: str, bytes_needed: int, bytes_free: int) -> Refusing:
        tries = f"{self._ended} tries" if self._ended > 1 else "one try"
        seen = f"with up to {self._peak / _MEBIBYTE:.1f} MiB seen above the worker's base"
        detail = f"{why}; after {tries}, {seen}: {self._said}"
        return Refusing(self._order, "oom", detail[:2000], max(bytes_needed, self._peak), bytes_free)

    def _smaller(self, order: Order, spec: ModelSpec, bytes_budget: int, than: Way) -> Way | None:
        found = []
        for structure, manner in _ways(order, spec):
            asked = order if structure in order.structures else replace(order, structures=(structure,))
            way = self._priced(spec, asked, manner)
            if not bytes_budget or way.bytes_bound <= bytes_budget:
                found.append(way)
        least = min(found, key=lambda way: way.bytes_peak, default=than)
        for way in (*found, least):
            if way.bytes_peak <= (_LEAST if way is least else _LESS) * than.bytes_peak:
                return way
        return None

    def _priced(self, spec: ModelSpec, order: Order, manner: tuple[int, Cuts]) -> Way:
        widest = max(order.structures, key=lambda s: s.capacity)
        found = planning.price(order, spec, widest, manner, self.scale)
        return Way(order, manner[0], found.peak, found.bound, manner[1])


def _ways(order: Order, spec: ModelSpec) -> list[tuple[Structure, tuple[int, Cuts]]]:
    """Give what an order could be done as, the best first; only what is trained alone can be narrower than asked."""
    widest = max(order.structures, key=lambda s: s.capacity)
    batch, norms = order.recipe.batch, bool(statistics(spec))
    parts = [(widest, manner) for manner in planning.manners(order, spec, widest)]
    exact = [part for part in parts if part[1][0] == batch or not norms]
    cut = order.verb == "train" and bool(widest.widths) and order.masks is None
    narrower = [widest.narrowed(capacity) for capacity in reversed(range(widest.capacity))] if cut else []
    whole: tuple[int, Cuts] = (batch, ())
    widths = [(structure, whole) for structure in narrower]
    least = [(narrower[-1], manner) for manner in planning.manners(order, spec, narrower[-1])] if narrower else []
    return [*exact, *widths, *least, *(part for part in parts if part not in exact)]
