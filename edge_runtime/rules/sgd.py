"""Plain SGD with momentum, weight decay and clipping, optionally over several nested widths per step.

Knobs of the recipe:

* ``widths`` (whole number, default 0): with n > 0 every step also trains the narrowest width of the structure and n
  random ones between, each from the same batch; the gradients of all are averaged and applied once. It keeps the narrow
  widths good where only the wide one is asked for (the sandwich rule of slimmable networks, Yu and Huang, ICCV 2019).
* ``distil`` (0 to 1, default 0): share of the soft part in the narrower widths' target, which is the full width's
  softmax output taken as a constant; the labels keep the rest (in-place distillation of the same paper). Cross-entropy
  is linear in its target, so that the mixed target is the mixed loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from edge_runtime.engines import Engine, Update
from edge_runtime.engines.arrays import Floats, Labels
from edge_runtime.engines.update import apply, clear, finite, multiply, norm
from edge_runtime.rules import Task, Trained
from wire.errors import NonFinite, SpecError
from wire.memory import holds_gradients
from wire.messages import Recipe

NEEDS_ENGINE = True


def copies(recipe: Recipe) -> int:
    """Momentum is one copy of the weights."""
    return 1 if recipe.momentum else 0


def train(task: Task) -> Trained:
    """See `edge_runtime.rules.Rule.train`. The batch order depends on the recipe's seed and the round alone."""
    with np.errstate(over="ignore", invalid="ignore"):  # what runs away is found by name, at every step and at the end
        return _epochs(task)


def _epochs(task: Task) -> Trained:
    recipe, count = task.recipe, len(task.x)
    rng = np.random.default_rng([recipe.seed, task.round])
    if not count:
        return Trained((), 0)
    run = _Run(task, _knobs(recipe), _update(task))
    per_epoch = -(-count // recipe.batch)
    losses, steps = [], 0
    for _ in range(recipe.epochs):
        total = 0.0
        for rows in _batches(rng, count, recipe.batch):
            loss = run.step(rng, task.x[rows], task.y[rows])
            if not math.isfinite(loss):
                raise NonFinite(f"the loss of step {steps + 1} is {loss}")
            total += loss * len(rows)
            steps += 1
            task.tell(steps / (per_epoch * recipe.epochs), loss)
        losses.append(total / count)
    if not finite(task.engine.params):
        raise NonFinite("a weight is no number after training")
    return Trained(tuple(losses), steps)


@dataclass(frozen=True, slots=True)
class _Knobs:
    widths: int
    distil: float


@dataclass(frozen=True, slots=True)
class _Run:
    """What all steps of one order share."""

    task: Task
    knobs: _Knobs
    update: Update
    narrow: dict[int, Engine] = field(default_factory=dict)

    def step(self, rng: np.random.Generator, x: Floats, y: Labels) -> float:
        """Make one update from one batch; give the full width's mean loss."""
        task, count = self.task, len(x)
        if not holds_gradients(task.recipe, task.micro_batch):
            return task.engine.forward_backward(x, y, update=self.update)
        grads = task.engine.grads
        clear(grads)
        others = self._widths(rng)
        loss = 0.0
        for start in range(0, count, task.micro_batch):
            part = slice(start, start + task.micro_batch)
            share = len(x[part]) / count
            loss += share * self._pass(x[part], y[part], others, share / (1 + len(others)))
        _clip(grads, task.recipe.clip)
        apply(task.engine.params, grads, self.update)
        return loss

    def _pass(self, x: Floats, y: Labels, others: list[int], scale: float) -> float:
        engine = self.task.engine
        loss = engine.forward_backward(x, y, scale=scale)
        target = _mixed(y, engine.logits, self.knobs.distil) if others and self.knobs.distil else y
        for capacity in others:
            if capacity not in self.narrow:
                self.narrow[capacity] = engine.narrow(engine.structure.narrowed(capacity))
            self.narrow[capacity].forward_backward(x, target, scale=scale)
        return loss

    def _widths(self, rng: np.random.Generator) -> list[int]:
        top = self.task.engine.structure.capacity
        if not self.knobs.widths or not top:
            return []
        between = rng.permutation(np.arange(1, top))[: self.knobs.widths]
        return [*sorted((int(k) for k in between), reverse=True), 0]


def _knobs(recipe: Recipe) -> _Knobs:
    widths, distil = recipe.knobs.get("widths", 0.0), recipe.knobs.get("distil", 0.0)
    if widths != int(widths) or not 0 <= widths <= 64:
        raise SpecError(f"knob widths = {widths}: write a whole number from 0 to 64")
    if not 0 <= distil <= 1:
        raise SpecError(f"knob distil = {distil}: write a number from 0 to 1")
    return _Knobs(int(widths), distil)


def _update(task: Task) -> Update:
    recipe = task.recipe
    velocity: Mapping[str, Floats] | None = None
    if recipe.momentum:
        velocity = {name: np.zeros(array.shape, np.float32) for name, array in task.engine.params.items()}
    return Update(recipe.rate, recipe.momentum, recipe.decay, velocity=velocity)


def _batches(rng: np.random.Generator, count: int, batch: int) -> Iterator[Labels]:
    order = rng.permutation(count)
    for start in range(0, count, batch):
        yield order[start : start + batch]


def _clip(grads: Mapping[str, Floats], limit: float) -> None:
    if not limit:
        return
    length = norm(grads)
    if not math.isfinite(length):
        raise NonFinite("the gradient is no number any more")
    if length > limit:
        multiply(grads, limit / length)


def _mixed(y: Labels, logits: Floats, soft: float) -> Floats:
    """Give ``(1 - soft) * one-hot(y) + soft * softmax(logits)``, shape ``(n, classes)``."""
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    mixed = odds * (soft / odds.sum(axis=1, keepdims=True))
    mixed[np.arange(len(y)), y] += 1.0 - soft
    return np.asarray(mixed, np.float32)
