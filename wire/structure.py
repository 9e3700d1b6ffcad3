"""Cutting arrays to a width and pasting them back, once everything is in wire order: prefixes, never index lists.

Every dimension of a tensor is seen as ``(outer, channels, inner)`` (see `spec.Axis`); a width is a prefix of `channels` in
all of them. `cut` and `paste_add` are adjoint to each other: ``<cut(x), y> == <x, paste(y)>``. A *shell* is what one width
adds to the next narrower one, as at most one box per dimension.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from wire.errors import Malformed, SpecError
from wire.masks import AnyMask, count, mask_digest
from wire.spec import ModelSpec, Structure, TensorSpec, group_sizes, tensor_shape

Floats = NDArray[np.float32]
Levels = Mapping[str, NDArray[np.uint8]]
Box = tuple[slice, ...]
Where = Callable[[str], NDArray[np.bool_] | None]
_BLOCK = 1 << 16
"""Products that are held at once."""


def order_of(levels: NDArray[np.uint8]) -> NDArray[np.intp]:
    """Give the channels ``(n,)`` in wire order: by level, then by index. Cost: O(n)."""
    return np.argsort(levels, kind="stable")


def widths_of(levels: Levels, capacities: int) -> dict[str, tuple[int, ...]]:
    """Count each group's channels at every capacity, narrowest first.

    Raises:
        SpecError: A group would have no channel at the narrowest width.
    """
    widths = {}
    for name, level in levels.items():
        counts = np.cumsum(np.bincount(level, minlength=capacities)[:capacities])
        if not counts[0]:
            raise SpecError(f"axis group {name!r} keeps no channel at the narrowest width")
        widths[name] = tuple(int(count) for count in counts)
    return widths


def ranking_digest(levels: Levels) -> str:
    """Name a ranking: SHA-256 (hex) of the msgpack list of ``[group, one byte per channel]``, sorted by group.

    Empty when there are no levels, because then nothing is cut.
    """
    if not levels:
        return ""
    pairs = [[name, np.asarray(levels[name], np.uint8).tobytes()] for name in sorted(levels)]
    return hashlib.sha256(msgpack.packb(pairs)).hexdigest()


def masks_digest(masks: Mapping[str, AnyMask]) -> str:
    """Name masks: SHA-256 (hex) of the msgpack list of ``[tensor, digest of its mask]``, sorted by tensor; empty for none."""
    if not masks:
        return ""
    pairs = [[name, mask_digest(masks[name])] for name in sorted(masks)]
    return hashlib.sha256(msgpack.packb(pairs)).hexdigest()


def masked(masks: Mapping[str, AnyMask], width: Structure | None = None) -> Structure:
    """Give the structure that keeps what masks keep of a width, None being the whole model. Cost: one pass over the masks."""
    kept = {name: count(mask) for name, mask in masks.items()}
    return dataclasses.replace(width or Structure(), masks=masks_digest(masks), kept=kept)


def to_wire(spec: ModelSpec, arrays: Mapping[str, NDArray[Any]], levels: Levels) -> dict[str, NDArray[Any]]:
    """Bring whole arrays into wire order. The results are copies. Cost: one gather per axis that moves."""
    return _permuted(spec, arrays, {name: order_of(level) for name, level in levels.items()})


def to_canonical(spec: ModelSpec, arrays: Mapping[str, NDArray[Any]], levels: Levels) -> dict[str, NDArray[Any]]:
    """Undo `to_wire`. The results are copies."""
    return _permuted(spec, arrays, {name: np.argsort(order_of(level)) for name, level in levels.items()})


def _permuted(
    spec: ModelSpec, arrays: Mapping[str, NDArray[Any]], orders: Mapping[str, NDArray[np.intp]]
) -> dict[str, NDArray[Any]]:
    whole = group_sizes(spec, Structure())
    for name, order in orders.items():
        if whole.get(name) != len(order):
            raise SpecError(f"levels for {len(order)} channels of axis group {name!r}, which has {whole.get(name, 0)}")
    moving = {name: order for name, order in orders.items() if not np.array_equal(order, np.arange(len(order)))}
    result = {}
    for tensor in spec.tensors:
        array = arrays[tensor.name]
        grids = [np.arange(n).reshape(a.outer, -1, a.inner) for n, a in zip(array.shape, tensor.axes, strict=True)]
        places = zip(grids, tensor.axes, strict=True)
        result[tensor.name] = _gathered(
            array, [grid[:, moving[a.group]].ravel() if a.group in moving else None for grid, a in places]
        )
    return result


def _gathered(array: NDArray[Any], places: Sequence[NDArray[np.intp] | None]) -> NDArray[Any]:
    """Copy an array, taking these places along each axis, or all; some rows at a time, so that no second copy is made."""
    found = np.empty(array.shape, array.dtype)
    rows = max(1, _BLOCK * len(array) // max(1, array.size))
    for start in range(0, len(array), rows):
        some = slice(start, start + rows)
        part = array[some] if places[0] is None else np.take(array, places[0][some], axis=0)
        for dimension, place in enumerate(places[1:], 1):
            part = part if place is None else np.take(part, place, axis=dimension)
        found[some] = part
    return found


def cut(spec: ModelSpec, arrays: Mapping[str, NDArray[Any]], structure: Structure) -> dict[str, NDArray[Any]]:
    """Cut arrays in wire order down to a structure.

    Args:
        spec: The model.
        arrays: Whole, or compact at the same or a larger capacity of the same ranking.
        structure: What to keep.

    Returns:
        Prefix views of the arrays (copies only of tensors with an axis whose `outer` is above 1). Compact shapes.
    """
    sizes = group_sizes(spec, structure)
    return {t.name: _prefix(t, arrays[t.name], sizes).reshape(tensor_shape(t, sizes)) for t in spec.tensors}


def paste_add(
    spec: ModelSpec,
    total: Mapping[str, NDArray[Any]],
    part: Mapping[str, NDArray[Any]],
    structure: Structure,
    scale: float = 1.0,
    *,
    where: Where | None = None,
) -> None:
    """Add ``scale * part`` into the prefix of `total` that the structure names; the adjoint of `cut`.

    Args:
        spec: The model.
        total: Arrays in wire order, of a floating type that need not be that of `part`; changed in place.
        part: Compact arrays of the structure. A tensor that is left out adds nothing.
        structure: What `part` is of.
        scale: Factor; the product is taken in the type of `total`.
        where: Gives, of a tensor's `part`, the entries that are added, bools of its shape; None for all.

    Raises:
        ValueError: A shape does not fit.
    """
    sizes = group_sizes(spec, structure)
    for tensor in spec.tensors:
        if tensor.name not in part:
            continue
        place = _prefix(tensor, total[tensor.name], sizes)
        value = part[tensor.name]
        if value.shape != tensor_shape(tensor, sizes):
            raise ValueError(f"tensor {tensor.name!r} is {value.shape}, expected {tensor_shape(tensor, sizes)}")
        those = None if where is None else where(tensor.name)
        add_scaled(place, value.reshape(place.shape), scale, None if those is None else those.reshape(place.shape))


def add_scaled(place: NDArray[Any], value: NDArray[Any], scale: float, where: NDArray[np.bool_] | None = None) -> None:
    """Add ``scale * value`` to an array or a view of one, in place. Memory: one block of products, not an array of them.

    Args:
        place: Of a type in which the product is taken too.
        value: Of the same shape; finite where entries are left out.
        scale: Factor.
        where: Of the same shape: the entries that are added; None for all.
    """
    operands = [place, value] if where is None else [place, value, where]
    modes: list[Any] = ["external_loop", "buffered", "zerosize_ok"]
    writes: list[Any] = [["readwrite"], *[["readonly"]] * (len(operands) - 1)]
    with np.nditer(operands, modes, writes, buffersize=_BLOCK) as blocks:
        for into, part, *those in blocks:
            product = np.multiply(part, scale, dtype=place.dtype)
            for kept in those:
                np.multiply(product, kept, out=product)
            np.add(into, product, out=into)


def _prefix(tensor: TensorSpec, array: NDArray[Any], sizes: Mapping[str, int]) -> NDArray[Any]:
    """Give a view of an array's prefix: compact where no axis repeats, else expanded to (outer, channels, inner)s."""
    if all(axis.outer == 1 for axis in tensor.axes):
        view = array[tuple(slice(0, length) for length in tensor_shape(tensor, sizes))]
    else:
        view = _expanded(tensor, array)[_box(tensor, {}, sizes, len(tensor.axes))]
    found = prod(view.shape)
    if found != prod(tensor_shape(tensor, sizes)) or array.ndim != len(tensor.axes):
        raise ValueError(f"tensor {tensor.name!r} of shape {array.shape} is smaller than the structure")
    return view


