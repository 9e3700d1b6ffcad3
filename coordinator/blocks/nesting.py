"""Nested widths: how many channels each has, which channels they are, and what one has beyond the next narrower one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordinator.algorithm import State
from wire.channels import along
from wire.errors import NonFinite
from wire.spec import ModelSpec, Structure, TensorSpec, group_sizes, tensor_shape
from wire.structure import ranking_digest, shell_blocks

Masks = dict[str, NDArray[np.bool_]]


def kept_counts(size: int, fractions: Sequence[float]) -> tuple[int, ...]:
    """Give ``max(1, ceil(fraction * size))`` for each kept fraction (the rounding of HeteroFL, FjORD and NeFL)."""
    return tuple(max(1, math.ceil(fraction * size - 1e-9)) for fraction in fractions)


def widths_of(spec: ModelSpec, fractions: Sequence[float]) -> dict[str, tuple[int, ...]]:
    """Give every prunable group the channel counts of these kept fractions, which ascend."""
    return {g.name: kept_counts(g.size, fractions) for g in spec.groups if g.prunable}


def whole_of(state: State) -> Structure:
    """Give the structure of a state's widest width."""
    return Structure(len(next(iter(state.widths.values()))) - 1, state.widths, ranking_digest(state.levels))


def prefix(spec: ModelSpec, widths: Mapping[str, Sequence[int]]) -> dict[str, NDArray[np.uint8]]:
    """Rank channels by their index: every width is a prefix of every layer (HeteroFL, ICLR 2021; FjORD, NeurIPS 2021).

    Args:
        spec: The model.
        widths: As for `rank`.

    Returns:
        As `rank`.
    """
    sizes = {g.name: g.size for g in spec.groups}
    levels = {}
    for group, counts in widths.items():
        places = np.searchsorted(counts, np.arange(sizes[group]), side="right")
        levels[group] = np.minimum(places, len(counts) - 1).astype(np.uint8)
    return levels


def rank(
    spec: ModelSpec,
    weights: Mapping[str, NDArray[np.float32]],
    widths: Mapping[str, Sequence[int]],
    *,
    progressive: bool = True,
) -> dict[str, NDArray[np.uint8]]:
    """Rank channels by L1 norm, by default progressively (NestFL: MobiCom 2022, poster, section 2).

    From the smallest pruning rate to the largest, each width is pruned out of the one before: a channel's score is the sum of
    the absolute weights that make it, over the inputs that are still there. Of equal scores the lower index stays.

    Args:
        spec: The model.
        weights: Whole arrays in canonical order.
        widths: For each prunable group the channel counts of all widths, ascending.
        progressive: Whether what is pruned is left out of the next scores. False scores once, over all inputs (FedMP, ICDE
            2022, section on model pruning).

    Returns:
        For each of these groups the narrowest capacity that still has each channel, uint8 of the group's size. Channels that
        not even the widest has get that capacity all the same, so widths should end with the whole group.

    Raises:
        NonFinite: A weight that a score needs is no number.

    Cost: one pass over the weights, then one product of group sizes per tensor and width.
    """
    sizes = {g.name: g.size for g in spec.groups}
    tables = {group: _tables(spec, weights, group, sizes) for group in widths}
    kept: Masks = {name: np.ones(size, np.bool_) for name, size in sizes.items()}
    levels = {group: np.zeros(sizes[group], np.uint8) for group in widths}
    capacities = len(next(iter(widths.values()), ()))
    present = kept if progressive else {name: np.ones(size, np.bool_) for name, size in sizes.items()}
    for capacity in reversed(range(capacities)):
        scores = {group: _scores(group, tables[group], present) for group in widths}
        for group, counts in widths.items():
            order = np.lexsort((np.arange(sizes[group]), -scores[group], ~kept[group]))
            leaving = order[counts[capacity] :]
            leaving = leaving[kept[group][leaving]]
            levels[group][leaving] = min(capacity + 1, capacities - 1)
            kept[group][leaving] = False
    return levels


