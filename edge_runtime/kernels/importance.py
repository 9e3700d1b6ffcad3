"""How much every weight of a layer would matter, kept or not: its squared gradient, in blocks of rows.

A sparse layer never computes the gradient of the weights that it lacks, but what is pruned and grown is decided by it now
and then (PruneFL's importance; RigL's growth). It follows from what went into the layer and what came back out of it, a few
rows at a time, so that no dense gradient is ever held: `row_blocks` gives the blocks, `whole` adds them up where somebody
wants all of it, and `top` gives the exact a largest. `gradient_blocks` gives the gradient itself, for rules that move weights
which are not there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engines.arrays import Floats
from wire.errors import DataError, SpecError
from wire.largest import largest
from wire.spec import Node

BLOCK_BYTES = 1 << 20
LARGEST_BYTES = 32
"""What `largest_of` takes per wanted weight, its result included."""


@dataclass(frozen=True, slots=True)
class Passed:
    """What passed through a linear layer or a convolution in one step.

    Attributes:
        shape: Of the weight: ``(out, in)`` or ``(out, in, kernel, kernel)``.
        batches: Of every micro-batch the layer's input and the gradient of its output, batch first: ``(n, in)`` and
            ``(n, out)``, or ``(n, in, height, width)`` and ``(n, out, height, width)``.
        stride: Of a convolution.
        padding: Of a convolution, with zeros.
        dilation: Of a convolution.
    """

    shape: tuple[int, ...]
    batches: tuple[tuple[Floats, Floats], ...]
    stride: int = 1
    padding: int = 0
    dilation: int = 1

    @staticmethod
    def through(node: Node, *batches: tuple[Floats, Floats]) -> Passed:
        """Take what a `Watch` was shown of a model's layer."""
        x, dy = batches[0]
        sides = (node.attrs["kernel"],) * 2 if node.op == "conv2d" else ()
        shape = (dy.shape[1], x.shape[1], *sides)
        return Passed(shape, batches, node.attrs.get("stride", 1), node.attrs.get("padding", 0))


