"""Linear layers, activations and dropouts of the native engine, in numpy.

A gradient of weights is made and handed on in blocks of rows, an activation's in blocks of values (`wire.native.pointwise`):
nothing is made that is as large as a weight or a batch. Activations that can, tell their gradient from their output alone, so
that their input need not be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from edge_runtime.engines.native.at import Array, At, Op
from edge_runtime.engines.native.gelu import gelu, gelu_slope
from edge_runtime.engines.phase import drawing, keep_some
from wire.native.pointwise import BLOCK, TURNED

_LARGE = 1 << 18
"""Products of more factors than this are made the other way around where that is faster."""

_Slope = Callable[[Array, Array, Array, Array], object]
"""Of what is known, the gradient of the output and a block of memory, writes the gradient of the input."""


def _linear_forward(at: At) -> None:
    weight = at.params["weight"]
    out, width = weight.shape
    x, y = at.x[0].reshape(-1, width), at.y.reshape(-1, out)
    count = len(x)
    if 1 < count <= TURNED and count * weight.size > _LARGE:
        # With few rows of inputs the core of a matrix product finds more to do side by side in the weight's.
        turned = at.scratch["turned"]
        rows = min(out, len(turned) // count)
        columns = x.T
        for first in range(0, out, rows):
            part = weight[first : first + rows]
            made = turned[: len(part) * count].reshape(-1, count)
            np.matmul(part, columns, out=made)
            np.copyto(y[:, first : first + rows], made.T)
    else:
        np.matmul(x, weight.T, out=y)
    y += at.params["bias"]


def _linear_backward(at: At) -> None:
    weight = at.params["weight"]
    out, width = weight.shape
    x, dy = at.x[0].reshape(-1, width), at.dy.reshape(-1, out)
    if at.dx[0] is not None:
        np.matmul(dy, weight, out=at.dx[0].reshape(-1, width))
    memory = at.scratch["gradient"]
    bias = memory[:out]
    np.add.reduce(dy, 0, out=bias)
    at.sink("bias", bias)
    rows = min(out, max(1, len(memory) // width))
    for first in range(0, out, rows):
        turned = dy[:, first : first + rows].T
        gradient = memory[: len(turned) * width].reshape(-1, width)
        if len(x) == 1:
            np.multiply(turned, x, out=gradient)  # a matrix product of this form is slow
        else:
            np.matmul(turned, x, out=gradient)
        at.sink("weight", gradient, first)


def _relu(x: Array, y: Array, limits: Array) -> None:
    np.maximum(x, limits[0], out=y)


def _relu6(x: Array, y: Array, limits: Array) -> None:
    np.maximum(x, limits[0], out=y)
    np.minimum(y, limits[1], out=y)


def _hard_sigmoid(x: Array, y: Array, limits: Array) -> None:
    np.add(x, 3, out=y)
    _relu6(y, y, limits)
    y *= 1 / 6


def _hard_swish(x: Array, y: Array, limits: Array) -> None:
    _hard_sigmoid(x, y, limits)
    y *= x


def _tanh(x: Array, y: Array) -> None:
    np.tanh(x, out=y)


def _sigmoid(x: Array, y: Array) -> None:
    """Write ``1 / (1 + exp(-x))``; an exponential beyond what a float holds is right: its inverse is 0."""
    np.negative(x, out=y)
    np.exp(y, out=y)
    y += 1
    np.reciprocal(y, out=y)


def _silu(x: Array, y: Array) -> None:
    _sigmoid(x, y)
    y *= x


def _where_negative(sign: Array, dy: Array, dx: Array) -> None:
    """Write `dy` where `sign` is below zero and zero elsewhere, without a mask; `sign` is overwritten."""
    bits = f"i{sign.itemsize}"
    mask = sign.view(bits)
    np.right_shift(mask, 8 * sign.itemsize - 1, out=mask)
    np.bitwise_and(dy.view(bits), mask, out=dx.view(bits))


def _relu_slope(y: Array, dy: Array, block: Array, dx: Array) -> None:
    np.subtract(0, y, out=block)
    _where_negative(block, dy, dx)


def _between(most: int) -> _Slope:
    """Hand on the gradient where the output is above 0 and below `most`; its slope there is ``most / 6``'s inverse."""

    def slope(y: Array, dy: Array, block: Array, dx: Array) -> None:
        np.subtract(most, y, out=block)
        np.minimum(block, y, out=block)
        np.subtract(0, block, out=block)
        _where_negative(block, dy, dx)
        if most == 1:
            dx *= 1 / 6

    return slope


def _tanh_slope(y: Array, dy: Array, block: Array, dx: Array) -> None:
    np.multiply(y, y, out=block)
    np.subtract(1, block, out=block)
    np.multiply(dy, block, out=dx)


def _sigmoid_slope(y: Array, dy: Array, block: Array, dx: Array) -> None:
    np.subtract(1, y, out=block)
    block *= y
    np.multiply(dy, block, out=dx)


def _hard_swish_slope(x: Array, dy: Array, blocks: Array, dx: Array) -> None:
    """Add up ``hard_sigmoid(x)`` and, between -3 and 3, x / 6."""
    sign, slope, *_ = blocks
    np.abs(x, out=sign)
    sign -= 3
    _where_negative(sign, x, slope)
    slope *= 1 / 6
    _limit(blocks[2:])
    _hard_sigmoid(x, sign, blocks[2:])
    slope += sign
    np.multiply(dy, slope, out=dx)


