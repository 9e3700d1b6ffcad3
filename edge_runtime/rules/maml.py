"""Trains weights that are good to start from: a step goes along the gradient where one step of this device's own would lead.

Per-FedAvg (Fallah, Mokhtari and Ozdaglar, "Personalized Federated Learning with Theoretical Guarantees: A Model-Agnostic
Meta-Learning Approach", NeurIPS 2020), algorithm 1: with three batches D, D' and D'' drawn apart,
``w -= beta (I - alpha H(w; D'')) grad f(w - alpha grad f(w; D); D')``, H being the matrix of second derivatives. Two
approximations of it need no second derivatives (section 5):

* first order (FO): H is left out, and with it D'';
* Hessian-free (HF): with v for the gradient that H is multiplied with,
  ``H v = (grad f(w + delta v; D'') - grad f(w - delta v; D'')) / (2 delta)``. Where f is quadratic, this is exact.

What is sent is how these steps moved the weights. Then the device makes the model its own, by plain steps of size alpha over
its samples, as whoever starts from these weights would; the engine ends with that model.

D' are the batches of every rule, in their order; D and D'' are drawn anew for each step, from a source of their own. So alpha
of 0 is the rule `sgd`. The meta-gradient is clipped, and so is that of every step of the device's own, because far from a
minimum one such step may lead anywhere; momentum and decay act on the meta-gradient.

Knobs of the recipe, whose ``rate`` is beta:

* ``alpha`` (at least 0, default 0.01): size of the device's own steps.
* ``hf`` (0 or 1, default 0): Hessian-free rather than first order.
* ``delta`` (above 0, default 0.001): how far to both sides HF looks, in lengths of v.
* ``tune`` (whole number, default 1): passes over the samples by which the model is made the device's own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from edge_runtime.engines import Update
from edge_runtime.engines.arrays import Arrays, Floats, Labels
from edge_runtime.engines.update import apply, clear, finite
from edge_runtime.rules import Extra, Held, Task, Trained, loop
from wire.errors import NonFinite, SpecError
from wire.memory import copies
from wire.messages import Recipe

__all__ = ["NEEDS_ENGINE", "copies", "train"]

NEEDS_ENGINE = True

_TUNE_MAX = 1000

Add = Callable[[int, float], float]
"""Adds a multiple of batch 0, 1 or 2's mean gradient where the weights stand, to the gradients; gives the mean loss there."""


@dataclass(frozen=True, slots=True)
class Look:
    """How far a meta-gradient looks.

    Attributes:
        alpha: Size of the step of one's own.
        delta: How far to both sides the Hessian-free correction looks; 0 for first order.
        limit: Length to which the gradient of the step of one's own is shortened; 0 for any.
    """

    alpha: float
    delta: float = 0.0
    limit: float = 0.0


@dataclass(frozen=True, slots=True)
class Spare:
    """Scratch of the weights' shapes: what they were, and for HF alone the gradient that H is multiplied with."""

    start: Arrays
    outer: Arrays


def train(task: Task) -> Trained:
    """See `edge_runtime.rules.Rule.train`.

    Memory: what was received, what the weights were, and for HF the outer gradient.

    Raises:
        SpecError: A knob makes no sense, or weights are masked.
    """
    if task.masks:
        raise SpecError("rule maml sends a meta-model's own movement; it does not train a masked one")
    look, passes, params, mover = _look(task.recipe), _passes(task.recipe), task.engine.params, loop.Mover(task)
    moves = {name: array.copy() for name, array in params.items()}
    spare = Spare(_empty(params), _empty(params) if look.delta else {})
    held = Held([*mover.held.arrays, moves, spare.start, spare.outer])
    trained = loop.run(task, _Step(task, look, spare, mover, _source(task, 2)).step, held=held)
    for name, array in moves.items():
        np.subtract(task.engine.params[name], array, out=array)
    if trained.steps:
        _own(task, look.alpha, passes, held)
    return dataclasses.replace(trained, update={name: Extra(array) for name, array in moves.items()})


