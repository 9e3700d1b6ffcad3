"""Convolutions and pools. What each holds, and which way a convolution takes, stands in `wire.native.windows`.

Where the compiled core does not do a convolution straight from the planes, it is a matrix product with columns. Those of some
samples, or of some lines of one, lie side by side, so that a product has enough of them; what comes of it, ``(outs, samples,
places)``, is turned. The weights' gradient is the sum over all of these.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from edge_runtime.engines.native import depthwise
from edge_runtime.engines.native.at import Array, At, Op
from edge_runtime.engines.native.columns import core, give, start, take, window
from edge_runtime.engines.native.pools import POOLS
from edge_runtime.kernels import library
from edge_runtime.kernels.panels import address
from wire.native.windows import PLACES, Dense, Windows, is_depthwise, windows
from wire.spec import conv_groups

_LENGTH_MAX = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class _Group:
    """One group of a convolution.

    Attributes:
        dense: Its sizes.
        first: The first of its input channels.
        rows: Its output channels.
    """

    dense: Dense
    first: int
    rows: slice

    def weight(self, at: At) -> Array:
        """Give its weights as a matrix."""
        return at.params["weight"][self.rows].reshape(self.dense.outs, -1)

    def direct(self, x: Array) -> library.Library | None:
        """Give the compiled core where it is to do this without columns."""
        return core(x) if self.dense.direct else None


@dataclass(frozen=True, slots=True)
class _Lot:
    """What is taken at once, in columns.

    Attributes:
        samples: Which.
        lines: Of the output; all of them where there are several samples.
        of: The windows of these lines.
        columns: Scratch for them.
        side: Scratch for what the product gives, or is given: ``(outs, columns)``.
    """

    samples: slice
    lines: slice
    of: Windows
    columns: Array
    side: Array

    def seen(self, values: Array, group: _Group) -> Array:
        """See this part of an array like the output, ``(outs, samples, lines, places of a line)``."""
        (down, along) = group.dense.of.out
        each = values.reshape(len(values), values.shape[1], down, along)
        return each[self.samples, group.rows, self.lines].swapaxes(0, 1)

    def turned(self, group: _Group) -> Array:
        """See `side` so too."""
        return self.side.reshape(group.dense.outs, -1, *self.of.out)


def _groups(at: At, x: Array, y: Array) -> Iterator[_Group]:
    weight = at.params["weight"]
    count = conv_groups(at.node, x.shape[1], weight.shape[1])
    dense = Dense(windows(at.node.attrs, x.shape[1:], y.shape[1:]), weight.shape[1], len(weight) // count)
    for group in range(count):
        yield _Group(dense, group * dense.channels, slice(group * dense.outs, (group + 1) * dense.outs))


def _lots(group: _Group, room: Array, batch: int) -> Iterator[_Lot]:
    """Take as many whole samples as there is room for, or lines of one."""
    dense, of = group.dense, group.dense.of
    line = (dense.width + dense.outs) * of.out[1]
    samples = min(batch, len(room) // (line * of.out[0]), max(1, PLACES // of.places))
    lines = of.out[0] if samples else len(room) // line
    for first in range(0, batch, max(1, samples)):
        some = slice(first, min(batch, first + max(1, samples)))
        for top in range(0, of.out[0], lines):
            rows = slice(top, min(of.out[0], top + lines))
            band = replace(
                of, out=(rows.stop - top, of.out[1]), padding=(of.padding[0] - top * of.stride[0], of.padding[1])
            )
            columns = (some.stop - first) * band.places
            cut = dense.width * columns
            side = room[cut : cut + dense.outs * columns].reshape(dense.outs, columns)
            yield _Lot(some, rows, band, room[:cut].reshape(dense.width, columns), side)


def _is_depthwise(at: At, x: Array) -> bool:
    return is_depthwise(conv_groups(at.node, x.shape[1], at.params["weight"].shape[1]), x.shape[1])


def _forward(at: At) -> None:
    (x,), bias = at.x, at.params["bias"]
    if _is_depthwise(at, x):
        depthwise.forward(at, windows(at.node.attrs, x.shape[1:], at.y.shape[1:]))
        return
    for group in _groups(at, x, at.y):
        if found := group.direct(x):
            _direct_forward(at, group, found)
            continue
        for lot in _lots(group, at.scratch["room"], len(x)):
            take(lot.of, x[lot.samples], group.first, group.dense.channels, lot.columns)
            np.matmul(group.weight(at), lot.columns, out=lot.side)
            np.add(lot.turned(group), bias[group.rows, None, None, None], out=lot.seen(at.y, group))


def _direct_forward(at: At, group: _Group, found: library.Library) -> None:
    (x,), room, dense = at.x, at.scratch["room"], group.dense
    shape, step = window(dense.of, dense.channels, x.shape[1]), dense.lot(len(x))
    weights = [address(at.params[role][group.rows]) for role in ("weight", "bias")]
    for first in range(0, len(x), step):
        some = x[first : first + step]
        code = found.calls.nk_dense_forward(
            *(ctypes.byref(shape), dense.outs, at.y.shape[1], len(some), start(some, group.first), *weights),
            *(start(at.y[first:], group.rows.start), address(room), min(len(room), _LENGTH_MAX)),
        )
        library.must(code, "a convolution")


def _backward(at: At) -> None:
    (x,) = at.x
    if _is_depthwise(at, x):
        depthwise.backward(at, windows(at.node.attrs, x.shape[1:], at.dy.shape[1:]))
        at.sink("weight", at.scratch["weight"])
    else:
        for group in _groups(at, x, at.dy):
            if found := group.direct(x):
                _direct_backward(at, group, found)
            else:
                _columns_backward(at, group)
            at.sink("weight", at.scratch["weight"], group.rows.start)
    at.sink("bias", at.scratch["bias"])


def _direct_backward(at: At, group: _Group, found: library.Library) -> None:
    (x,), (dx,), room, dense = at.x, at.dx, at.scratch["room"], group.dense
    weight, moved, bias = at.params["weight"][group.rows], at.scratch["weight"], at.scratch["bias"][group.rows]
    shape, step = window(dense.of, dense.channels, x.shape[1]), dense.lot(len(x))
    moved[...], bias[...] = 0, 0
    for first in range(0, len(x), step):
        some = x[first : first + step]
        code = found.calls.nk_dense_backward(
            *(ctypes.byref(shape), dense.outs, at.dy.shape[1], len(some), start(some, group.first), address(weight)),
            *(start(at.dy[first:], group.rows.start), None if dx is None else start(dx[first:], group.first)),
            *(address(moved), address(bias), address(room), min(len(room), _LENGTH_MAX)),
        )
        library.must(code, "a convolution")


def _columns_backward(at: At, group: _Group) -> None:
    (x,), (dx,), dense = at.x, at.dx, group.dense
    weight, total = group.weight(at), at.scratch["weight"].reshape(dense.outs, -1)
    for lot in _lots(group, at.scratch["room"], len(x)):
        np.copyto(lot.turned(group), lot.seen(at.dy, group))
        take(lot.of, x[lot.samples], group.first, dense.channels, lot.columns)
        if lot.samples.start == lot.lines.start == 0:
            np.matmul(lot.side, lot.columns.T, out=total)
        else:
            _add_product(lot.side, lot.columns.T, total, at.scratch["part"])
        if dx is not None:
            np.matmul(weight.T, lot.side, out=lot.columns)
            give(lot.of, lot.columns, dx[lot.samples], group.first, dense.channels, adds=lot.lines.start > 0)
    came = at.dy.reshape(*at.dy.shape[:2], -1)[:, group.rows]
    np.sum(came, axis=(0, 2), out=at.scratch["bias"][group.rows])


def _add_product(left: Array, right: Array, total: Array, part: Array) -> None:
    """Add a product to `total`, some rows at a time."""
    for first in range(0, len(total), len(part)):
        rows = total[first : first + len(part)]
        np.matmul(left[first : first + len(part)], right, out=part[: len(rows)])
        rows += part[: len(rows)]


OPS: Mapping[str, Op] = {"conv2d": Op(_forward, _backward), "conv1d": Op(_forward, _backward), **POOLS}
"""By the name of the op."""
