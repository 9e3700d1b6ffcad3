"""Sparse training: linear layers and convolutions whose weights are mostly not there, forward and both gradients.

A masked weight is held as its kept values and a `Layout` that says where they stand; nothing here is ever as large as the
dense weight. A `Stretch` runs a chain of a model's nodes, by the compiled core (`stretch`) or by torch (`twin`); both do the
same arithmetic behind the same door. `choose` times which layers of a model are better left dense on this device.

This module itself loads no numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from wire.errors import SpecError

if TYPE_CHECKING:
    from edge_runtime.engines import Update
    from edge_runtime.engines.arrays import Floats

STRETCHABLE = frozenset({"linear", "conv2d", "relu", "max_pool2d", "flatten"})
"""Ops that a `Stretch` can run; the first two only where their weight has a layout."""


Watch = Callable[[str, "Floats", "Floats"], None]
"""Is shown what passed through a masked layer: its weight's name, the input ``(n, *in_shape)`` and the gradient of the
output ``(n, *out_shape)``. They are only lent."""


class Layout(Protocol):
    """Where the kept values of one weight tensor stand, in a kernel's own order."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense tensor."""

    @property
    def kept(self) -> int:
        """How many weights are kept."""

    @property
    def bytes_index(self) -> int:
        """Size of everything but the values."""

    def to_c_order(self, values: Floats) -> Floats:
        """Bring values ``(kept,)`` from the layout's order into C order of the mask; gives a copy.

        Raises:
            SpecError: There are not as many.
        """

    def from_c_order(self, values: Floats) -> Floats:
        """Bring values from C order of the mask into the layout's order; undoes `to_c_order`, same errors."""


class Stretch(Protocol):
    """A chain of nodes, each of which reads the one before, that runs as one.

    Arrays that go in and out are C-contiguous float32 with the batch first; in between they are the stretch's own business.
    """

    @property
    def params(self) -> Mapping[str, Floats]:
        """Trainable arrays by tensor name: masked weights as ``(kept,)`` in their layout's order, biases as they are."""

    def forward(self, x: Floats, *, train: bool, out: Floats | None = None) -> Floats:
        """Give ``(n, *out_shape)`` of ``(n, *in_shape)``; with `train` keep what one `backward` needs.

        Args:
            x: The inputs.
            train: Whether a backward pass may follow.
            out: Memory of the result's shape that it may be written to; whether it was, is whether this is what comes back. No
                part of `x`: that is still read when the first of it is written.
        """

    def backward(
        self,
        dy: Floats,
        *,
        grads: Mapping[str, Floats] | None,
        update: Update | None,
        input_gradient: bool,
        watch: Watch | None = None,
        into: Floats | None = None,
    ) -> Floats | None:
        """Take the gradient of the output of the training forward pass that went before; what it kept is let go.

        Args:
            dy: ``(n, *out_shape)``.
            grads: By tensor name, of the shapes of `params`; gradients are added. Or None, and
            update: moves `params` at once. Exactly one of the two is given.
            input_gradient: Whether ``(n, *in_shape)`` is wanted back.
            watch: Shown every layer's share; from it follows the gradient of weights that are not there (`importance`).
            into: As `out` of `forward`, for what is wanted back; no part of `dy`.
        """


def check_goal(params: Mapping[str, Floats], grads: Mapping[str, Floats] | None, update: Update | None) -> None:
    """Refuse what a backward pass could not write to; a compiled one would write all the same. Cost: no array is read.

    Raises:
        SpecError: Not one of gradients and an update, or an array of theirs is missing, or not of its parameter's shape and
            type, or not contiguous.
    """
    if (grads is None) == (update is None):
        raise SpecError("a backward pass wants gradients to add to or an update, one of the two")
    wanted: list[tuple[str, Mapping[str, Floats] | None]] = [] if grads is None else [("gradient", grads)]
    if update is not None:
        wanted += [("velocity", update.velocity)] * bool(update.momentum) + [("anchor", update.anchor)] * bool(
            update.pull
        )
    for what, arrays in wanted:
        for name, param in params.items():
            array = None if arrays is None else arrays.get(name)
            if array is None or array.shape != param.shape:
                found = "none" if array is None else f"one of shape {array.shape}"
                raise SpecError(f"the {what} of {name!r} must be of shape {param.shape}; there is {found}")
            if array.dtype != param.dtype or not (array.flags.c_contiguous and array.flags.writeable):
                raise SpecError(f"the {what} of {name!r} is {array.dtype}, or not contiguous, or not to be written")
