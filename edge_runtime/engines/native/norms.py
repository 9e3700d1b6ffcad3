"""Norms over the batch, over groups of channels and over the last dimension.

The compiled core does float32 where there is one; numpy does float64, and float32 elsewhere, block by block, so that a block
stays in the cache. Either takes the variance of the differences from the rounded mean, and keeps what rounding took from the
mean (``rest``): so a mean that is large beside the deviation costs no digits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping

import numpy as np

from edge_runtime.engines.native.at import Array, At, Op
from edge_runtime.kernels.library import Library, Norm, must, open_library
from wire.native.norms import BLOCK, Extents, extents
from wire.spec import NORM_EPSILON

Block = tuple[slice, slice, slice]
"""Samples, groups and channels of each, of a view as `extents` has it."""

SETS = 512
"""Statistics that are taken together at most."""

_AXES = {True: (0, 2, 3), False: (2, 3)}
_SUMS = {True: "ngcl,ngcl->g", False: "ngcl,ngcl->ng"}


def core(of: Array) -> Library | None:
    """Give the compiled core if there is one and it can take such arrays."""
    return open_library() if of.dtype == np.float32 else None


def _view(at: At) -> tuple[Extents, bool]:
    found = extents(at.node.op, at.node.attrs, len(at.x[0]), at.x[0].shape[1:])
    return found, at.node.op == "batch_norm"


def _fixed(at: At) -> bool:
    """Tell whether the running statistics are used; also where a batch has one value per channel, and so no variance."""
    return at.node.op == "batch_norm" and (not at.phase.training or at.x[0].size == at.x[0].shape[1])


def _call(shape: Extents, pooled: bool) -> Norm:
    (samples, groups, each, inner) = shape
    return Norm(samples, groups * each, inner, 0 if pooled else groups)


def _address(array: Array | None) -> int | None:
    return None if array is None else array.ctypes.data


def _parts(shape: Extents, pooled: bool) -> Iterator[list[Block]]:
    """Give sets of statistics that are done together, as blocks of about `BLOCK` values each."""
    (samples, groups, each, inner) = shape
    if pooled:
        many = max(1, min(groups, BLOCK // inner))
        step = max(1, BLOCK // (many * inner))
        for group in range(0, groups, many):
            these = slice(group, min(group + many, groups))
            yield [(slice(n, min(n + step, samples)), these, slice(0, each)) for n in range(0, samples, step)]
        return
    fit = min(SETS, BLOCK // (each * inner))
    together, many = max(1, fit // groups), max(1, min(groups, fit))
    step = each if fit else max(1, BLOCK // inner)
    for n in range(0, samples, together):
        some = slice(n, min(n + together, samples))
        for group in range(0, groups, many):
            these = slice(group, min(group + many, groups))
            yield [(some, these, slice(c, min(c + step, each))) for c in range(0, each, step)]


def _sets(array: Array, shape: Extents, pooled: bool, block: Block) -> Array:
    """Give the part of what is held for each set that belongs to a block; it broadcasts with the block."""
    if pooled:
        return array[block[1]].reshape(1, -1, 1, 1)
    return array.reshape(shape[0], shape[1])[block[0], block[1], None, None]


def _moments(x: Array, y: Array, part: list[Block], pooled: bool) -> tuple[Array, Array, Array]:
    """Write x minus its mean to y.

    Returns:
        The mean, what rounding took from it, and the variance over n in double, each broadcasting with the part.
    """
    axes, count = _AXES[pooled], sum(x[block].size for block in part)
    total = sum(x[block].sum(axis=axes, keepdims=True).astype(np.float64) for block in part)
    each = count // np.size(total)
    mean: Array = (total / each).astype(x.dtype)
    rest, square = np.zeros(mean.shape), np.zeros(mean.shape)
    for block in part:
        apart = np.subtract(x[block], mean, out=y[block])
        rest += apart.sum(axis=axes, keepdims=True)
        square += np.einsum(_SUMS[pooled], apart, apart).reshape(mean.shape)
    rest /= each
    variance = square / each - rest * rest
    np.maximum(variance, 0, out=variance)
    return mean, rest.astype(x.dtype), variance


def _by_blocks(at: At, kept: Mapping[str, Array], variance: Array | None) -> None:
    """Norm by what the input itself has; write the variances."""
    shape, pooled = _view(at)
    x, y = at.x[0].reshape(shape), at.y.reshape(shape)
    weight, bias = (at.params[role].reshape(1, *shape[1:3], 1) for role in ("weight", "bias"))
    for part in _parts(shape, pooled):
        mean, rest, found = _moments(x, y, part, pooled)
        inverse = (1 / np.sqrt(found + NORM_EPSILON)).astype(x.dtype)
        for block in part:
            apart = y[block]
            apart -= rest
            apart *= inverse
            apart *= weight[:, block[1], block[2]]
            apart += bias[:, block[1], block[2]]
        for name, values in {"mean": mean, "rest": rest, "inverse": inverse}.items():
            if name in kept:
                _sets(kept[name], shape, pooled, part[0])[...] = values
        if variance is not None:
            variance[part[0][1]] = found.reshape(-1)


def _by_core(at: At, kept: Mapping[str, Array], variance: Array | None, library: Library) -> None:
    call = _call(*_view(at))
    code = library.calls.nk_norm_forward(
        *(ctypes.byref(call), at.x[0].ctypes.data, at.params["weight"].ctypes.data, at.params["bias"].ctypes.data),
        *(NORM_EPSILON, at.y.ctypes.data),
        *(_address(kept.get(name)) for name in ("mean", "rest", "inverse")),
        _address(variance),
    )
    must(code, at.node.name)


def _norm(at: At) -> None:
    _by_itself(at, at.saved)


def _by_itself(at: At, kept: Mapping[str, Array], variance: Array | None = None) -> None:
    """Norm by what the input has.

    Args:
        at: The node.
        kept: Takes of each set ``mean``, ``rest`` and ``inverse``, those of them that are there.
        variance: Takes the variance over n, in double; of a batch norm.
    """
    if (library := core(at.y)) is not None:
        _by_core(at, kept, variance, library)
    else:
        _by_blocks(at, kept, variance)


def _by_running(at: At) -> None:
    """Norm by the running statistics: what came over the wire, rounded or pulled, may have left a variance below zero."""
    inverse = np.maximum(at.params["variance"], 0)
    inverse += NORM_EPSILON
    np.sqrt(inverse, out=inverse)
    np.reciprocal(inverse, out=inverse)
    mean = at.params["mean"]
    if at.saved:
        at.saved["mean"][...], at.saved["rest"][...], at.saved["inverse"][...] = mean, 0, inverse
    shape, pooled = _view(at)
    weight, bias = at.params["weight"], at.params["bias"]
    if (library := core(at.y)) is not None:
        call = _call(shape, pooled)
        arrays = (at.x[0], weight, bias, mean, inverse, at.y)
        must(library.calls.nk_norm_fixed(ctypes.byref(call), *map(_address, arrays)), at.node.name)
        return
    inverse *= weight
    x, y = at.x[0].reshape(shape), at.y.reshape(shape)
    for part in _parts(shape, pooled):
        for block in part:
            into = np.subtract(x[block], _sets(mean, shape, pooled, block), out=y[block])
            into *= _sets(inverse, shape, pooled, block)
            into += _sets(bias, shape, pooled, block)


def _batch_norm(at: At) -> None:
    """Norm by the batch in training; the running statistics follow it, by its variance over n - 1."""
    if _fixed(at):
        _by_running(at)
        return
    follows, channels = at.phase.follows, at.y.shape[1]
    if not follows:
        _by_itself(at, at.saved)
        return
    variance = np.empty(channels)
    kept = at.saved or {name: np.empty(channels, at.y.dtype) for name in ("mean", "rest")}
    _by_itself(at, kept, variance)
    count = at.y.size // channels
    variance *= count / (count - 1)
    mean = kept["mean"].astype(np.float64)
    mean += kept["rest"]
    for role, batch in (("mean", mean), ("variance", variance)):
        running = at.params[role]
        running[...] = batch * follows + running * (1 - follows)


def _lean(at: At, shape: Extents, block: Block) -> Array:
    """Give a block of x as it was normed, before weight and bias, in scratch."""
    pooled = at.node.op == "batch_norm"
    x = at.x[0].reshape(shape)[block]
    found = at.scratch["block"][: x.size].reshape(x.shape)
    np.subtract(x, _sets(at.saved["mean"], shape, pooled, block), out=found)
    found -= _sets(at.saved["rest"], shape, pooled, block)
    found *= _sets(at.saved["inverse"], shape, pooled, block)
    return found


def _back_by_blocks(at: At, goal: Array | None, sums: Array) -> None:
    shape, pooled = _view(at)
    weight = at.params["weight"].reshape(1, *shape[1:3], 1)
    by_channel = sums.reshape(2, 1, *shape[1:3], 1)
    for part in _parts(shape, pooled):
        straight, leaning = _back_sums(at, part, weight, by_channel)
        if goal is None:
            continue
        for block in part:
            dx, dy = (array.reshape(shape)[block] for array in (goal, at.dy))
            np.multiply(dy, weight[:, block[1], block[2]], out=dx)
            if not _fixed(at):
                lean = _lean(at, shape, block)
                lean *= leaning
                dx -= lean
                dx -= straight
            dx *= _sets(at.saved["inverse"], shape, pooled, block)


def _back_sums(at: At, part: list[Block], weight: Array, by_channel: Array) -> tuple[Array, Array]:
    """Add up, by channel, the gradient of the output and its product with the normed input.

    Returns:
        Of each set the means of both, times the weights.
    """
    shape, pooled = _view(at)
    each = at.dy.size // len(at.saved["mean"])
    totals = np.zeros((2, *_sets(at.saved["mean"], shape, pooled, part[0]).shape))
    for block in part:
        dy, room, by = at.dy.reshape(shape)[block], _lean(at, shape, block), weight[:, block[1], block[2]]
        room *= dy
        for place, values in enumerate((dy, room)):
            found = values.sum(axis=(0, 3), keepdims=True)
            by_channel[place][:, block[1], block[2]] += found
            if pooled:
                totals[place] += found * by
        if not pooled:
            room *= by
            totals[1] += room.sum(axis=(2, 3), keepdims=True)
            np.multiply(dy, by, out=room)
            totals[0] += room.sum(axis=(2, 3), keepdims=True)
    totals /= each
    (straight, leaning) = totals.astype(dy.dtype)
    return straight, leaning


def _back(at: At) -> None:
    sums = np.zeros((2, at.params["weight"].size))
    dx = at.dx[0]
    alone = at.saved["mean"].size == at.dy.size and not _fixed(at)  # a value that is its own mean: nothing goes through
    goal = None if alone else dx
    if (library := core(at.dy)) is not None:
        call = _call(*_view(at))
        arrays = (at.x[0], at.dy, at.params["weight"], at.saved["mean"], at.saved["rest"], at.saved["inverse"])
        code = library.calls.nk_norm_backward(
            ctypes.byref(call), *map(_address, arrays), int(_fixed(at)), _address(goal), sums.ctypes.data
        )
        must(code, at.node.name)
    else:
        _back_by_blocks(at, goal, sums)
    if alone and dx is not None:
        dx.fill(0)
    for role, gradient in (("weight", sums[1]), ("bias", sums[0])):
        at.sink(role, gradient.astype(at.dy.dtype))


OPS: Mapping[str, Op] = {
    "batch_norm": Op(_batch_norm, _back),
    "group_norm": Op(_norm, _back),
    "layer_norm": Op(_norm, _back),
}
