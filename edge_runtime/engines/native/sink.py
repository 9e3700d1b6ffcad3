"""Where gradients of weights go: into the engine's gradients, or straight into the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from edge_runtime.engines import Update
from edge_runtime.engines.masks import Wires
from edge_runtime.engines.native.at import Array, Sink
from edge_runtime.engines.update import move
from wire.errors import SpecError
from wire.masks import Mask
from wire.spec import Node


@dataclass(slots=True)
class Weights:
    """The weights of a loaded model.

    Attributes:
        params: By tensor name; of a narrower width they are views.
        masks: Of masked weights that are held dense.
        wires: The update that is under way, or the gradients; and who is shown what passes through masked layers.
        shared: Tensors that several nodes use.
        runs: Tensors whose rows are several runs of their channels.
        pending: What an update is to apply to these when all have given their share.
    """

    params: Mapping[str, Array]
    masks: Mapping[str, Mask]
    wires: Wires
    shared: frozenset[str] = frozenset()
    runs: frozenset[str] = frozenset()
    pending: dict[str, Array] = field(default_factory=dict)

    def sink(self, node: Node) -> Sink:
        """Give what takes the gradients of one node's weights."""

        def take(role: str, gradient: Array, first: int = 0) -> None:
            name = node.params[role]
            if (mask := self.masks.get(name)) is not None:
                gradient *= mask[first : first + len(gradient)]
            update = self.wires.update[0] if self.wires.update else None
            if update is None:
                self._add(name, self.wires.grads[name], gradient, first)
            elif name in self.shared:
                if name not in self.pending:
                    self.pending[name] = np.zeros(self.params[name].shape, gradient.dtype)
                self._add(name, self.pending[name], gradient, first)
            else:
                self._move(name, gradient, first, update)

        return take

    def begin(self) -> None:
        """Forget what a pass that failed has left."""
        self.pending.clear()

    def end(self) -> None:
        """Hear that a backward pass is over: what several nodes use moves only now."""
        for name in tuple(self.pending):
            self._move(name, self.pending.pop(name), 0, self.wires.update[0])

    def _move(self, name: str, gradient: Array, first: int, update: Update) -> None:
        rows = slice(first, first + len(gradient))
        param = self.params[name][rows]
        if not param.flags.c_contiguous:
            raise SpecError(
                "an update was given to a narrower width, whose weights are views: its gradients add up instead"
            )
        move(name, param, gradient, update, first)
        if name in self.masks and (update.pull or update.momentum):  # anchor and velocity may be of another mask
            np.multiply(param, self.masks[name][rows], out=param)

    def _add(self, name: str, into: Array, gradient: Array, first: int) -> None:
        """Add some rows; of a narrower width an axis of several runs of its channels stands as two (`engines.views`)."""
        if name not in self.runs or into.ndim == gradient.ndim:
            rows = into[first : first + len(gradient)]
            rows += gradient.reshape(rows.shape)
            return
        each, last = into.shape[1], first + len(gradient)
        for run in range(first // each, -(-last // each)):
            start, stop = max(first, run * each), min(last, (run + 1) * each)
            rows = into[run, start - run * each : stop - run * each]
            rows += gradient[start - first : stop - first].reshape(rows.shape)