def gradient_blocks(passed: Passed, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, Floats]]:
    """Give the gradient of all weights, the sum over micro-batches.

    Cost: the multiplications of the dense gradient, times stride^2 for a convolution; memory for one block, one product of
    at most the same size, and for a convolution `block_bytes` of rearranged samples (or one sample).

    Args:
        passed: What passed through the layer.
        block_bytes: Bound on a block; but a block is one row at least.

    Yields:
        The first row, and the gradient of the rows from there, ``(rows, *shape[1:])``, to be used (and perhaps overwritten)
        before the next.

    Raises:
        SpecError: Shapes do not meet.
    """
    _check(passed)
    width = prod(passed.shape[1:])
    rows = min(passed.shape[0], max(1, block_bytes // (4 * width)))
    memory = np.empty((rows, *passed.shape[1:]), np.float32)
    for first in range(0, passed.shape[0], rows):
        block = memory[: passed.shape[0] - first]
        if len(passed.shape) == 2:
            _linear_rows(passed, first, block)
        else:
            _conv_rows(passed, first, block, block_bytes)
        yield first, block


def row_blocks(passed: Passed, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, Floats]]:
    """Give the squared gradient of all weights; micro-batches are summed before squaring. See `gradient_blocks`.

    Yields:
        The first row, and the squares of the rows from there.

    Raises:
        SpecError: Shapes do not meet.
        DataError: The gradient is not finite, or its square is not.
    """
    for first, block in gradient_blocks(passed, block_bytes):
        with np.errstate(over="ignore"):
            np.square(block, out=block)
        if not np.isfinite(block).all():
            raise DataError(f"the squared gradient of rows {first} to {first + len(block) - 1} is not finite")
        yield first, block


def whole(passed: Passed, into: Floats, block_bytes: int = BLOCK_BYTES) -> None:
    """Add the squared gradient to `into`, which has the weight's shape; see `row_blocks`."""
    for first, block in row_blocks(passed, block_bytes):
        into[first : first + len(block)] += block


def top(passed: Passed, count: int, block_bytes: int = BLOCK_BYTES) -> tuple[NDArray[np.int64], Floats]:
    """Give the `count` largest squared gradients; see `row_blocks` and `top_of`."""
    return top_of(row_blocks(passed, block_bytes), count)


def top_of(blocks: Iterable[tuple[int, Floats]], count: int) -> tuple[NDArray[np.int64], Floats]:
    """Give the `count` largest of what blocks of rows hold, the largest first; see `largest_of`.

    Returns:
        Positions in C order and values; of equal values the lowest position first, exactly as a stable sort of the whole
        would give them.
    """
    places, values = largest_of(blocks, count)
    order = np.argsort(-values, kind="stable")
    return places[order], values[order]


def largest_of(blocks: Iterable[tuple[int, Floats]], count: int) -> tuple[NDArray[np.int64], Floats]:
    """Give the `count` largest of what blocks of rows hold, none of it negative.

    Cost: beside the blocks, `LARGEST_BYTES` per wanted weight at most, and a few passes over the values.

    Args:
        blocks: The first row of each and its rows, as `row_blocks` gives them.
        count: How many are wanted; of equal values those at the lowest positions.

    Returns:
        Positions in C order, ascending, and the values there. All, if there are fewer than `count`.
    """
    places, values = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
    held, least = 0, -1.0
    for first, block in blocks:
        flat = block.reshape(-1)
        # Once there are enough, equal values that stand later lose.
        new = np.flatnonzero(flat > least) if least >= 0 else np.flatnonzero(largest(flat, count))
        places.append(new + first * (block.size // len(block)))
        values.append(flat[new])
        held += len(new)
        if count > 0 and held > count + count // 4:
            _squeeze(places, values, count)
            held, least = count, float(values[0].min())
    _squeeze(places, values, count)
    return places[0], values[0]


def _squeeze(places: list[NDArray[np.int64]], values: list[Floats], count: int) -> None:
    """Leave one part in both lists, of the `count` largest; one list after the other, since they are long."""
    line = np.concatenate(values)
    values.clear()
    chosen = largest(line, count)
    values.append(line[chosen])
    del line
    where = np.concatenate(places)
    places.clear()
    places.append(where[chosen])


def _check(passed: Passed) -> None:
    if not passed.batches or len(passed.shape) not in (2, 4):
        raise SpecError(f"{len(passed.batches)} batches through weights of shape {passed.shape}")
    for x, dy in passed.batches:
        wanted = (len(x), passed.shape[0], *(_slid(passed, length, axis) for axis, length in enumerate(x.shape[2:], 2)))
        if x.ndim != len(passed.shape) or x.shape[1] != passed.shape[1] or dy.shape != wanted:
            raise SpecError(f"weights of {passed.shape} do not meet an input of {x.shape} and a gradient of {dy.shape}")


def _slid(passed: Passed, length: int, axis: int) -> int:
    reach = passed.dilation * (passed.shape[axis] - 1) + 1 if axis < len(passed.shape) else 0
    return (length + 2 * passed.padding - reach) // passed.stride + 1


def _linear_rows(passed: Passed, first: int, block: Floats) -> None:
    """Write the gradient of the rows from `first` on."""
    last = first + len(block)
    for place, (x, dy) in enumerate(passed.batches):
        if place:
            block += dy[:, first:last].T @ x
        else:
            np.matmul(dy[:, first:last].T, x, out=block)


def _conv_rows(passed: Passed, first: int, block: Floats, chunk_bytes: int) -> None:
    """Write the gradient of the output channels from `first` on: a product per place in the kernel.

    Samples stand padded in lines, and the outputs' gradients in lines as long, each where its window starts, among zeros.
    Then a place in the kernel is a shift of one against the other, and nothing is copied for it.
    """
    block.fill(0)
    last, stride, pad = first + len(block), passed.stride, passed.padding
    for x, dy in passed.batches:
        height, width = (side + 2 * pad for side in x.shape[2:])
        step = min(len(x), max(1, chunk_bytes // (4 * (x.shape[1] + len(block)) * height * width)))
        seen = np.zeros((x.shape[1], step, height, width), np.float32)
        came = np.zeros((len(block), step, height, width), np.float32)
        windows = came[:, :, : dy.shape[2] * stride : stride, : dy.shape[3] * stride : stride]
        for n in range(0, len(x), step):
            some = min(step, len(x) - n)
            seen[:, :some, pad : height - pad, pad : width - pad] = x[n : n + some].swapaxes(0, 1)
            windows[:, :some] = dy[n : n + some, first:last].swapaxes(0, 1)
            windows[:, some:] = 0
            flat_seen, flat_came = seen.reshape(x.shape[1], -1), came.reshape(len(block), -1)
            for ky, kx in np.ndindex(*passed.shape[2:]):
                shift = passed.dilation * (ky * width + kx)
                block[:, :, ky, kx] += flat_came[:, : flat_came.shape[1] - shift] @ flat_seen[:, shift:].T
