"""Fit an order into this device's memory, or say what it would need."""

from __future__ import annotations

from dataclasses import dataclass

from wire import memory
from wire.messages import Order
from wire.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Fits:
    """The order can run.

    Attributes:
        micro_batch: Samples at once.
        bytes_bound: Predicted peak above base, with its margin.
    """

    micro_batch: int
    bytes_bound: int


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


def plan(order: Order, spec: ModelSpec, bytes_budget: int, scale: float = 1.0) -> Fits | Refused:
    """Choose the micro-batch for an order's own structure.

    Args:
        order: What is asked; an ``evaluate`` is planned for its widest structure.
        spec: Its model.
        bytes_budget: What may be taken above base; 0 for no limit.
        scale: Measured over predicted peak of earlier orders on this device, at least 1.

    Raises:
        SpecError: The structure does not belong to the model.
    """
    recipe = order.recipe
    widest = max(order.structures, key=lambda s: s.capacity)

    def price(micro_batch: int) -> int:
        if order.verb == "train":
            return memory.predict(spec, widest, recipe, micro_batch, scale=scale).bound
        return memory.predict_evaluation(spec, widest, micro_batch, scale).bound

    for micro_batch in memory.micro_batches(recipe):
        bytes_bound = price(micro_batch)
        if not bytes_budget or bytes_bound <= bytes_budget:
            return Fits(micro_batch, bytes_bound)
    least = min(price(1), price(recipe.batch))
    detail = f"width {widest.capacity} of {spec.name} needs at least {_mebi(least)}; granted are {_mebi(bytes_budget)}"
    return Refused(least, bytes_budget, detail)


def _mebi(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"
