"""Going on with less: an order whose memory shrinks while it runs is cut to a narrower width of what the device holds.

NestFL adapts to what a device has at run time (MobiCom 2022, poster, section 2): widths are nested, so that a narrower one is
a slice of the weights that are being trained, and of whatever goes along with them; nothing is downloaded. The slice is the
coordinator's own (`wire.structure.cut`). The answer names the narrower structure and is about that width alone.

Where there is no narrower width, or even the narrowest does not fit, batches go through the model in smaller parts from there
on; the answer is about the same width then. With masks there is none: a narrower width has other masks than a slice of these.

It is looked at between two batches, so that a step that has begun is the last at the old width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from edge_runtime.engines import Engine
from edge_runtime.engines.arrays import Floats
from edge_runtime.rules import Held
from wire.errors import BudgetExceeded
from wire.spec import ModelSpec, Structure, TensorSpec
from wire.structure import cut

Room = Callable[[float], int]
"""Bytes above base that an order may take by now, given the fraction of it that is done; 0 for what it was granted."""

Own = Callable[[int], Mapping[str, Floats]]
"""What a width has of its own of its norms, by its capacity."""

_MEBIBYTE = 1 << 20


def as_granted(_: float) -> int:
    """Leave an order what it was granted, to its end."""
    return 0


class Squeezed:
    """Keeps one order within what it may take; a `edge_runtime.rules.Squeeze`.

    Attributes:
        bytes_budget: What the order may take by now; 0 when nothing bounds it.
        bytes_needed: Predicted bound of what it takes, as it is or as it would have to be.
        at: The fraction of the order after which it was first cut; None as long as it was not.
        micro_batch: Samples that go through the model at once.
    """

    __slots__ = ("_engine", "_own", "_price", "_room", "_settle", "at", "bytes_budget", "bytes_needed", "micro_batch")

    def __init__(
        self,
        engine: Engine,
        room: Room,
        price: Callable[[Structure, int], int],
        settle: Callable[[int, int], None],
        granted: tuple[int, int, int],
        *,
        own: Own | None = None,
    ) -> None:
        """Watch an order that fits as it is.

        Args:
            engine: Loaded.
            room: What may be taken.
            price: Predicts what a width takes with a micro-batch, margin included.
            settle: Called with the new budget and the micro-batch after a cut.
            granted: The order's budget, what it is predicted to take, and its micro-batch.
            own: Gives what a width begins with in place of a slice.
        """
        self._engine = engine
        self._room = room
        self._price = price
        self._settle = settle
        self._own = own
        self.at: float | None = None
        self.bytes_budget, self.bytes_needed, self.micro_batch = granted

    def __call__(self, done: float, held: Held) -> int:
        """Cut the engine and what goes along with it to the widest width that fits, if it no longer fits as it is.

        Returns:
            The micro-batch to go on with.

        Raises:
            BudgetExceeded: Not even the narrowest fits with one sample at a time.
        """
        room = self._room(done)
        if not room or (self.bytes_budget and room >= self.bytes_budget):
            return self.micro_batch
        self.bytes_budget = room
        if self.bytes_needed <= room:
            return self.micro_batch
        now = self._engine.structure
        ways = self._ways()
        for structure, micro_batch in ways:
            self.bytes_needed = self._price(structure, micro_batch)
            if self.bytes_needed <= room:
                if structure != now:
                    narrow(self._engine, structure, held)
                    for name, array in (self._own(structure.capacity) if self._own else {}).items():
                        self._engine.params[name][...] = array
                    held.apart.settle(self._engine, held.arrays)
                self.at = done if self.at is None else self.at
                self.micro_batch = micro_batch
                self._settle(room, micro_batch)
                return micro_batch
        least = min([(now, self.micro_batch), *ways], key=lambda way: self._price(*way))
        self.bytes_needed = self._price(*least)
        raise BudgetExceeded(
            f"memory shrank to {room / _MEBIBYTE:.1f} MiB, width {least[0].capacity} needs"
            f" {self.bytes_needed / _MEBIBYTE:.1f} MiB"
        )

    def _ways(self) -> list[tuple[Structure, int]]:
        """Give what can be gone down to, the best first: narrower widths, then the narrowest in smaller and smaller parts."""
        structure, micro_batch = self._engine.structure, self.micro_batch
        ways = [
            (structure.narrowed(k), micro_batch)
            for k in reversed(range(structure.capacity if structure.widths and not structure.masks else 0))
        ]
        narrowest = ways[-1][0] if ways else structure
        while micro_batch > 1:
            micro_batch //= 2
            ways.append((narrowest, micro_batch))
        return ways


def narrow(engine: Engine, structure: Structure, held: Held) -> None:
    """Cut a loaded engine, and what a rule holds of its weights, to a narrower width in place.

    Args:
        engine: Its gradients are dropped; its arrays are new ones afterwards.
        structure: A narrower width of what it has loaded.
        held: See `edge_runtime.rules.Held`.

    Cost: one copy of the narrower width. What was wide goes tensor by tensor, so that beside the wide weights there is one
    narrower tensor at most.
    """
    spec = engine.spec
    for views in held.views:
        views.clear()
    for arrays in held.arrays:
        for tensor in spec.tensors:
            if tensor.name in arrays:
                arrays[tensor.name] = _slice(spec, tensor, arrays[tensor.name], structure).copy()
    wide = dict(engine.params)
    engine.load(spec, structure)
    for tensor in spec.tensors:
        engine.params[tensor.name][...] = _slice(spec, tensor, wide.pop(tensor.name), structure)


def _slice(spec: ModelSpec, tensor: TensorSpec, array: Floats, structure: Structure) -> Floats:
    alone = dataclasses.replace(spec, tensors=(tensor,))
    return cut(alone, {tensor.name: array}, structure)[tensor.name]
