"""Which part of a model a device holds: the largest for which what one of its own engines takes is within its budget.

The device prices an order in the same way (`wire.prices`), so that it refuses nothing that was found here. What it tells of
itself is enough for that: its engines, and the budget above the base of a worker with the first of them. That of another one
may be less where free memory bounds both; it only counts where the first lacks an op of the model, or takes more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from wire.memory import micro_batches
from wire.messages import Recipe
from wire.prices import TORCH, having, lacks, training
from wire.spec import ModelSpec, Structure


@dataclass(frozen=True, slots=True)
class Plan:
    """How an order fits into a budget.

    Attributes:
        capacity: Index of the width.
        micro_batch: Samples that go through the model at once.
        bytes_peak: Expected peak above base.
        bytes_bound: The same with its margin.
    """

    capacity: int
    micro_batch: int
    bytes_peak: int
    bytes_bound: int


@dataclass(frozen=True, slots=True)
class Means:
    """What decides which part of a model a device holds; devices with the same hold the same.

    Attributes:
        bytes_budget: Memory that an order may take above a worker's base.
        scale: Measured over predicted memory, at least 1.
        engines: What the device may train on, the best first; one that lacks an op of the model does not count. Empty for
            torch.
    """

    bytes_budget: int
    scale: float = 1.0
    engines: tuple[str, ...] = ()


def least(spec: ModelSpec, structure: Structure, recipe: Recipe, engines: Sequence[str] = ()) -> int:
    """Give the bytes above base with which a device of these engines (see `Means`) does an order at its full batch.

    Raises:
        Unsupported: None has all ops of the model.
    """
    return min(training(engine)(spec, structure, recipe).bound for engine in having(spec, engines or (TORCH,)))


def fit(spec: ModelSpec, structures: Sequence[Structure], recipe: Recipe, means: Means) -> Plan | None:
    """Find the widest structure that a device holds on one of its engines, then the largest micro-batch for it.

    Args:
        spec: The model.
        structures: Candidates; the one of highest capacity that fits wins.
        recipe: How to train; micro-batches tried are its batch, half of it, and so on down to 1.
        means: The device's.

    Returns:
        None when not even the narrowest fits with one sample at a time. Of engines that hold the same, the first one's.
    """
    prices = [training(engine) for engine in means.engines or (TORCH,) if not lacks(engine, spec)]
    for structure in sorted(structures, key=lambda s: s.capacity, reverse=True):
        for micro_batch in micro_batches(recipe):
            for price in prices:
                found = price(spec, structure, recipe, micro_batch, scale=means.scale)
                if found.bound <= means.bytes_budget:
                    return Plan(structure.capacity, micro_batch, found.peak, found.bound)
    return None
