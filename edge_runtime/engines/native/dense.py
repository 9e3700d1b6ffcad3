"""A masked layer that the native engine holds dense, alone: what the sparse ways have to beat when they are timed.

In a loaded model such a layer is a turn of the pass like any other (`edge_runtime.engines.native.passes`), whose gradients are
masked where they are taken. Here it is a `Stretch` of its own, with the same op over memory of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np

from edge_runtime.engines import Update
from edge_runtime.engines.arrays import Arrays, Floats
from edge_runtime.engines.masks import Backend, Wires
from edge_runtime.engines.native.arena import aligned
from edge_runtime.engines.native.at import Array, At
from edge_runtime.engines.native.registry import OPS
from edge_runtime.engines.native.sink import Weights
from edge_runtime.engines.phase import Phase
from edge_runtime.kernels import Stretch, Watch, check_goal
from edge_runtime.kernels.kits import open_bare
from wire.errors import SpecError
from wire.masks import Mask
from wire.native.needs import Dims, Facts
from wire.native.registry import NEEDS
from wire.spec import Node


class DenseStretch:
    """See `edge_runtime.kernels.Stretch`."""

    def __init__(self, node: Node, shape: tuple[int, ...], params: Mapping[str, Floats], mask: Mask) -> None:
        """Take a layer's arrays, which stay the caller's; pruned weights must be zero.

        Args:
            node: The layer.
            shape: Of one input.
            params: Its weight and bias by tensor name.
            mask: Of its weight.
        """
        self._node, self._shape = node, shape
        self.params = {name: params[name] for name in node.params.values()}
        self._out = _output(node, shape, {role: params[name].shape for role, name in node.params.items()})
        self._wires = Wires()
        masks = {} if mask.all() else {node.params["weight"]: mask}
        self._weights = Weights(self.params, masks, self._wires)
        self._memory: Arrays = {}
        self._at: At | None = None

    def forward(self, x: Floats, *, train: bool, out: Floats | None = None) -> Floats:  # noqa: ARG002 - may be left alone
        """See `Stretch.forward`; x is kept and not copied."""
        if x.shape[1:] != self._shape or not len(x):
            raise SpecError(f"inputs of shape {x.shape}; this layer takes one or more of {self._shape}")
        needs = NEEDS[self._node.op](self._facts(len(x)))
        at = self._new(np.ascontiguousarray(x, np.float32))
        at.y = aligned(len(x) * prod(self._out), np.float32).reshape(len(x), *self._out)
        at.saved = self._arrays("saves", needs.saves) if train else {}
        at.scratch = self._arrays("forward", needs.forward)
        OPS[self._node.op].forward(at)
        self._at = at if train else None
        return at.y

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
        at, self._at = self._at, None
        if at is None or dy.shape != (len(at.x[0]), *self._out):
            raise SpecError("a backward pass wants one training forward pass before it, and a gradient of its output")
        check_goal(self.params, grads, update)
        self._wires.grads.clear()
        self._wires.grads.update(grads or {})
        self._wires.update[:] = [update] if update is not None else []
        at.dy = np.array(dy, np.float32)  # an op may write to it
        at.dx = [np.empty_like(at.x[0]) if input_gradient else None]
        at.scratch = self._arrays("backward", NEEDS[self._node.op](self._facts(len(dy))).backward)
        if watch is not None:
            watch(self._node.params["weight"], at.x[0], at.dy)
        self._weights.begin()
        OPS[self._node.op].backward(at)
        self._weights.end()
        return at.dx[0]

    def _facts(self, batch: int) -> Facts:
        shapes = {role: self.params[name].shape for role, name in self._node.params.items()}
        return Facts(self._node, batch, (self._shape,), self._out, shapes)

    def _new(self, x: Floats) -> At:
        params = {role: self.params[name] for role, name in self._node.params.items()}
        return At(self._node, 0, Phase(), params, [x.shape], [x], sink=self._weights.sink(self._node))

    def _arrays(self, kind: str, wanted: Mapping[str, Dims]) -> dict[str, Array]:
        """Give memory that stays from pass to pass, grown when the batch does."""
        for name, dims in wanted.items():
            if len(self._memory.get(f"{kind} {name}", ())) < prod(dims):
                self._memory[f"{kind} {name}"] = aligned(prod(dims), np.float32)
        return {name: self._memory[f"{kind} {name}"][: prod(dims)].reshape(dims) for name, dims in wanted.items()}


def _output(node: Node, shape: tuple[int, ...], weights: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Give the shape of what a layer makes of one input."""
    weight = weights["weight"]
    if node.op == "linear":
        return weight[:1]
    stride, padding, dilation = node.attrs["stride"], node.attrs["padding"], node.attrs.get("dilation", 1)
    reach = dilation * (weight[-1] - 1) + 1 - 2 * padding
    return (weight[0], *((length - reach) // stride + 1 for length in shape[1:]))


def _dense(nodes: Sequence[Node], shape: tuple[int, ...], params: Mapping[str, Floats], mask: Mask) -> Stretch:
    (node,) = nodes  # nothing follows: see `Backend.follows`
    return DenseStretch(node, shape, params, mask)


NATIVE = Backend(f"native numpy {np.__version__}", open_bare, _dense)
"""What this engine brings for masked layers."""
