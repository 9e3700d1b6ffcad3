"""What rules share: the batches of an order, one ordinary update, and the loop around them that finds what runs away."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from edge_runtime.engines import Update
from edge_runtime.engines.arrays import Floats, Labels
from edge_runtime.engines.update import Adam, apply, apply_adam, clear, finite, multiply, norm
from edge_runtime.kernels import Watch
from edge_runtime.rules import Held, Task, Trained
from wire.errors import NonFinite
from wire.memory import holds_gradients
from wire.messages import Recipe

Step = Callable[[Floats, Labels], float]
Each = Callable[[Floats, Labels, float], float]
"""Adds the gradients of a micro-batch, given how much it counts, and gives its mean loss."""


def rng_of(task: Task) -> np.random.Generator:
    """Give the source of all randomness of an order: of the recipe's seed and the round alone."""
    return np.random.default_rng([task.recipe.seed, task.round])


def count_steps(task: Task) -> int:
    """Count the batches that the recipe asks for; none without samples."""
    if not len(task.x):
        return 0
    return task.recipe.steps or task.recipe.epochs * -(-len(task.x) // task.recipe.batch)


def share_of(recipe: Recipe, samples: int, batch: int) -> float:
    """Give how much a micro-batch's loss and gradient count in those of its batch: means by their samples, sums in full."""
    return 1.0 if recipe.loss == "sum" else samples / batch


def gathered(task: Task, x: Floats, y: Labels, each: Each) -> float:
    """Clear the engine's gradients, have those of each micro-batch of one batch added, and give the batch's mean loss."""
    clear(task.engine.grads)
    clear(task.apart.grads)
    loss = 0.0
    for start in range(0, len(x), task.micro_batch):
        part = slice(start, start + task.micro_batch)
        share = share_of(task.recipe, len(x[part]), len(x))
        loss += share * each(x[part], y[part], share)
    return loss


def batches(task: Task, rng: np.random.Generator | None = None) -> Iterator[Labels]:
    """Yield the sample numbers of every batch: shuffled passes, each to its end, until there are as many as asked for."""
    rng = rng or rng_of(task)
    left = count_steps(task)
    while left > 0:
        order = rng.permutation(len(task.x))
        for start in range(0, len(order), task.recipe.batch):
            if left > 0:
                yield order[start : start + task.recipe.batch]
            left -= 1


def run(task: Task, step: Step, rng: np.random.Generator | None = None, held: Held | None = None) -> Trained:
    """Call `step` for every batch and tell of progress.

    Args:
        task: The order.
        step: Makes one update from a batch and gives its mean loss.
        rng: Where `step` draws from the same source as the batches do.
        held: All that the rule holds of the weights between two steps, if it can go on with a narrower width.

    Returns:
        The mean loss of each pass, the last of which may be short.

    Raises:
        NonFinite: A loss, or a weight at the end, is no number.
        BudgetExceeded: Memory has become less than even the narrowest width takes.
    """
    total, steps, passed, seen, losses = count_steps(task), 0, 0.0, 0, []
    with np.errstate(over="ignore", invalid="ignore"):  # what runs away is found by name, at every step and at the end
        for rows in batches(task, rng):
            if held is not None:
                squeeze(task, steps / total, held)
            loss = step(task.x[rows], task.y[rows])
            steps += 1
            if not math.isfinite(loss):
                raise NonFinite(f"the loss of step {steps} is {loss}")
            passed, seen = passed + loss * len(rows), seen + len(rows)
            if seen >= len(task.x) or steps == total:
                losses.append(passed / seen)
                passed, seen = 0.0, 0
            task.tell(steps / total, loss)
        if not finite(task.engine.params) or not finite(task.apart.params):
            raise NonFinite("a weight is no number after training")
    return Trained(tuple(losses), steps)


def squeeze(task: Task, done: float, held: Held) -> None:
    """Let an order be cut between two batches; `held` is all that its rule holds of the weights there.

    Raises:
        BudgetExceeded: Memory has become less than even the narrowest width takes.
    """
    task.micro_batch = task.squeeze(done, held) or task.micro_batch


class Mover:
    """Makes ordinary updates by the recipe, and holds what that takes from one to the next."""

    __slots__ = ("_adam", "_task", "held", "update")

    def __init__(self, task: Task) -> None:
        """Nothing has moved yet. Memory: momentum is one copy of the trained weights, Adam two."""
        recipe, params = task.recipe, task.engine.params
        self._task = task
        self._adam = Adam(_zeros(params), _zeros(params)) if recipe.knobs.get("adam") else None
        velocity = _zeros(params) if recipe.momentum and self._adam is None else None
        momentum = 0.0 if velocity is None else recipe.momentum
        self.update = Update(recipe.rate, momentum, recipe.decay, velocity=velocity)
        self.held = Held([] if velocity is None else [velocity], apart=task.apart)
        if self._adam is not None:
            self.held = Held([self._adam.first, self._adam.second], apart=task.apart)

    def step(self, x: Floats, y: Labels, watch: Watch | None = None, whole: Callable[[], None] | None = None) -> float:
        """Move the weights by the mean loss of one batch, in micro-batches; gives that loss before the move.

        Without clipping, Adam and micro-batches the engine applies the update within its backward pass.

        Args:
            x: Inputs.
            y: Labels.
            watch: Shown what passes through masked layers.
            whole: Called when the gradients are whole and not yet clipped; but not where the engine applies the update.
        """
        task, recipe = self._task, self._task.recipe
        if not holds_gradients(recipe, task.micro_batch):
            return task.engine.forward_backward(x, y, update=self.update, watch=watch, loss=recipe.loss)

        def each(x: Floats, y: Labels, share: float) -> float:
            return task.engine.forward_backward(x, y, scale=share, watch=watch, loss=recipe.loss)

        loss = gathered(task, x, y, each)
        if whole is not None:
            whole()
        self.apply()
        return loss

    def apply(self) -> None:
        """Clip the engine's gradients and move the weights along them, and what narrower widths have of their own with them.

        Raises:
            NonFinite: They have no length.
        """
        task, params, grads = self._task, self._task.engine.params, self._task.engine.grads
        if task.apart.params:
            params, grads = {**params, **task.apart.params}, {**grads, **task.apart.grads}
            for arrays in self.held.arrays:  # of widths that have come up since
                arrays.update(_zeros({n: array for n, array in task.apart.params.items() if n not in arrays}))
        clip(grads, task.recipe.clip)
        if self._adam is None:
            apply(params, grads, self.update)
        else:
            apply_adam(params, grads, self.update, self._adam)


def clip(grads: Mapping[str, Floats], limit: float) -> None:
    """Shorten gradients to the Euclidean length `limit`, all by one factor; 0 for any length.

    Raises:
        NonFinite: They have no length.
    """
    if not limit:
        return
    length = norm(grads)
    if not math.isfinite(length):
        raise NonFinite("the gradient is no number any more")
    if length > limit:
        multiply(grads, limit / length)


def _zeros(arrays: Mapping[str, Floats]) -> dict[str, Floats]:
    return {name: np.zeros(array.shape, np.float32) for name, array in arrays.items()}
