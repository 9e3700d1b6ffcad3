"""Channels that are kept, as masks of every tensor that touches them, and as numbers that fit into an order.

A channel of an axis group (see `wire.spec`) stands in rows of the weights that make it, in their biases, in norms, and in
columns of the weights that read it. What is kept of a tensor is the product of what is kept along each of its dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wire.errors import SpecError
from wire.masks import Mask
from wire.spec import Axis, AxisGroup, ModelSpec, Structure, TensorSpec, tensor_shapes

Kept = Mapping[str, NDArray[np.bool_]]
"""By axis group: whether each of its channels is kept ``(size,)``. A group that is not named is whole."""

_BITS = 48
"""Channels in one number: a float64 holds every whole number of 53 bits."""


def prunable(spec: ModelSpec) -> tuple[AxisGroup, ...]:
    """Give the groups whose channels may go, in the spec's order."""
    return tuple(group for group in spec.groups if group.prunable)


def all_kept(spec: ModelSpec) -> dict[str, NDArray[np.bool_]]:
    """Keep every channel of every prunable group."""
    return {group.name: np.ones(group.size, np.bool_) for group in prunable(spec)}


def tensor_masks(spec: ModelSpec, kept: Kept) -> dict[str, Mask]:
    """Mark the weights of the channels that are kept, for every tensor that loses any; the others are whole.

    Cost: a byte per weight of the tensors that are given.
    """
    shapes = tensor_shapes(spec, Structure())
    found = {}
    for tensor in spec.tensors:
        lines = [
            (place, line) for place, line in enumerate(_lines(tensor, kept)) if line is not None and not line.all()
        ]
        if not lines:
            continue
        mask = np.ones(shapes[tensor.name], np.bool_)
        for place, line in lines:
            mask &= line.reshape([-1 if i == place else 1 for i in range(mask.ndim)])
        found[tensor.name] = mask
    return found


def channels_of(spec: ModelSpec, masks: Mapping[str, Mask]) -> dict[str, NDArray[np.bool_]] | None:
    """Undo `tensor_masks`: give the channels that masks keep anything of.

    Args:
        spec: The model.
        masks: In the tensors' shapes; a tensor that is not named is whole.

    Returns:
        None when the masks are those of no channels.
    """
    kept = {group.name: np.zeros(group.size, np.bool_) for group in prunable(spec)}
    for tensor in spec.tensors:
        for place, axis in enumerate(tensor.axes):
            if axis.group in kept:
                np.logical_or(kept[axis.group], _seen(axis, place, masks.get(tensor.name)), out=kept[axis.group])
    again, whole = tensor_masks(spec, kept), np.True_
    same = all(
        np.array_equal(mask, np.broadcast_to(again.get(name, whole), mask.shape)) for name, mask in masks.items()
    )
    return kept if same and set(again) <= set(masks) else None


def to_words(spec: ModelSpec, kept: Kept) -> dict[str, float]:
    """Write channels as numbers: word j of group i holds channels ``48 j`` to ``48 j + 47``, the first in the lowest bit.

    Returns:
        Names ``GROUP.WORD``, both counted from 0 in the order of `prunable`, with whole numbers below ``2 ** 48``.
    """
    words = {}
    for place, group in enumerate(prunable(spec)):
        for start in range(0, group.size, _BITS):
            part = np.flatnonzero(kept[group.name][start : start + _BITS])
            words[f"{place}.{start // _BITS}"] = float(sum(1 << int(bit) for bit in part))
    return words


def from_words(spec: ModelSpec, words: Mapping[str, float]) -> dict[str, NDArray[np.bool_]]:
    """Undo `to_words`.

    Raises:
        SpecError: A word is missing or foreign, or says more than its channels.
    """
    found = {group.name: np.zeros(group.size, np.bool_) for group in prunable(spec)}
    left = dict(words)
    for place, group in enumerate(prunable(spec)):
        for start in range(0, group.size, _BITS):
            part = found[group.name][start : start + _BITS]
            value = left.pop(f"{place}.{start // _BITS}", -1.0)
            if not 0 <= value < 1 << len(part) or value != int(value):
                raise SpecError(f"channels of axis group {group.name!r} from {start}: {value:g} is no word of them")
            part[:] = [int(value) >> bit & 1 for bit in range(len(part))]
    if left:
        raise SpecError(f"words {sorted(left)[:3]} are about channels that model {spec.name!r} lacks")
    return found


def _lines(tensor: TensorSpec, kept: Kept) -> list[Mask | None]:
    """Give what is kept along each dimension of a tensor; None for all of it."""
    return [along(axis, kept[axis.group]) if axis.group in kept else None for axis in tensor.axes]


def along(axis: Axis, channels: NDArray[Any]) -> NDArray[Any]:
    """Give what is said of a group's channels ``(size,)`` for every entry of an axis that follows it."""
    return np.tile(np.repeat(channels, axis.inner), axis.outer)


def _seen(axis: Axis, place: int, mask: Mask | None) -> Mask:
    """Say which channels of an axis a mask keeps anything of."""
    if mask is None:
        return np.array(True)
    line = mask.any(axis=tuple(i for i in range(mask.ndim) if i != place))
    return np.asarray(line.reshape(axis.outer, -1, axis.inner).any(axis=(0, 2)), np.bool_)
