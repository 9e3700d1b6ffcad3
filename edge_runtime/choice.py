"""Which engine does an order: of those that know the model's ops and that memory holds, the one that was fastest here.

An engine that was not measured yet with such an order has its try, the best first. What gives the gradient of the whole
batch comes before what is faster, as everywhere. Light: the agent loads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from edge_runtime.memory import plan as planning
from edge_runtime.paces import Paces, kind
from wire.effort import effort
from wire.messages import Order
from wire.prices import having
from wire.spec import ModelSpec, statistics, tensor_shapes


@dataclass(frozen=True, slots=True)
class Means:
    """What an order would have on one engine.

    Attributes:
        engine: Its name.
        bytes_budget: Above the base of a worker with this engine; 0 for no limit.
        loaded: Whether a worker is there that has loaded it.
    """

    engine: str
    bytes_budget: int
    loaded: bool = False


NOTHING = Means("", 0)


@dataclass(frozen=True, slots=True)
class Chosen:
    """How an order is done.

    Attributes:
        means: On which engine, and what that has.
        fits: In which way.
        kind: What this order's time says something of.
        effort: Seconds of a step, as `wire.effort` counts them.
    """

    means: Means
    fits: planning.Fits
    kind: str
    effort: float


def choose(
    order: Order,
    spec: ModelSpec,
    means: Sequence[Means],
    scales: Mapping[str, float],
    known: tuple[Paces, int],
) -> Chosen | planning.Refused:
    """Choose engine and way together.

    Args:
        order: What is asked.
        spec: Its model.
        means: The engines, the best first.
        scales: Measured over predicted memory, by engine; 1 for those that are not named.
        known: What was measured here, and the steps that the order is expected to make.

    Raises:
        SpecError: The structure does not belong to the model.
        Unsupported: No engine here has all its ops.

    Cost: that of `edge_runtime.memory.plan.plan` for each engine.
    """
    found: list[Chosen] = []
    refused: list[planning.Refused] = []
    widest = max(order.structures, key=lambda s: s.capacity)
    took, what = effort(spec, widest), kind_of(order, spec)
    able = having(spec, [one.engine for one in means])
    for one in means:
        if one.engine not in able:
            continue
        fits = planning.plan(order, spec, one.bytes_budget, scales.get(one.engine, 1.0), one.engine)
        if isinstance(fits, planning.Refused):
            refused.append(fits)
        else:
            found.append(Chosen(one, fits, what, took.step(order.recipe.batch, fits.micro_batch, fits.cuts)))
    if not found:
        return min(refused, key=lambda one: one.bytes_needed - one.bytes_free)
    if statistics(spec):
        found = [one for one in found if one.fits.micro_batch == order.recipe.batch] or found
    return _fastest(order, found, *known)


def _fastest(order: Order, found: Sequence[Chosen], paces: Paces, steps: int) -> Chosen:
    """Take what was not tried yet, else the fastest. Of what is not training nothing is learnt, and nothing is tried."""
    ratios = [paces.ratio(one.means.engine, one.kind) for one in found]
    tried = [(one, ratio) for one, ratio in zip(found, ratios, strict=True) if ratio is not None]
    if len(tried) < len(found) and (order.verb == "train" or not tried):
        return next(one for one, ratio in zip(found, ratios, strict=True) if ratio is None)

    def seconds(each: tuple[Chosen, float]) -> float:
        one, ratio = each
        start = 0.0 if one.means.loaded else paces.loading(one.means.engine)
        return ratio * one.effort * steps + start

    return min(tried, key=seconds)[0]


def kind_of(order: Order, spec: ModelSpec) -> str:
    """Name the kind of an order, as far as times go."""
    widest = max(order.structures, key=lambda s: s.capacity)
    if not widest.kept:
        return kind(order.spec.digest, 1.0)
    shapes = tensor_shapes(spec, widest)
    whole = sum(prod(shapes[name]) for name in widest.kept if name in shapes)
    return kind(order.spec.digest, sum(widest.kept.values()) / max(1, whole))


def steps_of(order: Order, samples: int) -> int:
    """Give how many steps an order makes over so many samples; 1 where that is not known."""
    recipe = order.recipe
    return max(1, recipe.steps or recipe.epochs * -(-samples // recipe.batch))
