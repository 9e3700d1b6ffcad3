"""Joining updates: ``x[c] += sum of a_n(c) delta_n[c] over the devices n that have coordinate c``.

All methods of this family differ in ``a_n(c)`` alone. Here it is constant over each partition, that is over what one width
has beyond the next narrower one. Arrays are in wire order, where a partition is a few boxes of slices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordinator.blocks.nesting import partition
from wire.spec import ModelSpec, Structure

Arrays = Mapping[str, NDArray[Any]]


def shares(samples: Sequence[int]) -> list[float]:
    """Give ``D_n / sum of D`` (McMahan et al., AISTATS 2017, algorithm 1); not all samples may be zero."""
    total = sum(samples)
    return [count / total for count in samples]


def add_partitions(
    spec: ModelSpec, total: Arrays, update: Arrays, structure: Structure, weights: Sequence[float]
) -> None:
    """Add ``weights[j] * update`` into whole arrays, on each partition j of a structure.

    Args:
        spec: The model.
        total: Whole arrays in wire order; changed in place.
        update: Compact arrays of the structure.
        structure: What the update covers.
        weights: One for each capacity from 0 to the structure's.

    Cost: one multiply-add per weight of the structure; memory for one box of products.
    """
    whole = structure.narrowed(_top(structure))
    for capacity, weight in zip(range(structure.capacity + 1), weights, strict=True):
        scale = np.float32(weight)
        places = partition(spec, total, whole, capacity)
        for place, part in zip(places, partition(spec, update, structure, capacity), strict=True):
            np.add(place, scale * part, out=place)


def _top(structure: Structure) -> int:
    return len(next(iter(structure.widths.values()))) - 1 if structure.widths else 0
