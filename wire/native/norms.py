"""What norms hold: their input is kept, and of each run of values that was normed three numbers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import prod

from wire.native.needs import Dims, Facts, Needs, Say

BLOCK = 16384
"""Values that are looked at together where numpy does the work."""

Extents = tuple[int, int, int, int]


def extents(op: str, attrs: Mapping[str, int], batch: int, shape: Dims) -> Extents:
    """See a norm's input as (samples, groups, channels of each, entries of each channel).

    A statistic is taken over the last two, of a batch norm also over the samples.

    Args:
        op: ``batch_norm``, ``group_norm`` or ``layer_norm``.
        attrs: Of the node.
        batch: Samples.
        shape: Of one sample.
    """
    if op == "layer_norm":
        return batch * prod(shape[:-1]), 1, shape[-1], 1
    groups = attrs["groups"] if op == "group_norm" else shape[0]
    return batch, groups, shape[0] // groups, prod(shape[1:])


def _norm(op: str, facts: Facts) -> Needs:
    samples, groups, each, inner = extents(op, facts.node.attrs, facts.batch, facts.inputs[0])
    sets = groups if op == "batch_norm" else samples * groups
    block = max(inner, min(BLOCK, samples * groups * each * inner))
    return Needs(
        saves=dict.fromkeys(("mean", "rest", "inverse"), (sets,)),
        backward={"block": (block,)},
        reads_input=True,
        over_back=True,
    )


NEEDS: Mapping[str, Say] = {op: partial(_norm, op) for op in ("batch_norm", "group_norm", "layer_norm")}
