"""What the steps of a `TwinStretch` do to tensors. None of it makes an autograd graph.

A matrix's products run on raw CSR tensors whose values are the caller's own array: one product forward, one with a
transposed index backward (its values are gathered through a permutation; torch's own transposed products are ten times
slower), and a sampled product that adds the gradient at the kept positions only. Builds of torch without these products
(they need MKL) get blocks of dense rows that are scattered on the fly, `BLOCK_BYTES` at a time. A convolution is dense and
masked: its weight is scattered when it is needed, its gradient gathered at the kept positions; one layer's dense weight
and dense gradient are there at a time.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from wire.errors import SpecError
from wire.spec import Node

Tensor = torch.Tensor
Ints = NDArray[np.int32]
Kept = Tensor | None
"""What a step's backward pass needs from its forward pass."""

BLOCK_BYTES = 1 << 20
"""Of dense rows that stand in for a sparse matrix at a time, where torch has no sparse products."""
_aten: Any = torch.ops.aten  # an op of it has no type


@functools.cache
def sparse_products() -> bool:
    """Try whether this build of torch multiplies CSR matrices on the CPU. Tried once, with two by two weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR tensors a beta, once per process
        try:
            starts, index = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
            matrix = torch.sparse_csr_tensor(starts, index, torch.ones(2), (2, 2), check_invariants=True)
            torch.mm(matrix, torch.ones(2, 3))
            torch.sparse.sampled_addmm(matrix, torch.ones(2, 3), torch.ones(3, 2), beta=1.0, out=matrix)
        except RuntimeError:
            return False
    return bool((matrix.values() == 4).all())


@dataclass(frozen=True, slots=True)
class Rows:
    """The CSR index of a matrix and of its transpose.

    Attributes:
        starts: ``(rows + 1,)``: where each row's values start.
        columns: ``(kept,)``.
        starts_t: ``(columns + 1,)``.
        rows_t: ``(kept,)``: row of each value of the transpose.
        source: ``(kept,)``: place of each value of the transpose among the values.
    """

    starts: Ints
    columns: Ints
    starts_t: Ints
    rows_t: Ints
    source: Ints


class Step(Protocol):
    """One step of a stretch; the batch stands last between linear layers, first elsewhere."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of its weight and its bias; empty without."""

    def forward(self, x: Tensor) -> tuple[Tensor, Kept]:
        """Give the output, and what `backward` needs."""

    def backward(self, dy: Tensor, kept: Kept, grads: Mapping[str, Tensor], wanted: bool) -> Tensor | None:
        """Add to `grads`; give the gradient of the input if it is wanted."""


@dataclass(frozen=True, slots=True)
class Plain:
    """A step without weights.

    Attributes:
        run: Gives the output, and what `back` needs.
        back: Gives the gradient of the input from that of the output and what was kept.
    """

    run: Callable[[Tensor], tuple[Tensor, Kept]]
    back: Callable[[Tensor, Kept], Tensor]

    @property
    def names(self) -> tuple[str, ...]:
        """None."""
        return ()

    def forward(self, x: Tensor) -> tuple[Tensor, Kept]:
        """See `Step.forward`."""
        return self.run(x)

    def backward(self, dy: Tensor, kept: Kept, _: Mapping[str, Tensor], __: bool) -> Tensor | None:
        """See `Step.backward`."""
        return self.back(dy, kept)


class Products:
    """A linear layer by CSR products, over columns: x ``(in, n)``, y ``(out, n)``."""

    def __init__(
        self, names: tuple[str, ...], shape: tuple[int, ...], index: Rows, values: Tensor, bias: Tensor
    ) -> None:
        if not sparse_products():
            raise SpecError(f"this torch multiplies no CSR matrices, but the layout of {names[0]!r} is one")
        self.names = names
        self._shape, self._bias = shape, bias.unsqueeze(1)
        self._starts, self._columns = torch.from_numpy(index.starts), torch.from_numpy(index.columns)
        self._starts_t, self._rows_t = torch.from_numpy(index.starts_t), torch.from_numpy(index.rows_t)
        self._source = torch.from_numpy(index.source)
        self._values = values
        self._matrix = torch.sparse_csr_tensor(self._starts, self._columns, values, shape, check_invariants=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Kept]:
        """See `Step.forward`."""
        y = torch.mm(self._matrix, x)
        return y.add_(self._bias), x

    def backward(self, dy: Tensor, kept: Kept, grads: Mapping[str, Tensor], wanted: bool) -> Tensor | None:
        """See `Step.backward`."""
        assert kept is not None
        weight, bias = self.names
        dx = None
        if wanted:
            turned = self._values.index_select(0, self._source)
            matrix = torch.sparse_csr_tensor(
                self._starts_t, self._rows_t, turned, self._shape[::-1], check_invariants=False
            )
            dx = torch.mm(matrix, dy)
        into = torch.sparse_csr_tensor(self._starts, self._columns, grads[weight], self._shape, check_invariants=False)
        torch.sparse.sampled_addmm(into, dy, kept.t(), beta=1.0, out=into)
        grads[bias].add_(dy.sum(1))
        return dx


