"""Weights and biases of norms that narrower widths have of their own, while an order trains several widths.

All other weights of a narrower width are views of the order's; these are not, and neither are their gradients. They are known
here by ``CAPACITY/NAME``. A width that never came up in a step has none here, and nothing is said of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from edge_runtime.engines import Engine
from edge_runtime.engines.arrays import Arrays
from wire.norms import OWN, affines
from wire.spec import ModelSpec

Received = Callable[[int], Arrays]
"""What a width was sent of its own, by its capacity; the caller's to keep."""


def _nothing(_: int) -> Arrays:
    return {}


class Apart:
    """What the narrower widths of one order move apart.

    Attributes:
        params: Values by ``CAPACITY/NAME``; writing to them changes the width.
        grads: Their gradients, to which a backward pass of the width adds.
    """

    __slots__ = ("_received", "grads", "params")

    def __init__(self, received: Received = _nothing) -> None:
        """No width has come up yet; where nothing is said to be received, widths share everything."""
        self._received = received
        self.params: Arrays = {}
        self.grads: Arrays = {}

    def narrow(self, engine: Engine, capacity: int) -> Engine:
        """Give a narrower width of an engine with what is its own, as it stands by now."""
        own = self._own(engine.spec, capacity)
        width = engine.narrow(engine.structure.narrowed(capacity), own)
        for name in own:
            self.params[f"{capacity}/{name}"], self.grads[f"{capacity}/{name}"] = width.params[name], width.grads[name]
        return width

    def settle(self, engine: Engine, along: Sequence[Arrays]) -> None:
        """Let what was a narrower width's own be the engine's, which was cut to that width.

        Args:
            engine: As it is now.
            along: What goes along with the weights, in which that of widths stands by ``CAPACITY/NAME``. What the width has
                nothing of begins with zeros.
        """
        if self._received is _nothing:
            return
        now = engine.structure.capacity
        for name in affines(engine.spec) & self._received(now).keys():
            key = f"{now}/{name}"
            if key in self.params:
                engine.params[name][...] = self.params[key]
            for arrays in along:
                if name in arrays:
                    arrays[name] = arrays.get(key, np.zeros_like(arrays[name]))
        for arrays in (self.params, self.grads, *along):
            for key in [key for key in arrays if _capacity(key) >= now]:
                del arrays[key]

    def moves(self, spec: ModelSpec) -> Arrays:
        """Give how what was trained has moved, by name in the update; the values here are no more afterwards."""
        capacities = sorted({_capacity(key) for key in self.params})
        found: Arrays = {}
        for capacity in capacities:
            received = self._received(capacity)
            for name in sorted(affines(spec) & received.keys()):
                found[f"{OWN}{capacity}/{name}"] = self.params.pop(f"{capacity}/{name}") - received[name]
        return found

    def _own(self, spec: ModelSpec, capacity: int) -> Arrays:
        """Give what a width has of its own: as training has left it, or as it was sent."""
        received = self._received(capacity)
        names = sorted(affines(spec) & received.keys())  # one order everywhere: lengths are sums over tensors
        return {name: self.params.get(f"{capacity}/{name}", received[name]) for name in names}


def _capacity(key: str) -> int:
    """Read the capacity of ``CAPACITY/NAME``; -1 of a tensor's plain name, which is the engine's own."""
    head, slash, _ = key.partition("/")
    return int(head) if slash and head.isdecimal() else -1
