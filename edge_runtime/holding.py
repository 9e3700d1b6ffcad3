"""How a worker holds masked weights: what memory allows, and what that takes."""

from __future__ import annotations

from math import prod

from edge_runtime.engines import Choice
from wire import memory
from wire.job import Job
from wire.masked import Masked
from wire.spec import ModelSpec, Structure, tensor_shapes

_DENSE_FROM = 0.5


def price(
    job: Job, spec: ModelSpec, structure: Structure, micro_batch: int, dense: frozenset[str] = frozenset()
) -> memory.Prediction:
    """Predict an order's memory with some of its masked tensors held dense."""
    masked = Masked(structure.kept, dense) if structure.kept else None
    if job.order.verb == "train":
        return memory.predict(spec, structure, job.order.recipe, micro_batch, masked=masked)
    return memory.predict_evaluation(spec, structure, micro_batch, masked=masked)


def choice(job: Job, spec: ModelSpec, structure: Structure, micro_batch: int, *, pinned: bool) -> Choice:
    """Say how masked weights may be held: as is fastest here within the budget.

    Args:
        job: Its budget bounds what is held dense.
        spec: The model.
        structure: Says how much is kept.
        micro_batch: Samples that go through the model at once.
        pinned: By density alone instead, so that bits repeat: dense where more than half is kept.
    """
    if pinned:
        shapes = tensor_shapes(spec, structure)
        shares = {name: kept / max(1, prod(shapes[name])) for name, kept in structure.kept.items()}
        return Choice(
            micro_batch, {name: "dense" if share > _DENSE_FROM else "sparse" for name, share in shares.items()}
        )
    budget = job.bytes_budget

    def allows(dense: frozenset[str]) -> bool:
        return not budget or price(job, spec, structure, micro_batch, dense).bound <= budget

    return Choice(micro_batch, allows=allows)