def meta_gradient(
    params: Mapping[str, Floats], grads: Mapping[str, Floats], add: Add, look: Look, spare: Spare
) -> float:
    """Put the meta-gradient of one step into `grads`; see the module.

    Args:
        params: Weights, of any floating type; they are moved about, and stand where they stood in the end.
        grads: Of those weights that have any, by name; overwritten.
        add: Works on `params` and `grads`; its batches are D' (0), D (1) and D'' (2).
        look: How far.
        spare: See `Spare`.

    Returns:
        The mean loss of D' where the device's own step leads.

    Cost: two passes over a batch, four for HF.
    """
    start, outer = spare.start, spare.outer
    clear(grads)
    if not look.alpha:
        return add(0, 1.0)
    for name in grads:
        start[name][...] = params[name]
    add(1, 1.0)
    loop.clip(grads, look.limit)
    _place(params, start, grads, -look.alpha)
    clear(grads)
    loss = add(0, 1.0)
    if look.delta:
        for name, array in grads.items():
            outer[name][...] = array
        for side in (1.0, -1.0):
            _place(params, start, outer, side * look.delta)
            add(2, -side * look.alpha / (2.0 * look.delta))
    for name in grads:
        params[name][...] = start[name]
    return loss


@dataclass(frozen=True, slots=True)
class _Step:
    """What all steps of an order share."""

    task: Task
    look: Look
    spare: Spare
    mover: loop.Mover
    rng: np.random.Generator

    def step(self, x: Floats, y: Labels) -> float:
        """Make one update; D' is this batch."""
        task = self.task
        sides = [(x, y), *self._drawn()]

        def add(batch: int, factor: float) -> float:
            return _add(task, *sides[batch], factor)

        loss = meta_gradient(task.engine.params, task.engine.grads, add, self.look, self.spare)
        self.mover.apply()
        return loss

    def _drawn(self) -> list[tuple[Floats, Labels]]:
        """Draw D and D'', each without repetition."""
        task = self.task
        rows = [self.rng.permutation(len(task.x))[: task.recipe.batch] for _ in range(2)]
        return [(task.x[r], task.y[r]) for r in rows]


def _add(task: Task, x: Floats, y: Labels, factor: float) -> float:
    """Add a multiple of one batch's gradient, in micro-batches."""
    loss = 0.0
    for first in range(0, len(x), task.micro_batch):
        part = slice(first, first + task.micro_batch)
        share = loop.share_of(task.recipe, len(x[part]), len(x))
        loss += share * task.engine.forward_backward(x[part], y[part], scale=factor * share, loss=task.recipe.loss)
    return loss


def _own(task: Task, alpha: float, passes: int, held: Held) -> None:
    """Make the model the device's own: plain steps of size alpha.

    Raises:
        NonFinite: They led to weights that are no numbers.
    """
    recipe, engine, rng = task.recipe, task.engine, _source(task, 3)
    with np.errstate(over="ignore", invalid="ignore"):  # found by name at the end
        for _ in range(passes if alpha else 0):
            order = rng.permutation(len(task.x))
            for first in range(0, len(order), recipe.batch):
                loop.squeeze(task, 1.0, held)
                rows = order[first : first + recipe.batch]
                clear(engine.grads)
                _add(task, task.x[rows], task.y[rows], 1.0)
                loop.clip(engine.grads, recipe.clip)
                apply(engine.params, engine.grads, Update(alpha))
    if not finite(engine.params):
        raise NonFinite("a weight of the device's own model is no number")


def _place(params: Mapping[str, Floats], start: Arrays, along: Mapping[str, Floats], factor: float) -> None:
    """Set the weights to ``start + factor * along``, where there is an `along`."""
    for name, array in along.items():
        np.multiply(array, factor, out=params[name])
        params[name][...] += start[name]


def _source(task: Task, what: int) -> np.random.Generator:
    """Give a source of randomness apart from that of the batches (`loop.rng_of`)."""
    return np.random.default_rng([task.recipe.seed, task.round, what])


def _empty(arrays: Mapping[str, Floats]) -> Arrays:
    return {name: np.empty_like(array) for name, array in arrays.items()}


def _look(recipe: Recipe) -> Look:
    alpha, hf, delta = (
        recipe.knobs.get(name, value) for name, value in (("alpha", 0.01), ("hf", 0.0), ("delta", 1e-3))
    )
    if not 0 <= alpha < math.inf:
        raise SpecError(f"knob alpha = {alpha}: write a number, at least 0")
    if hf not in (0.0, 1.0):
        raise SpecError(f"knob hf = {hf}: write 0 (first order) or 1 (Hessian-free)")
    if not 0 < delta < math.inf:
        raise SpecError(f"knob delta = {delta}: write a number above 0")
    return Look(alpha, delta if hf else 0.0, recipe.clip)


def _passes(recipe: Recipe) -> int:
    tune = recipe.knobs.get("tune", 1.0)
    if tune != int(tune) or not 0 <= tune <= _TUNE_MAX:
        raise SpecError(f"knob tune = {tune}: write a whole number from 0 to {_TUNE_MAX}")
    return int(tune)
