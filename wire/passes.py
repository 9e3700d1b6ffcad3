"""Ways to do one and the same training step: in how many passes, and with what run again. The fastest first.

Smaller passes and recomputation give the same gradient and take less memory for more time. Batch norms are the exception:
they see one pass alone, so that with them only a whole batch is exact, and recomputation comes before smaller passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from wire.effort import Effort, effort
from wire.memory import micro_batches
from wire.messages import Recipe
from wire.segments import Cuts, places
from wire.spec import ModelSpec, Structure, statistics
from wire.walk import Walk, peak, saved

_SHARES = (0.8, 0.65, 0.5, 0.4, 0.3, 0.2, 0.1)
"""Of what a whole pass saves for its way back: what passes with segments are to make do with."""

_SAMPLES = 16
_WORTH = 0.85
"""Cuts are worth their time where they take at most so many times what cuts take that cost less time."""


@dataclass(frozen=True, slots=True)
class Passes:
    """One way of doing a step.

    Attributes:
        micro_batch: Samples that go through the model at once.
        cuts: Where it is cut into segments that run again (`wire.segments`); empty for none.
        seconds: Predicted for a step, as `wire.effort` counts them.
        exact: Whether it gives the gradient of the whole batch.
    """

    micro_batch: int
    cuts: Cuts
    seconds: float
    exact: bool


def passes(spec: ModelSpec, structure: Structure, recipe: Recipe, *, masked: bool = False) -> list[Passes]:
    """Give the ways worth trying, in the order in which they should be: those that are exact first, the fastest of them first.

    Args:
        spec: The model.
        structure: The part that is trained.
        recipe: How.
        masked: Whether any weight is masked: such models are not cut.

    Raises:
        SpecError: The model cannot be run.

    Cost: about that of ten predictions.
    """
    sizes, took, norms = micro_batches(recipe), effort(spec, structure), bool(statistics(spec))
    cuts = [(), *(() if masked else options(spec, structure, took))]
    found = [
        Passes(size, cut, took.step(recipe.batch, size, cut), exact=size == recipe.batch or not norms)
        for size in sizes
        for cut in cuts
    ]
    return sorted(found, key=lambda one: (not one.exact, one.seconds))


def options(spec: ModelSpec, structure: Structure, took: Effort | None = None) -> list[Cuts]:
    """Give the cuts that make do with less and less, the fastest first.

    What a pass with segments holds at most is about ``max over segments s of (what crosses before s + what s saves)``; each
    option keeps that below some share of what the whole pass saves, and runs as little as possible again.
    """
    took = took or effort(spec, structure)
    known = places(spec.nodes)
    if not known:
        return []
    walk = Walk(spec, structure, _SAMPLES, backward=True)
    held = saved(walk)
    crossing = {i: walk.size[spec.nodes[i].name] for i in known}
    total = sum(held)
    found = {cuts for share in _SHARES if (cuts := _cut(held, crossing, share * total))}
    worth: list[Cuts] = []
    least = peak(walk)
    for cuts in sorted(found, key=lambda cuts: (sum(took.forward[: cuts[-1] + 1]), len(cuts))):
        takes = peak(Walk(spec, structure, _SAMPLES, backward=True, cuts=cuts))
        if takes <= _WORTH * least:
            worth.append(cuts)
            least = takes
    return worth


def _cut(held: list[int], crossing: dict[int, int], most: float) -> Cuts:
    """Cut so that no segment has more than `most` with what crosses before it, as early as possible; empty if that fails."""
    behind, known, total = [0, *accumulate(held)], sorted(crossing), sum(held)
    cuts: list[int] = []
    before, start, place = 0.0, 0, 0
    while before + total - behind[start] > most:
        last = None
        while place < len(known) and before + behind[known[place] + 1] - behind[start] <= most:
            last, place = known[place], place + 1
            if before + crossing[last] + total - behind[last + 1] <= most:
                break
        if last is None:
            return ()
        cuts.append(last)
        before, start = before + crossing[last], last + 1
    return tuple(cuts)
