"""Plain SGD with momentum, weight decay and clipping, optionally over several nested widths per step.

A narrower width whose norms have weights and biases of their own moves these (`edge_runtime.apart`), from the step on in which
it first comes up, and momentum moves them as it does all weights.

Knobs of the recipe:

* ``widths`` (whole number, default 0): with n > 0 every step also trains the narrowest width of the structure and n
  random ones between, each from the same batch. It keeps the narrow widths good where only the wide one is asked for (the
  sandwich rule of slimmable networks, Yu and Huang, ICCV 2019). There the gradients of all are added and applied once;
  here the widths take turns from the widest down: each moves the weights by its own clipped gradient, and the next one
  goes on from there. Momentum and decay move all weights at every turn.
* ``distil`` (0 to 1, default 0): share of the soft part in the narrower widths' target, which is the full width's
  softmax output taken as a constant; the labels keep the rest (in-place distillation of the same paper). Cross-entropy
  is linear in its target, so that the mixed target is the mixed loss.
* ``mutual`` (0 to 1, default 0): the same in both directions, and not together with ``distil``. The full width also learns
  from what the narrowest said before the step, by one more pass of it. Where many devices train the narrowest width
  and few the widest, it is the one that knows the classes which those few have not. The share is ``mutual`` times what
  this device's labels lack: how far (in total variation, 0 to 1) their frequencies are from even ones. With as many
  samples of each class all learn from the labels alone. The loss that is told is that of the full width against its
  mixed target. (Networks that teach each other: Zhang et al., *Deep Mutual Learning*, CVPR 2018.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from edge_runtime.engines import Engine
from edge_runtime.engines.arrays import Floats, Labels
from edge_runtime.rules import Task, Trained, loop
from wire.errors import SpecError
from wire.memory import copies
from wire.messages import Recipe

__all__ = ["NEEDS_ENGINE", "copies", "train"]

NEEDS_ENGINE = True


def train(task: Task) -> Trained:
    """See `edge_runtime.rules.Rule.train`. The batch order depends on the recipe's seed and the round alone."""
    knobs, mover = _knobs(task.recipe), loop.Mover(task)
    if not knobs.widths or not task.engine.structure.capacity:
        return loop.run(task, mover.step, held=mover.held)
    rng = loop.rng_of(task)
    soft = knobs.distil or (knobs.mutual and knobs.mutual * _lacking(task.y, task.engine.spec.classes))
    sandwich = _Sandwich(task, knobs, mover, rng, soft)
    return loop.run(task, sandwich.step, rng, dataclasses.replace(mover.held, views=[sandwich.narrow]))


@dataclass(frozen=True, slots=True)
class _Knobs:
    widths: int
    distil: float
    mutual: float


@dataclass(frozen=True, slots=True)
class _Sandwich:
    """What all steps of an order share that trains narrower widths as well."""

    task: Task
    knobs: _Knobs
    mover: loop.Mover
    rng: np.random.Generator
    soft: float
    narrow: dict[int, Engine] = field(default_factory=dict)

    def step(self, x: Floats, y: Labels) -> float:
        """Move the weights once for every width, all by one batch, from the full one down; give its mean loss."""
        full = self.task.engine.structure.capacity
        heard: list[Floats] = []
        said: list[Floats] = []
        if self.knobs.mutual and self.soft and full:
            # Heard, not learnt from: the next turn clears these gradients. Without a backward pass batch norms would go by
            # running statistics, which a narrower width has not.
            self._turn(0, [], x, y, heard)
        loss = self._turn(full, heard, x, y, said if self.soft else None)
        self.mover.apply()
        for capacity in self._narrower(full):
            self._turn(capacity, said, x, y)
            self.mover.apply()
        return loss

    def _turn(
        self, capacity: int, soft: Sequence[Floats], x: Floats, y: Labels, said: list[Floats] | None = None
    ) -> float:
        """Gather a width's gradients for one batch; give its mean loss.

        Args:
            capacity: Of the width.
            soft: What it learns from, by micro-batch; empty for the labels.
            x: Inputs.
            y: Labels.
            said: What others learn from it is put here, by micro-batch, in all ``(samples, classes)``.
        """
        engine, given = self._engine(capacity), iter(soft)

        def each(x: Floats, y: Labels, share: float) -> float:
            loss = engine.forward_backward(x, next(given, y), scale=share, loss=self.task.recipe.loss)
            if said is not None:
                said.append(_mixed(y, engine.logits, self.soft))
            return loss

        return loop.gathered(self.task, x, y, each)

    def _engine(self, capacity: int) -> Engine:
        engine = self.task.engine
        if capacity == engine.structure.capacity:
            return engine
        if capacity not in self.narrow:
            self.narrow[capacity] = self.task.apart.narrow(engine, capacity)
        return self.narrow[capacity]

    def _narrower(self, full: int) -> list[int]:
        """Draw the other widths of a step; there are none below the narrowest, to which an order may have been cut."""
        if not full:
            return []
        between = self.rng.permutation(np.arange(1, full))[: self.knobs.widths]
        return [*sorted((int(k) for k in between), reverse=True), 0]


def _knobs(recipe: Recipe) -> _Knobs:
    widths, distil, mutual = (recipe.knobs.get(name, 0.0) for name in ("widths", "distil", "mutual"))
    if widths != int(widths) or not 0 <= widths <= 64:
        raise SpecError(f"knob widths = {widths}: write a whole number from 0 to 64")
    for name, soft in (("distil", distil), ("mutual", mutual)):
        if not 0 <= soft <= 1:
            raise SpecError(f"knob {name} = {soft}: write a number from 0 to 1")
    if (distil or mutual) and recipe.loss != "cross_entropy":
        raise SpecError(f"knobs distil and mutual make targets for cross_entropy, not for {recipe.loss}")
    if distil and mutual:
        raise SpecError(f"knobs distil = {distil} and mutual = {mutual}: write 0 for one of them")
    return _Knobs(int(widths), distil, mutual)


def _lacking(y: Labels, classes: int) -> float:
    """Give the total variation between the frequencies of labels and even ones, from 0 to ``1 - 1 / classes``; 0 of none."""
    if not len(y):
        return 0.0
    odds = np.bincount(y, minlength=classes) / len(y)
    return float(np.abs(odds - 1.0 / classes).sum() / 2.0)


def _mixed(y: Labels, logits: Floats, soft: float) -> Floats:
    """Give ``(1 - soft) * one-hot(y) + soft * softmax(logits)``, shape ``(n, classes)``."""
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    mixed = odds * (soft / odds.sum(axis=1, keepdims=True))
    mixed[np.arange(len(y)), y] += 1.0 - soft
    return np.asarray(mixed, np.float32)
