"""How a worker holds masked weights: what memory allows, and what that takes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from math import prod
from typing import TYPE_CHECKING

from edge_runtime.engines import Choice, Engine
from wire import memory, prices
from wire.errors import BudgetExceeded
from wire.job import Job
from wire.masked import Masked
from wire.spec import ModelSpec, Structure, tensor_shapes

if TYPE_CHECKING:
    from wire.masks import AnyMask

_DENSE_FROM = 0.5


def price(
    job: Job, spec: ModelSpec, structure: Structure, micro_batch: int, dense: frozenset[str] = frozenset()
) -> memory.Prediction:
    """Predict an order's memory with some of its masked tensors held dense."""
    masked = Masked(structure.kept, dense) if structure.kept else None
    if job.order.verb == "train":
        return prices.training(job.engine)(spec, structure, job.order.recipe, micro_batch, masked=masked, cuts=job.cuts)
    return prices.evaluation(job.engine)(spec, structure, micro_batch, masked=masked)


def load(
    engine: Engine,
    model: tuple[ModelSpec, Structure],
    masks: Mapping[str, AnyMask],
    job: Job,
    micro_batch: int,
    *,
    pinned: bool,
    bytes_left: int = 0,
) -> None:
    """Load an empty engine with masks, held as is fastest here within the budget.

    Ways are timed beside each other, two whole steps in memory at once. Where the budget does not hold two, nothing is timed,
    and what is kept says how it is held.

    Args:
        engine: Whose weights are all zero afterwards.
        model: What is loaded.
        masks: What is kept of it.
        job: Its budget bounds what is held dense.
        micro_batch: Samples that go through the model at once.
        pinned: By density alone in any case, so that bits repeat: dense where more than half is kept.
        bytes_left: What earlier orders have left in this process; the budget has to hold it too.

    Raises:
        BudgetExceeded: A tensor can only be held dense here, and memory does not allow that.
    """
    (spec, structure), budget = model, job.bytes_budget

    def fits(dense: frozenset[str], steps: int) -> bool:
        found = price(job, spec, structure, micro_batch, dense)
        return not budget or found.bound + (steps - 1) * int(memory.MARGIN * found.peak) + bytes_left <= budget

    if not pinned and fits(frozenset(), 2):
        with contextlib.suppress(BudgetExceeded):  # what has no layout here is held dense, and must fit but once
            engine.load(spec, structure, None, masks, Choice(micro_batch, allows=lambda dense: fits(dense, 2)))
            return
    shapes = tensor_shapes(spec, structure)
    shares = {name: kept / max(1, prod(shapes[name])) for name, kept in structure.kept.items()}
    dense = frozenset(name for name, share in shares.items() if share > _DENSE_FROM)
    if pinned:
        allowed = Choice(micro_batch, _ways(shares, dense))
    else:
        dense = dense if fits(dense, 1) else frozenset()
        allowed = Choice(micro_batch, _ways(shares, dense), allows=lambda asked: fits(asked | dense, 1))
    engine.load(spec, structure, None, masks, allowed)


def _ways(names: Iterable[str], dense: frozenset[str]) -> dict[str, str]:
    return {name: "dense" if name in dense else "sparse" for name in names}
