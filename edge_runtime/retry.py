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
from collections.abc import Sequence
from dataclasses import dataclass, replace

from edge_runtime import choice
from edge_runtime.choice import NOTHING, Means
from edge_runtime.memory import plan as planning
from edge_runtime.paces import Paces
from edge_runtime.session import Again
from edge_runtime.session import Failed as Refusing
from wire.job import Done, Failed, Job
from wire.messages import Order
from wire.prices import having, lacks
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
        means: On which engine, and what it has there.
        kind: As in `edge_runtime.choice.Chosen`, and so is `effort`; empty for what is tried after a failure.
    """

    order: Order
    micro_batch: int
    bytes_peak: int
    bytes_bound: int
    cuts: Cuts = ()
    means: Means = NOTHING
    kind: str = ""
    effort: float = 0.0


class Tries:
    """The tries of the order in hand, by how much this device's predictions were too low so far, and how fast engines were.

    Attributes:
        due: When to try again, on the monotonic clock.
        scales: By engine: measured over predicted memory of earlier orders, at least 1: up at once, down by a tenth of the
            excess. One that is not named has 1.
        paces: What orders have taken here.
    """

    __slots__ = (
        "_broken",
        "_doubted",
        "_ended",
        "_engines",
        "_order",
        "_peak",
        "_said",
        "_samples",
        "_way",
        "due",
        "paces",
        "scales",
    )

    def __init__(self, paces: Paces | None = None) -> None:
        self.due = NEVER
        self.scales: dict[str, float] = {}
        self.paces = paces or Paces()
        self._order = ""
        self._way: Way | None = None
        self._ended = 0
        self._peak = 0
        self._said = ""
        self._samples = 0
        self._engines: frozenset[str] = frozenset()
        self._doubted: set[str] = set()  # failed with the order in hand: it may be the order's own fault
        self._broken: set[str] = set()  # failed with one that another engine then did

    def fit(self, order: Order, spec: ModelSpec, means: Sequence[Means]) -> Way | Refusing:
        """Say how to do an order now: as large as fits at first, smaller than what failed after that.

        Args:
            order: What was asked.
            spec: Its model.
            means: The engines that there are, the best first, and what an order would have on each.

        Raises:
            SpecError: The structure does not belong to the model.
            Unsupported: No engine here has all its ops.

        Cost: some predictions for each engine, a millisecond each.
        """
        self.due = NEVER
        if order.id != self._order:
            self._order, self._way, self._ended, self._peak = order.id, None, 0, 0
            self._doubted.clear()
        means = self._sound(spec, means)
        self._engines = frozenset(having(spec, [one.engine for one in means]))
        if self._way is None or not self._ended:
            known = self.paces, choice.steps_of(order, self._samples)
            found = choice.choose(order, spec, means, self.scales, known)
            if isinstance(found, planning.Refused):
                return Refusing(order.id, "memory", found.detail, found.bytes_needed, found.bytes_free)
            way = self._priced(spec, order, (found.fits.micro_batch, found.fits.cuts), found.means)
            self._way = replace(way, kind=found.kind, effort=found.effort)
            return self._way
        smaller = self._smaller(order, spec, means, self._way)
        if smaller is None:
            free = next((one.bytes_budget for one in means if one.engine == self._way.means.engine), 0)
            return self._given_up("nothing smaller fits", self._way.bytes_bound, free)
        self._way = smaller
        return smaller

    def failed(self, job: Job, result: Failed, now: float, *, sent: bool = True) -> Refusing | None:
        """Take in how a job failed.

        Args:
            job: Which.
            result: Why.
            now: On the monotonic clock.
            sent: Whether a worker had it.

        Returns:
            What to tell the coordinator; None when it is to be tried again at `due`.
        """
        self._peak = max(self._peak, result.bytes_peak)
        needed = max(result.bytes_needed, self._peak)
        if (
            sent
            and result.reason in ("crash", "unsupported")
            and self._engines - self._broken - self._doubted - {job.engine}
        ):
            self._doubted.add(job.engine)
            self.due = now + SECONDS_PAUSE
            log.warning("engine %s failed, another one is tried: %s", job.engine, result.detail)
            return None
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

    def done(self, job: Job, result: Done, took: tuple[float, float] = (0.0, 0.0)) -> None:
        """Take in what an order has cost.

        Args:
            job: The order.
            result: Its end.
            took: Seconds with the engine loaded, and those before, in which it was; 0 for what is not known.
        """
        engine = job.engine
        self._broken = (self._broken | self._doubted) - {engine}
        known = self.scales.get(engine, 1.0)
        self.scales[engine] = 1.0 + (known - 1.0) * _FORGETTING if known > 1.001 else 1.0
        self._learn(job, result.usage.bytes_peak)
        self.paces.learn(engine, took[1])
        if self._way is not None and self._way.kind and job.order.verb == "train":
            self._samples = result.samples
            expected = self._way.effort * choice.steps_of(job.order, result.samples)
            self.paces.learn(f"{engine} {self._way.kind}", took[0] / expected if expected else 0.0)

    def again(self) -> Again:
        """Say that it is time."""
        self.due = NEVER
        return Again(self._order)

    def _sound(self, spec: ModelSpec, means: Sequence[Means]) -> Sequence[Means]:
        """Leave out the engines that failed, as long as others have all ops of the model."""
        for failed in (self._broken | self._doubted, self._doubted):
            left = [one for one in means if one.engine not in failed]
            if any(not lacks(one.engine, spec) for one in left):
                return left
        return means

    def _learn(self, job: Job, bytes_peak: int) -> None:
        # What earlier orders have left in a worker, and what is held dense for speed, may exceed a bound within the budget.
        way = self._way
        if way is None or job.order.id != self._order:
            return
        if bytes_peak > max(way.bytes_bound, job.bytes_budget):
            self.scales[job.engine] = self.scales.get(job.engine, 1.0) * bytes_peak / way.bytes_bound

    def _given_up(self, why: str, bytes_needed: int, bytes_free: int) -> Refusing:
        tries = f"{self._ended} tries" if self._ended > 1 else "one try"
        seen = f"with up to {self._peak / _MEBIBYTE:.1f} MiB seen above the worker's base"
        detail = f"{why}; after {tries}, {seen}: {self._said}"
        return Refusing(self._order, "oom", detail[:2000], max(bytes_needed, self._peak), bytes_free)

    def _smaller(self, order: Order, spec: ModelSpec, means: Sequence[Means], than: Way) -> Way | None:
        found = []
        able = [one for one in means if one.engine in self._engines]
        able.sort(key=lambda one: one.engine != than.means.engine)
        for structure, manner in _ways(order, spec):
            asked = order if structure in order.structures else replace(order, structures=(structure,))
            for one in able:
                way = self._priced(spec, asked, manner, one)
                if not one.bytes_budget or way.bytes_bound <= one.bytes_budget:
                    found.append(way)
        least = min(found, key=lambda way: way.bytes_peak, default=than)
        for way in (*found, least):
            if way.bytes_peak <= (_LEAST if way is least else _LESS) * than.bytes_peak:
                return way
        return None

    def _priced(self, spec: ModelSpec, order: Order, manner: tuple[int, Cuts], means: Means) -> Way:
        widest = max(order.structures, key=lambda s: s.capacity)
        on = self.scales.get(means.engine, 1.0), means.engine
        found = planning.price(order, spec, widest, manner, on)
        return Way(order, manner[0], found.peak, found.bound, manner[1], means)


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
