"""The twin of the compiled core: the same stretches by torch alone, for machines without a build of the core.

The steps are those of `twin_steps`: CSR products for a matrix, a masked dense convolution. What `forward` is given is kept
as it is and not copied: it must not be written before `backward` has run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray

from edge_runtime.engines import Update
from edge_runtime.engines.arrays import Floats
from edge_runtime.engines.update import apply
from edge_runtime.kernels import STRETCHABLE, Watch, check_goal
from edge_runtime.kernels.twin_steps import (
    Blocks,
    Conv,
    Ints,
    Kept,
    Products,
    Rows,
    Step,
    Tensor,
    flat,
    max_pool,
    relu,
    sparse_products,
    turn,
)
from wire.errors import SpecError
from wire.masks import AnyMask, positions
from wire.spec import Node

_ALIGNED = 64  # bytes; at another alignment a product may round differently


@dataclass(frozen=True, slots=True)
class CLayout:
    """Kept values in C order.

    Attributes:
        shape: Of the dense tensor.
        kept: How many weights are kept.
        places: Their positions in C order, ascending, ``(kept,)``; empty where `rows` says it.
        rows: For matrices where torch has sparse products.
    """

    shape: tuple[int, ...]
    kept: int
    places: Ints
    rows: Rows | None

    @classmethod
    def of(cls, mask: AnyMask, *, products: bool | None = None) -> CLayout:
        """Lay out a mask: of two axes for a linear layer, four for a convolution. See `at`."""
        return cls.at(mask.shape, positions(mask), products=products)

    @classmethod
    def at(cls, shape: Sequence[int], positions: NDArray[np.int64], *, products: bool | None = None) -> CLayout:
        """Lay out kept positions, ascending in C order. Cost: O(kept), 24 bytes of scratch each; no dense array is made.

        Args:
            shape: Of the dense tensor.
            positions: ``(kept,)``.
            products: Whether to use torch's sparse products; None: if they work here.

        Raises:
            SpecError: The tensor has no side, or more than 2^31 weights, or the positions do not suit it.
        """
        if len(shape) not in (2, 4) or min(shape) < 1 or prod(shape) > 1 << 31:
            raise SpecError(f"masked weights of shape {tuple(shape)}")
        kept = len(positions)
        if kept and (positions[0] < 0 or positions[-1] >= prod(shape) or (np.diff(positions) <= 0).any()):
            raise SpecError(f"positions that do not ascend within {tuple(shape)}")
        if len(shape) != 2 or not (sparse_products() if products is None else products):
            return cls(tuple(shape), kept, positions.astype(np.int32), None)
        height, width = shape
        columns = (positions % width).astype(np.int32)
        rows = (positions // width).astype(np.int32)
        # Sixteen bits are sorted by counting, which is linear.
        source = np.argsort(columns.astype(np.uint16) if width <= 1 << 16 else columns, kind="stable").astype(np.int32)
        index = Rows(_starts(rows, height), columns, _starts(columns, width), rows[source], source)
        return cls((height, width), kept, np.empty(0, np.int32), index)

    @property
    def bytes_index(self) -> int:
        """Size of everything but the values: 12 bytes per value of a matrix with products, else 4."""
        rows = self.rows
        arrays = () if rows is None else (rows.starts, rows.columns, rows.starts_t, rows.rows_t, rows.source)
        return self.places.nbytes + sum(array.nbytes for array in arrays)

    def to_c_order(self, values: Floats) -> Floats:
        """See `edge_runtime.kernels.Layout.to_c_order`: they are in that order."""
        if values.shape != (self.kept,):
            raise SpecError(f"values of shape {values.shape} for a layer of {self.kept}")
        return values.copy()

    from_c_order = to_c_order


def _starts(lines: Ints, length: int) -> Ints:
    starts = np.zeros(length + 1, np.int32)
    np.cumsum(np.bincount(lines, minlength=length), out=starts[1:])
    return starts


class TwinStretch:
    """See `edge_runtime.kernels.Stretch`."""

    def __init__(
        self,
        nodes: Sequence[Node],
        in_shape: tuple[int, ...],
        params: Mapping[str, Floats],
        layouts: Mapping[str, CLayout],
    ) -> None:
        """Take a chain and arrays that stay the caller's: they are read at every pass, and written by an `Update`.

        Raises:
            SpecError: A node cannot be run here, does not read the one before, or meets weights of another shape.
        """
        plan = _Plan(in_shape, params, layouts)
        for place, node in enumerate(nodes):
            if place and node.inputs != (nodes[place - 1].name,):
                raise SpecError(f"node {node.name!r} does not read the one before it")
            plan.add(node)
        plan.turn(False)
        self.params = {name: params[name] for op in plan.ops for name in op.names}
        self._ops = tuple(plan.ops)
        self._in_shape, self._out_shape = in_shape, plan.shape
        self._first = next((place for place, op in enumerate(self._ops) if op.names), len(self._ops))
        self._kept: list[Kept] | None = None

    def forward(self, x: Floats, *, train: bool, out: Floats | None = None) -> Floats:  # noqa: ARG002 - may be left alone
        """See `Stretch.forward`. Without `train` what was kept before is let go, too."""
        value = given = _tensor(x, self._in_shape)
        kept = []
        for op in self._ops:
            value, needed = op.forward(value)
            if train:
                kept.append(needed)
            del needed
        self._kept = kept if train else None
        shared = [given, *(tensor for tensor in kept if tensor is not None)]
        return _array(value, shared)

    def backward(
        self,
        dy: Floats,
        *,
        grads: Mapping[str, Floats] | None,
        update: Update | None,
        input_gradient: bool,
        watch: Watch | None = None,
        into: Floats | None = None,  # noqa: ARG002 - may be left alone
    ) -> Floats | None:
        """See `Stretch.backward`; what was kept is let go.

        Raises:
            SpecError: No training forward pass went before, shapes do not meet, or not one of `grads` and `update`.
        """
        if self._kept is None:
            raise SpecError("a backward pass wants one training forward pass before it")
        check_goal(self.params, grads, update)
        value = given = _tensor(dy, self._out_shape)
        kept, self._kept = self._kept, None
        for place in reversed(range(0 if input_gradient else self._first, len(self._ops))):
            op, needed = self._ops[place], kept.pop()
            if grads is not None:
                found = {name: grads[name] for name in op.names}
            else:
                found = {name: np.zeros(self.params[name].shape, np.float32) for name in op.names}
            tensors = {name: torch.from_numpy(array) for name, array in found.items()}
            if watch is not None and op.names and needed is not None:
                lent = (needed, value) if isinstance(op, Conv) else (needed.t(), value.t())
                watch(op.names[0], *(tensor.contiguous().numpy() for tensor in lent))
            earlier = op.backward(value, needed, tensors, input_gradient or place > self._first)
            if update is not None and found:
                apply({name: self.params[name] for name in found}, found, update)
            if earlier is not None:
                value = earlier
        return _array(value, [given]) if input_gradient else None


class _Plan:
    """A list of steps in the making; `shape` is that of its output."""

    def __init__(self, shape: tuple[int, ...], params: Mapping[str, Floats], layouts: Mapping[str, CLayout]) -> None:
        self.shape = shape
        self.ops: list[Step] = []
        self._params, self._layouts = params, layouts
        self._turned = False
        self._own = False  # is the latest output a memory that nobody else reads?
        self._after_relu = False

    def turn(self, wanted: bool) -> None:
        """Bring samples into columns, or back into rows."""
        if self._turned != wanted:
            self.ops.append(turn())
            self._turned = wanted

    def add(self, node: Node) -> None:
        """Append a node's step."""
        if node.op not in STRETCHABLE:
            raise SpecError(f"node {node.name!r}: a stretch cannot do {node.op}")
        if node.op in ("linear", "conv2d"):
            self._weigh(node)
        elif node.op == "relu":
            self.ops.append(relu(in_place=self._own))
        elif node.op == "flatten":
            if len(self.shape) > 1:
                self.ops.append(flat(self.shape))
                self.shape = (prod(self.shape),)
        else:
            side = node.attrs["kernel"]
            if side != node.attrs["stride"] or len(self.shape) != 3 or min(self.shape[1:]) < side:
                raise SpecError(f"node {node.name!r}: a stretch cannot pool {self.shape} by {dict(node.attrs)}")
            # A pool goes before the ReLU in front of it: both orders give the same, but this one keeps less.
            behind = [self.ops.pop()] if self._after_relu else []
            self.ops += [max_pool(side, self.shape), *(relu(in_place=True) for _ in behind)]
            self.shape = (self.shape[0], self.shape[1] // side, self.shape[2] // side)
        self._own = self._own or node.op != "flatten"
        self._after_relu = node.op == "relu"

    def _weigh(self, node: Node) -> None:
        weight, bias = node.params["weight"], node.params["bias"]
        layout = self._layouts.get(weight)
        if layout is None:
            raise SpecError(f"node {node.name!r}: its weight is not masked")
        for name, shape in ((weight, (layout.kept,)), (bias, layout.shape[:1])):
            array = self._params[name]
            if array.shape != shape or array.dtype != np.float32 or not array.flags.c_contiguous:
                raise SpecError(f"{name!r} is {array.dtype} of shape {array.shape}, expected float32 of {shape}")
        tensors = torch.from_numpy(self._params[weight]), torch.from_numpy(self._params[bias])
        if node.op == "conv2d":
            self.shape = _conv_shape(node, layout.shape, self.shape)
            self.ops.append(Conv(node, layout.shape, layout.places, *tensors))
        else:
            if self.shape != layout.shape[1:]:
                raise SpecError(f"node {node.name!r}: weights of {layout.shape} do not meet an input of {self.shape}")
            self.turn(True)
            self.shape = layout.shape[:1]
            if layout.rows is not None:
                self.ops.append(Products((weight, bias), layout.shape, layout.rows, *tensors))
            else:
                self.ops.append(Blocks((weight, bias), layout.shape, layout.places, *tensors))


def _conv_shape(node: Node, weight: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    stride, padding, dilation = node.attrs["stride"], node.attrs["padding"], node.attrs.get("dilation", 1)
    if len(weight) != 4 or len(shape) != 3 or weight[1] != shape[0]:
        raise SpecError(f"node {node.name!r}: weights of {weight} do not meet an input of {shape}")
    sides = [
        (length + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for length, kernel in zip(shape[1:], weight[2:], strict=True)
    ]
    if min(sides) < 1:
        raise SpecError(f"node {node.name!r}: a kernel of {weight[2:]} does not fit {shape}")
    return (weight[0], *sides)


def _tensor(array: Floats, shape: tuple[int, ...]) -> Tensor:
    """See an array as a tensor; one that is not laid out as torch does it is copied."""
    if array.shape[1:] != shape or array.ndim != len(shape) + 1:
        raise SpecError(
            f"an array of shape {array.shape} came to a stretch, expected (n, {', '.join(map(str, shape))})"
        )
    plain = array.dtype == np.float32 and array.flags.c_contiguous and array.flags.writeable
    if plain and array.ctypes.data % _ALIGNED == 0:
        return torch.from_numpy(array)
    tensor = torch.empty(array.shape)
    np.copyto(tensor.numpy(), array)
    return tensor


def _array(tensor: Tensor, shared: Sequence[Tensor]) -> Floats:
    """Give a tensor as an array that shares its memory with none of `shared`."""
    memory = tensor.untyped_storage().data_ptr()
    if any(memory == other.untyped_storage().data_ptr() for other in shared):
        tensor = tensor.clone()
    array: Floats = tensor.contiguous().numpy()
    return array
