"""Fit an order into this device's memory, or say what it would need."""

from __future__ import annotations

from dataclasses import dataclass

from wire import memory, prices
from wire.messages import Order
from wire.passes import passes
from wire.segments import Cuts
from wire.spec import ModelSpec, Structure


@dataclass(frozen=True, slots=True)
class Fits:
    """The order can run.

    Attributes:
        micro_batch: Samples at once.
        bytes_bound: Predicted peak above base, with its margin.
        cuts: Where the model is cut into segments that run again in the backward pass; empty for none.
    """

    micro_batch: int
    bytes_bound: int
    cuts: Cuts = ()


@dataclass(frozen=True, slots=True)
class Refused:
    """The order cannot run.

    Attributes:
        bytes_needed: The least budget that would do.
        bytes_free: What there is.
        detail: The same as a sentence.
    """

    bytes_needed: int
    bytes_free: int
    detail: str


def plan(
    order: Order, spec: ModelSpec, bytes_budget: int, scale: float = 1.0, engine: str = prices.TORCH
) -> Fits | Refused:
    """Choose how an order's own structure is trained: the fastest way that fits, but with batch norms one that is exact first.

    Args:
        order: What is asked; an ``evaluate`` is planned for its widest structure.
        spec: Its model.
        bytes_budget: What may be taken above base; 0 for no limit.
        scale: Measured over predicted peak of earlier orders on this device, at least 1.
        engine: What it would run on.

    Raises:
        SpecError: The structure does not belong to the model.

    Cost: one prediction where the whole batch fits, else some tens, of one to some milliseconds each.
    """
    widest = max(order.structures, key=lambda s: s.capacity)
    whole = price(order, spec, widest, (order.recipe.batch, ()), (scale, engine)).bound
    if not bytes_budget or whole <= bytes_budget:  # nothing is faster, and the other ways cost time to find
        return Fits(order.recipe.batch, whole)
    least = whole
    for micro_batch, cuts in manners(order, spec, widest):
        bytes_bound = price(order, spec, widest, (micro_batch, cuts), (scale, engine)).bound
        if bytes_bound <= bytes_budget:
            return Fits(micro_batch, bytes_bound, cuts)
        least = min(least, bytes_bound)
    detail = f"width {widest.capacity} of {spec.name} needs at least {_mebi(least)}; granted are {_mebi(bytes_budget)}"
    return Refused(least, bytes_budget, detail)


def manners(order: Order, spec: ModelSpec, structure: Structure) -> list[tuple[int, Cuts]]:
    """Give the micro-batches and cuts in which an order can be done, the best first (`wire.passes`)."""
    if order.verb != "train":
        return [(size, ()) for size in memory.micro_batches(order.recipe)]
    masked = order.masks is not None or bool(structure.kept)
    return [(way.micro_batch, way.cuts) for way in passes(spec, structure, order.recipe, masked=masked)]


def price(
    order: Order,
    spec: ModelSpec,
    structure: Structure,
    manner: tuple[int, Cuts],
    on: tuple[float, str] = (1.0, prices.TORCH),
) -> memory.Prediction:
    """Predict what an order takes for one of its structures, or a narrower one.

    Args:
        order: What is asked.
        spec: Its model.
        structure: The width.
        manner: Micro-batch and cuts.
        on: Scale, as in `plan`, and engine.
    """
    (micro_batch, cuts), (scale, engine) = manner, on
    if order.verb == "train":
        return prices.training(engine)(spec, structure, order.recipe, micro_batch, scale=scale, cuts=cuts)
    return prices.evaluation(engine)(spec, structure, micro_batch, scale)


def _mebi(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"