def levels_of(tensor: TensorSpec, levels: Mapping[str, NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Give the narrowest capacity that has each weight of a tensor, in canonical order: the most that its channels say.

    Args:
        tensor: Whole.
        levels: As `rank` gives them.

    Returns:
        An array that broadcasts to the tensor's shape. Cost: a byte per weight.
    """
    found = np.zeros((1,) * len(tensor.axes), np.uint8)
    for place, axis in enumerate(tensor.axes):
        if axis.group in levels:
            line = along(axis, levels[axis.group])
            found = np.maximum(found, line.reshape([-1 if i == place else 1 for i in range(len(tensor.axes))]))
    return found


def partition(
    spec: ModelSpec, arrays: Mapping[str, NDArray[Any]], structure: Structure, capacity: int
) -> Iterator[NDArray[Any]]:
    """Yield what width `capacity` has beyond the next narrower one, as views, in an order that is the same for every holder.

    Args:
        spec: The model.
        arrays: Arrays of `structure` in wire order; contiguous, if the views are to be written to. A tensor that is left out
            is zero.
        structure: What the arrays are.
        capacity: At most the structure's.

    Raises:
        ValueError: An array is not of the structure's shape.
    """
    held = group_sizes(spec, structure)
    outer = group_sizes(spec, structure.narrowed(capacity))
    inner = group_sizes(spec, structure.narrowed(capacity - 1)) if capacity else None
    for tensor in spec.tensors:
        array = arrays.get(tensor.name)
        whole = _expanded(tensor, np.zeros(tensor_shape(tensor, held), np.float32) if array is None else array, held)
        for box in shell_blocks(tensor, inner, outer):
            yield whole[box]


def _expanded(tensor: TensorSpec, array: NDArray[Any], sizes: Mapping[str, int]) -> NDArray[Any]:
    """View an array with the three dimensions ``(outer, channels, inner)`` for each of its own."""
    shape: list[int] = []
    for axis in tensor.axes:
        shape += [axis.outer, sizes.get(axis.group, 1), axis.inner]
    return array.reshape(shape)


def _tables(
    spec: ModelSpec, weights: Mapping[str, NDArray[np.float32]], group: str, sizes: Mapping[str, int]
) -> list[tuple[list[str], NDArray[np.float64]]]:
    """Sum absolute weights over everything but axis groups, for each tensor that makes the group's channels.

    Those are the tensors of two or more dimensions whose first one is the group; where there are none (an embedding), those
    with the group anywhere. Biases and norms have no inputs and so say nothing about what a channel carries.
    """
    candidates = [t for t in spec.tensors if len(t.axes) > 1]
    makers = [t for t in candidates if t.axes[0].group == group]
    makers = makers or [t for t in candidates if any(a.group == group for a in t.axes)]
    tables = []
    for tensor in makers:
        table = np.abs(_expanded(tensor, weights[tensor.name], sizes)).sum(axis=_free(tensor), dtype=np.float64)
        if not np.isfinite(table).all():
            raise NonFinite(
                f"tensor {tensor.name!r} holds a value that is not finite, so its channels cannot be ranked"
            )
        names = [axis.group for axis in tensor.axes if axis.group]
        tables.append((names, np.moveaxis(table, names.index(group), 0)))
    return [([group, *_others(names, group)], table) for names, table in tables]


def _free(tensor: TensorSpec) -> tuple[int, ...]:
    """Name the dimensions of an expanded array that follow no group."""
    followed = {3 * place + 1 for place, axis in enumerate(tensor.axes) if axis.group}
    return tuple(place for place in range(3 * len(tensor.axes)) if place not in followed)


def _others(names: list[str], group: str) -> list[str]:
    rest = list(names)
    rest.remove(group)
    return rest


def _scores(group: str, tables: list[tuple[list[str], NDArray[np.float64]]], kept: Masks) -> NDArray[np.float64]:
    total = np.zeros(len(kept[group]), np.float64)
    for names, table in tables:
        rest = table
        for name in reversed(names[1:]):
            rest = rest[..., kept[name]].sum(axis=-1)
        total += rest
    return total
