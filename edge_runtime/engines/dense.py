"""A masked layer that is held dense, run by torch without autograd: what the sparse ones have to beat."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from edge_runtime.engines import Update
from edge_runtime.engines.arrays import Floats, Labels
from edge_runtime.engines.update import apply, move
from edge_runtime.kernels import Watch, check_goal
from wire.errors import SpecError
from wire.masks import Mask
from wire.spec import Node

Tensor = torch.Tensor

BLOCK = 1 << 17
"""Gradients per block of rows of a dense weight, at least one row: what is made, masked and applied at a time."""

_LARGE = 1 << 18  # weights beyond a second-level cache: their product is faster with the batch in columns
_ALIGN = 64  # bytes; matrix products may round differently at another alignment


class _Follower(Protocol):
    """What comes behind a layer: `forward` may overwrite x, and gives what `backward` needs beside its output."""

    def forward(self, x: Tensor) -> tuple[Tensor, Any]: ...

    def backward(self, dy: Tensor, kept: Any) -> Tensor: ...


class _Relu:
    def __init__(self, node: Node) -> None:
        del node

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        y = torch.relu_(x)
        return y, y

    def backward(self, dy: Tensor, kept: Any) -> Tensor:
        return cast("Tensor", torch.ops.aten.threshold_backward(dy, kept, 0))


class _Flatten:
    def __init__(self, node: Node) -> None:
        del node

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        return x.flatten(1), x.shape

    def backward(self, dy: Tensor, kept: Any) -> Tensor:
        return dy.reshape(kept)


class _Pool:
    def __init__(self, node: Node) -> None:
        self._sides = [node.attrs["kernel"]] * 2, [node.attrs["stride"]] * 2, [0, 0], [1, 1], False

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        y, places = torch.ops.aten.max_pool2d_with_indices(x, *self._sides)
        return y, (x, places)

    def backward(self, dy: Tensor, kept: Any) -> Tensor:
        x, places = kept
        return cast("Tensor", torch.ops.aten.max_pool2d_with_indices_backward(dy, x, *self._sides, places))


FOLLOW: Mapping[str, Callable[[Node], _Follower]] = {"relu": _Relu, "flatten": _Flatten, "max_pool2d": _Pool}


class DenseStretch:
    """One layer whose weight is dense and zero where its mask is, and what follows it: a `Stretch` that torch computes.

    No gradient of a whole matrix is ever held: it is added where it belongs by the product itself, or, where an update
    wants to see it first, made and applied in blocks of rows. This gains more time than the mask costs.
    """

    def __init__(self, nodes: Sequence[Node], params: Mapping[str, Floats], mask: Mask) -> None:
        """Take a layer's arrays, which stay the caller's; pruned weights must be zero.

        Args:
            nodes: The layer, and ReLUs, max pools and flattens that read one another behind it.
            params: Its weight and bias by tensor name.
            mask: Of its weight.
        """
        self._node, self._followers = nodes[0], tuple(FOLLOW[node.op](node) for node in nodes[1:])
        self._mask = None if mask.all() else mask
        self._weight_name, self._bias_name = nodes[0].params["weight"], nodes[0].params["bias"]
        self.params = {name: params[name] for name in (self._weight_name, self._bias_name)}
        self._weight, self._bias = (torch.from_numpy(array) for array in self.params.values())
        self._kept: list[Any] = []  # the input, and what each follower needs

    def forward(self, x: Floats, *, train: bool, out: Floats | None = None) -> Floats:  # noqa: ARG002 - may be left alone
        """See `Stretch.forward`; x is kept and not copied."""
        value = aligned(x)
        kept: list[Any] = [value]
        with torch.no_grad():
            if self._node.op == "conv2d":
                y = F.conv2d(value, self._weight, self._bias, *self._geometry())
            elif self._weight.numel() < _LARGE:
                y = F.linear(value, self._weight, self._bias)
            else:
                y = torch.mm(self._weight, value.t().contiguous()).t().add(self._bias)
            for follower in self._followers:
                y, needed = follower.forward(y)
                kept.append(needed)
        if train:
            self._kept = kept
        return plain(y)

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
        """See `Stretch.backward`."""
        if not self._kept:
            raise SpecError("a backward pass wants one training forward pass before it")
        check_goal(self.params, grads, update)
        kept, self._kept = self._kept, []
        move = self._linear_backward if self._node.op == "linear" else self._conv_backward
        with torch.no_grad():
            value = aligned(dy)
            for follower in reversed(self._followers):
                value = follower.backward(value, kept.pop())
            x = kept.pop()
            if watch is not None:
                watch(self._weight_name, plain(x), plain(value))
            dx = move(x, value, grads, update, input_gradient)
        return None if dx is None else plain(dx)

    def _linear_backward(
        self, x: Tensor, dy: Tensor, grads: Mapping[str, Floats] | None, update: Update | None, wanted: bool
    ) -> Tensor | None:
        dx = torch.mm(dy, self._weight) if wanted else None  # before the weight moves
        self._settle_bias(dy.sum(0), grads, update)
        name, turned = self._weight_name, dy.t()
        if grads is not None:
            torch.from_numpy(grads[name]).addmm_(turned, x)
            self._prune(grads[name])
        elif update is not None and not _looks(update):
            self._weight.addmm_(turned, x, alpha=-update.rate)
            self._prune(self.params[name])
        elif update is not None:
            step = max(1, BLOCK // x.shape[1])
            for start in range(0, len(self._weight), step):
                rows = slice(start, start + step)
                self._apply(torch.mm(turned[rows], x), rows, update)
        return dx

    def _conv_backward(
        self, x: Tensor, dy: Tensor, grads: Mapping[str, Floats] | None, update: Update | None, wanted: bool
    ) -> Tensor | None:
        stride, padding = ([side, side] for side in self._geometry())
        dx, gradient, dbias = torch.ops.aten.convolution_backward(
            dy, x, self._weight, list(self._bias.shape), stride, padding, [1, 1], False, [0, 0], 1, [wanted, True, True]
        )
        self._settle_bias(dbias, grads, update)
        if update is not None:
            self._apply(gradient.contiguous(), slice(None), update)
        elif grads is not None:
            grads[self._weight_name] += gradient.numpy()
            self._prune(grads[self._weight_name])
        return cast("Tensor", dx) if wanted else None

    def _apply(self, gradient: Tensor, rows: slice, update: Update) -> None:
        """Move some rows along their gradient; what is pruned was zero, and stays so whatever the anchor says."""
        name, array = self._weight_name, gradient.numpy()
        self._prune(array, rows)
        move(name, self.params[name][rows], array, update, rows.start or 0)
        if update.pull or update.momentum:  # anchor and velocity may be of another mask
            self._prune(self.params[name][rows], rows)

    def _prune(self, array: Floats, rows: slice = slice(None)) -> None:
        if self._mask is not None:
            np.multiply(array, self._mask[rows], out=array)

    def _settle_bias(self, gradient: Tensor, grads: Mapping[str, Floats] | None, update: Update | None) -> None:
        name = self._bias_name
        if grads is not None:
            grads[name] += gradient.numpy()
        elif update is not None and not _looks(update):
            self._bias.add_(gradient, alpha=-update.rate)
        elif update is not None:
            apply({name: self.params[name]}, {name: gradient.numpy()}, update)

    def _geometry(self) -> tuple[int, int]:
        return self._node.attrs["stride"], self._node.attrs["padding"]


def _looks(update: Update) -> bool:
    """Tell whether an update needs the gradient itself, or adds a multiple of it."""
    return bool(update.momentum or update.decay or update.pull)


def plain(tensor: Tensor) -> Floats:
    """See a tensor as a C-contiguous array; copied only if it is laid out in another way."""
    array: Floats = tensor.detach().contiguous().numpy()
    return array


def copied(array: Labels | Floats) -> Tensor:
    """Copy a batch into torch's own, aligned memory."""
    tensor = torch.empty(array.shape, dtype=torch.float32 if array.dtype == np.float32 else torch.int64)
    tensor.numpy()[...] = array
    return tensor


def aligned(array: Floats) -> Tensor:
    """See an array as a tensor; copied only if its memory is not as torch would align it, or not contiguous."""
    if array.flags.c_contiguous and array.flags.writeable and array.ctypes.data % _ALIGN == 0:
        return torch.from_numpy(array)
    tensor = torch.empty(array.shape)
    tensor.numpy()[...] = array
    return tensor
