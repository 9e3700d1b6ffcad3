"""Ordered dropout: every step trains one width, drawn evenly among the device's own and all narrower ones.

FjORD (Horvath et al., NeurIPS 2021), algorithm 1 and section 3.3. Narrower widths are prefixes of every layer, so that a
step of one adds nothing to the gradients of the channels beyond it; momentum and decay move those all the same, as they do
in any step of plain SGD. A pass is a draw per batch, in which all layers have the same width.

Knobs of the recipe:

* ``distil`` (0 or 1, default 0): with 1 every step trains the device's full width from the labels as well, and the drawn
  width from the full one's softmax output, which counts as a constant: ``CE(full, labels) + CE(drawn, softmax(full))``.
  Where the drawn width is the full one the second part has no gradient.

The loss that is told is the drawn width's, with ``distil`` the full one's.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from edge_runtime.engines import Engine
from edge_runtime.engines.arrays import Floats, Labels
from edge_runtime.rules import Task, Trained, loop
from wire.errors import SpecError
from wire.memory import copies

__all__ = ["NEEDS_ENGINE", "copies", "train"]

NEEDS_ENGINE = True


def train(task: Task) -> Trained:
    """See `edge_runtime.rules.Rule.train`. Batches and widths depend on the recipe's seed and the round alone."""
    distil = task.recipe.knobs.get("distil", 0.0)
    if distil not in (0.0, 1.0):
        raise SpecError(f"knob distil = {distil}: write 0 or 1")
    if distil and task.recipe.loss != "cross_entropy":
        raise SpecError(f"knob distil makes targets for cross_entropy, not for {task.recipe.loss}")
    rng = loop.rng_of(task)
    dropout = _Dropout(task, loop.Mover(task), rng, bool(distil))
    return loop.run(task, dropout.step, rng, dataclasses.replace(dropout.mover.held, views=[dropout.narrow]))


@dataclass(frozen=True, slots=True)
class _Dropout:
    """What all steps of an order share."""

    task: Task
    mover: loop.Mover
    rng: np.random.Generator
    distil: bool
    narrow: dict[int, Engine] = field(default_factory=dict)

    def step(self, x: Floats, y: Labels) -> float:
        """Make one update from one batch."""
        loss = loop.gathered(self.task, x, y, partial(self._pass, self._drawn()))
        self.mover.apply()
        return loss

    def _pass(self, drawn: Engine, x: Floats, y: Labels, share: float) -> float:
        engine, kind = self.task.engine, self.task.recipe.loss
        if not self.distil:
            return drawn.forward_backward(x, y, scale=share, loss=kind)
        loss = engine.forward_backward(x, y, scale=share, loss=kind)
        if drawn is not engine:
            drawn.forward_backward(x, _softmax(engine.logits), scale=share, loss=kind)
        return loss

    def _drawn(self) -> Engine:
        engine = self.task.engine
        capacity = int(self.rng.integers(engine.structure.capacity + 1))
        if capacity == engine.structure.capacity:
            return engine
        if capacity not in self.narrow:
            self.narrow[capacity] = self.task.apart.narrow(engine, capacity)
        return self.narrow[capacity]


def _softmax(logits: Floats) -> Floats:
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(odds / odds.sum(axis=1, keepdims=True), np.float32)
