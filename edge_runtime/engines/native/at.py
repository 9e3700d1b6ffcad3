"""What an op of the native engine is given: its arrays, all made beforehand, and where its weights' gradients go.

An op is two functions over an `At`. Arrays are float32; tests run the same functions in float64, so that an op takes its type
from what it is given. All but `params` are C-contiguous with the batch first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engines.phase import Phase
from wire.spec import Node

Array = NDArray[Any]
"""float32, or float64 in tests."""


class Sink(Protocol):
    """Takes gradients of weights: adds them to what is there, or moves the weights at once."""

    def __call__(self, role: str, gradient: Array, first: int = 0) -> None:
        """Take the gradient of one weight, or of its rows from `first` on; it is read at once, and may be overwritten.

        Whole weights once, or all rows in parts that do not overlap. What needs the weight itself comes before: afterwards it
        may have moved.
        """


def _nowhere(role: str, gradient: Array, first: int = 0) -> None:
    del role, gradient, first


@dataclass(slots=True)
class At:
    """One node, ready to run for one batch size.

    Attributes:
        node: The node.
        place: Its place among the model's nodes.
        phase: Of the engine.
        params: Its weights by role, compact and C-contiguous; but of a narrower width those of a ``linear`` are views whose
            rows lie apart (unit stride within a row).
        shapes: Of its inputs, ``(n, *shape)`` each.
        x: Its inputs; in a backward turn none, unless `Needs.reads_input`.
        y: Its output, written by `forward`; in a backward turn empty, unless `Needs.reads_output`.
        saved: As `wire.native.needs.Needs.saves` names them; empty where no backward pass follows, and then not written.
        scratch: As `Needs.forward` or `Needs.backward` names them, whichever way the pass goes.
        dy: Gradient of the output.
        dx: Where the gradient of each input is *written* (not added); None where nobody wants it.
        sink: Where gradients of weights go.
    """

    node: Node
    place: int
    phase: Phase
    params: Mapping[str, Array] = field(default_factory=dict)
    shapes: Sequence[tuple[int, ...]] = ()
    x: list[Array] = field(default_factory=list)
    y: Array = field(default_factory=lambda: np.zeros(0, np.float32))
    saved: Mapping[str, Array] = field(default_factory=dict)
    scratch: Mapping[str, Array] = field(default_factory=dict)
    dy: Array = field(default_factory=lambda: np.zeros(0, np.float32))
    dx: list[Array | None] = field(default_factory=list)
    sink: Sink = _nowhere


@dataclass(frozen=True, slots=True)
class Op:
    """An op's arithmetic.

    Attributes:
        forward: Writes `At.y`, and `At.saved` where there is any.
        backward: Writes what is wanted of `At.dx`, and hands the weights' gradients to `At.sink`.
    """

    forward: Callable[[At], None]
    backward: Callable[[At], None]