def _expanded(tensor: TensorSpec, array: NDArray[Any]) -> NDArray[Any]:
    """View an array as (outer, channels, inner) for each dimension; splitting dimensions never copies."""
    shape: list[int] = []
    for axis, length in zip(tensor.axes, array.shape, strict=True):
        shape += [axis.outer, length // (axis.outer * axis.inner), axis.inner]
    return array.reshape(shape)


def shell_blocks(
    tensor: TensorSpec, inner_sizes: Mapping[str, int] | None, outer_sizes: Mapping[str, int]
) -> list[Box]:
    """Tile what one width adds to the next narrower one with boxes of the expanded array (3 slices per dimension).

    Box i lies within the narrower width on the axes before i, beyond it on axis i, and within the wider one on the axes
    after i; so the boxes are disjoint and together are everything. Empty ones are left out.

    Args:
        tensor: The tensor.
        inner_sizes: Channels per group at the narrower width; None when there is none.
        outer_sizes: Channels per group at the wider width.
    """
    if inner_sizes is None:
        return [_box(tensor, {}, outer_sizes, len(tensor.axes))]
    boxes = []
    for dimension, axis in enumerate(tensor.axes):
        if axis.group and inner_sizes[axis.group] < outer_sizes[axis.group]:
            boxes.append(_box(tensor, inner_sizes, outer_sizes, dimension))
    return boxes


def _box(tensor: TensorSpec, inner: Mapping[str, int], outer: Mapping[str, int], beyond: int) -> Box:
    slices: list[slice] = []
    for dimension, axis in enumerate(tensor.axes):
        whole = outer.get(axis.group, 1)
        narrow = inner.get(axis.group, whole)
        start = narrow if dimension == beyond else 0
        end = narrow if dimension < beyond and inner else whole
        slices += [slice(None), slice(start, end), slice(None)]
    return tuple(slices)


def shell(spec: ModelSpec, arrays: Mapping[str, NDArray[Any]], structure: Structure) -> dict[str, Floats]:
    """Take out what the structure's capacity adds to the one below.

    Args:
        spec: The model.
        arrays: In wire order, whole or compact at this or a larger capacity.
        structure: Names the capacity.

    Returns:
        Tensor name to its boxes, each in C order, joined to one line ``(weights of the shell,)``. A tensor that gains
        nothing is left out, so that an empty result means an empty shell.
    """
    inner, outer = _both_sizes(spec, structure)
    result = {}
    for tensor in spec.tensors:
        expanded = _expanded(tensor, np.asarray(arrays[tensor.name], np.float32))
        boxes = [expanded[box].ravel() for box in shell_blocks(tensor, inner, outer)]
        if sum(box.size for box in boxes):
            result[tensor.name] = boxes[0] if len(boxes) == 1 else np.concatenate(boxes)
    return result


def assemble(spec: ModelSpec, structure: Structure, shells: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, Floats]:
    """Put the weights of a structure together from its shells.

    Args:
        spec: The model, or one with only some of its tensors.
        structure: The width that is wanted.
        shells: One map for each capacity ``0 .. structure.capacity``; an empty shell is an empty map.

    Returns:
        Compact arrays in wire order, the caller's own. Cost: one copy of every weight.

    Raises:
        Malformed: A part is missing, foreign, or not of the right length or type.
    """
    if len(shells) != structure.capacity + 1:
        raise Malformed(f"{len(shells)} shells for capacity {structure.capacity}", "$.shells")
    names = {tensor.name for tensor in spec.tensors}
    for part in shells:
        if not names.issuperset(part):
            raise Malformed(f"a shell of tensors that the model lacks: {sorted(set(part) - names)[:3]}", "$.shells")
    shapes = group_sizes(spec, structure)
    result = {t.name: np.empty(tensor_shape(t, shapes), np.float32) for t in spec.tensors}
    for capacity, part in enumerate(shells):
        inner, outer = _both_sizes(spec, structure.narrowed(capacity))
        for tensor in spec.tensors:
            _fill(tensor, result[tensor.name], part.get(tensor.name), shell_blocks(tensor, inner, outer))
    return result


def _both_sizes(spec: ModelSpec, structure: Structure) -> tuple[dict[str, int] | None, dict[str, int]]:
    """Give the group sizes one capacity below (None when there is none) and at the structure's own."""
    below = structure.capacity - 1
    return None if below < 0 else group_sizes(spec, structure.narrowed(below)), group_sizes(spec, structure)


def _fill(tensor: TensorSpec, array: Floats, line: NDArray[Any] | None, boxes: Sequence[Box]) -> None:
    for view, values in views_of(tensor, array, line, boxes):
        view[...] = values


def views_of(
    tensor: TensorSpec, array: Floats, line: NDArray[Any] | None, boxes: Sequence[Box]
) -> list[tuple[Floats, Floats]]:
    """Pair the boxes of a compact array with their values in a shell's line, both without a copy.

    Raises:
        Malformed: The line is not of the right length or type; None stands for an empty one.
    """
    expanded = _expanded(tensor, array)
    views = [expanded[box] for box in boxes]
    wanted = sum(view.size for view in views)
    if line is None:
        line = np.empty(0, np.float32)
    if line.shape != (wanted,) or line.dtype != np.float32:
        problem = f"a shell's tensor {tensor.name!r} is {line.dtype}{line.shape}, expected float32({wanted},)"
        raise Malformed(problem, "$.shells")
    pairs, start = [], 0
    for view in views:
        pairs.append((view, line[start : start + view.size].reshape(view.shape)))
        start += view.size
    return pairs