class Blocks:
    """A linear layer by blocks of dense rows, over columns as `Products`."""

    def __init__(
        self, names: tuple[str, ...], shape: tuple[int, ...], places: Ints, values: Tensor, bias: Tensor
    ) -> None:
        self.names = names
        self._values, self._bias, self._width = values, bias.unsqueeze(1), shape[1]
        rows = min(shape[0], max(1, BLOCK_BYTES // (4 * shape[1])))
        size = rows * shape[1]
        self._within = torch.from_numpy(places % np.int32(size) if size < prod(shape) else places)
        firsts = range(0, shape[0], rows)
        cuts = np.searchsorted(places, [first * shape[1] for first in firsts]).tolist()
        lasts = [*firsts[1:], shape[0]]
        self._blocks = tuple(zip(firsts, lasts, cuts, [*cuts[1:], len(places)], strict=True))

    def _dense(self, rows: int, start: int, end: int) -> Tensor:
        dense = torch.zeros(rows, self._width)
        dense.view(-1).index_add_(0, self._within[start:end], self._values[start:end])
        return dense

    def forward(self, x: Tensor) -> tuple[Tensor, Kept]:
        """See `Step.forward`."""
        y = torch.empty(len(self._bias), x.shape[1])
        for first, last, start, end in self._blocks:
            torch.addmm(self._bias[first:last], self._dense(last - first, start, end), x, out=y[first:last])
        return y, x

    def backward(self, dy: Tensor, kept: Kept, grads: Mapping[str, Tensor], wanted: bool) -> Tensor | None:
        """See `Step.backward`."""
        assert kept is not None
        weight, bias = self.names
        dx = torch.zeros_like(kept) if wanted else None
        for first, last, start, end in self._blocks:
            if dx is not None:
                dx.addmm_(self._dense(last - first, start, end).t(), dy[first:last])
            dense = torch.mm(dy[first:last], kept.t())
            grads[weight][start:end].add_(dense.view(-1).index_select(0, self._within[start:end]))
        grads[bias].add_(dy.sum(1))
        return dx


class Conv:
    """A convolution as a masked dense one."""

    def __init__(self, node: Node, shape: tuple[int, ...], places: Ints, values: Tensor, bias: Tensor) -> None:
        self.names = (node.params["weight"], node.params["bias"])
        self._shape, self._places = shape, torch.from_numpy(places)
        self._values, self._bias = values, bias
        side = (node.attrs["stride"], node.attrs["padding"], node.attrs.get("dilation", 1))
        self._stride, self._padding, self._dilation = ([length, length] for length in side)

    def _dense(self) -> Tensor:
        dense = torch.zeros(self._shape)
        dense.view(-1).index_add_(0, self._places, self._values)
        return dense

    def forward(self, x: Tensor) -> tuple[Tensor, Kept]:
        """See `Step.forward`."""
        return torch.conv2d(x, self._dense(), self._bias, self._stride, self._padding, self._dilation), x

    def backward(self, dy: Tensor, kept: Kept, grads: Mapping[str, Tensor], wanted: bool) -> Tensor | None:
        """See `Step.backward`."""
        assert kept is not None
        weight = self._dense() if wanted else torch.empty(self._shape)  # not read, but its shape is
        sizes, zero, one = [self._shape[0]], [0, 0], 1
        dx, dense, dbias = _aten.convolution_backward(
            dy, kept, weight, sizes, self._stride, self._padding, self._dilation, False, zero, one, [wanted, True, True]
        )
        del weight
        name, bias = self.names
        grads[name].add_(dense.reshape(-1).index_select(0, self._places))
        grads[bias].add_(dbias)
        return dx if wanted else None


def relu(*, in_place: bool) -> Plain:
    """Make a ReLU, which keeps its output; `in_place` where nobody else reads its input."""

    def run(x: Tensor) -> tuple[Tensor, Kept]:
        y = torch.relu_(x) if in_place else torch.relu(x)
        return y, y

    return Plain(run, lambda dy, kept: _aten.threshold_backward(dy, kept, 0))


def max_pool(side: int, shape: tuple[int, ...]) -> Plain:
    """Make a max pool of inputs ``(n, *shape)``; of equal values the first in C order gets the gradient."""

    def back(dy: Tensor, kept: Kept) -> Tensor:
        assert kept is not None
        dx = torch.zeros(len(dy), shape[0], shape[1] * shape[2])
        # Windows do not overlap, so that no place is written twice.
        return dx.scatter_(2, kept.flatten(2), dy.flatten(2)).view(len(dy), *shape)

    return Plain(lambda x: _aten.max_pool2d_with_indices(x, [side, side], [side, side]), back)


def flat(shape: tuple[int, ...]) -> Plain:
    """Make a flatten of inputs ``(n, *shape)``."""
    return Plain(lambda x: (x.reshape(len(x), -1), None), lambda dy, _: dy.reshape(len(dy), *shape))


def turn() -> Plain:
    """Make a step that brings samples from rows into columns, or back."""
    return Plain(lambda x: (x.t().contiguous(), None), lambda dy, _: dy.t().contiguous())