def _silu_slope(x: Array, dy: Array, blocks: Array, dx: Array) -> None:
    """With s = sigmoid(x): ``s (1 + x (1 - s))``."""
    squashed, slope = blocks
    _sigmoid(x, squashed)
    np.subtract(1, squashed, out=slope)
    slope *= x
    slope += 1
    slope *= squashed
    np.multiply(dy, slope, out=dx)


def _limit(limits: Array) -> None:
    """Fill a block with zeros, and a second with sixes: numpy holds an array against another faster than against a number."""
    limits[0] = 0
    if len(limits) > 1:
        limits[1] = 6


def _plainly(make: Callable[[Array, Array], None]) -> Callable[[At], None]:
    def forward(at: At) -> None:
        x, y = at.x[0].reshape(-1), at.y.reshape(-1)
        for first in range(0, len(x), BLOCK):  # what takes several steps finds its values in the cache
            make(x[first : first + BLOCK], y[first : first + BLOCK])

    return forward


def _within(make: Callable[[Array, Array, Array], None]) -> Callable[[At], None]:
    def forward(at: At) -> None:
        x, y, limits = at.x[0].reshape(-1), at.y.reshape(-1), at.scratch["limits"]
        length = limits.shape[1]
        _limit(limits)
        for first in range(0, len(x), length):
            part = slice(first, first + length)
            make(x[part], y[part], limits[:, : len(x) - first])

    return forward


def _by_output(forward: Callable[[At], None], slope: _Slope) -> Op:
    def backward(at: At) -> None:
        if at.dx[0] is None:
            return
        y, dy, dx, block = at.y.reshape(-1), at.dy.reshape(-1), at.dx[0].reshape(-1), at.scratch["block"]
        for first in range(0, len(y), len(block)):
            part = slice(first, first + len(block))
            slope(y[part], dy[part], block[: len(y) - first], dx[part])

    return Op(forward, backward)


def _by_input(forward: Callable[[At], None], slope: _Slope) -> Op:
    def backward(at: At) -> None:
        if at.dx[0] is None:
            return
        x, dy, dx, blocks = at.x[0].reshape(-1), at.dy.reshape(-1), at.dx[0].reshape(-1), at.scratch["blocks"]
        length = blocks.shape[1]
        for first in range(0, len(x), length):
            part = slice(first, first + length)
            slope(x[part], dy[part], blocks[:, : len(x) - first], dx[part])

    return Op(forward, backward)


def _softmax_forward(at: At) -> None:
    width = at.y.shape[-1]
    x, y, rows = at.x[0].reshape(-1, width), at.y.reshape(-1, width), at.scratch["rows"]
    for first in range(0, len(x), len(rows)):
        part = slice(first, first + len(rows))
        one, made, most = x[part], y[part], rows[: len(x) - first]
        np.maximum.reduce(one, 1, out=most)
        np.subtract(one, most[:, None], out=made)
        np.exp(made, out=made)
        np.add.reduce(made, 1, out=most)
        made /= most[:, None]


def _softmax_backward(at: At) -> None:
    if at.dx[0] is None:
        return
    width = at.y.shape[-1]
    y, dy, dx = at.y.reshape(-1, width), at.dy.reshape(-1, width), at.dx[0].reshape(-1, width)
    rows, block = at.scratch["rows"], at.scratch["block"]
    for first in range(0, len(y), len(rows)):
        part, left = slice(first, first + len(rows)), len(y) - first
        odds, products, sums = y[part], block[:left], rows[:left]
        np.multiply(dy[part], odds, out=products)
        np.add.reduce(products, 1, out=sums)
        np.subtract(dy[part], sums[:, None], out=dx[part])
        dx[part] *= odds


def _drop(at: At, values: Array, into: Array) -> None:
    """Write values times the factors of this pass, which follow from a counter: both directions draw the same."""
    share = at.node.attrs["permille"] / 1000
    values, into = values.reshape(-1), into.reshape(-1)
    keeps = at.scratch["block"].view(np.float32)[: len(at.scratch["block"])]
    generator = drawing(at.phase.source, at.place)
    for first in range(0, len(values), len(keeps)):
        part = slice(first, first + len(keeps))
        some = keeps[: len(values) - first]
        keep_some(generator, share, some)
        np.multiply(values[part], some, out=into[part])


def _dropout_forward(at: At) -> None:
    if at.phase.training and at.phase.drops:
        _drop(at, at.x[0], at.y)
    else:
        np.copyto(at.y, at.x[0])


def _dropout_backward(at: At) -> None:
    if at.dx[0] is not None:
        _drop(at, at.dy, at.dx[0])


OPS: Mapping[str, Op] = {
    "linear": Op(_linear_forward, _linear_backward),
    "relu": _by_output(_within(_relu), _relu_slope),
    "relu6": _by_output(_within(_relu6), _between(6)),
    "tanh": _by_output(_plainly(_tanh), _tanh_slope),
    "sigmoid": _by_output(_plainly(_sigmoid), _sigmoid_slope),
    "hard_sigmoid": _by_output(_within(_hard_sigmoid), _between(1)),
    "hard_swish": _by_input(_within(_hard_swish), _hard_swish_slope),
    "silu": _by_input(_plainly(_silu), _silu_slope),
    "gelu": _by_input(gelu, gelu_slope),
    "softmax": Op(_softmax_forward, _softmax_backward),
    "dropout": Op(_dropout_forward, _dropout_backward),
}
"""By op."""
