"""SGD that pulls whole channels towards zero: cross-entropy plus a group lasso over output and input channels.

PruneTrain (Lym et al., SC 2019), equations 1 to 3: ``loss + lambda sum_l (sum_k |W_l[k, :]| + sum_c |W_l[:, c]|)`` with
Euclidean lengths. Its gradient is ``lambda W (1 / |W[k, :]| + 1 / |W[:, c]|)``, and 0 where a channel is zero. What enters
the first weight (the samples) and what leaves the last (the classes) is not pulled, because it cannot be removed. Behind a
flatten every place of a channel counts as a channel here; whether one is gone is decided over all of them.

Knobs of the recipe:

* ``lambda`` (at least 0, default 0): the strength. With 0 this device settles it from its first batch, so that the penalty is
  ``share`` of the whole loss there.
* ``share`` (0 to below 1, default 0): see above.

The reply's metrics say ``lambda`` and ``penalty``: the strength, and the sum that it multiplied before the first step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from edge_runtime.engines.arrays import Floats, Labels
from edge_runtime.engines.update import clear
from edge_runtime.rules import Task, Trained, loop
from wire.errors import SpecError
from wire.memory import copies

__all__ = ["NEEDS_ENGINE", "copies", "train"]

NEEDS_ENGINE = True

_BLOCK = 1 << 16


def train(task: Task) -> Trained:
    """See `edge_runtime.rules.Rule.train`. Gradients are held throughout, because the penalty's are added to them.

    Raises:
        SpecError: A knob makes no sense, or weights are masked.
    """
    if task.masks:
        raise SpecError("rule grouplasso takes lengths of whole channels; it does not train a masked model")
    strength, share = task.recipe.knobs.get("lambda", 0.0), task.recipe.knobs.get("share", 0.0)
    if strength < 0:
        raise SpecError(f"knob lambda = {strength}: write a number, at least 0")
    if not 0 <= share < 1:
        raise SpecError(f"knob share = {share}: write a number from 0 to below 1")
    pulled = _Pulled(task, loop.Mover(task), strength, share, penalty(task.engine.params))
    trained = loop.run(task, pulled.step)
    metrics = {"lambda": pulled.strength, "penalty": pulled.penalty} if trained.steps else {}
    return dataclasses.replace(trained, metrics=metrics)


def strength_of(share: float, loss: float, lengths: float) -> float:
    """Give lambda for which the penalty is `share` of the whole loss: ``share / (1 - share) loss / lengths``."""
    return share / (1.0 - share) * loss / lengths if lengths > 0.0 else 0.0


def penalty(params: Mapping[str, Floats]) -> float:
    """Sum the lengths of all channels that are pulled. Cost: one pass over the weights."""
    return sum(float(rows.sum() + columns.sum()) for _, rows, columns in _lengths(params))


def add_pull(params: Mapping[str, Floats], grads: Mapping[str, Floats], strength: float) -> None:
    """Add ``strength`` times the penalty's gradient to `grads`. Cost: two passes over the weights, in blocks of rows."""
    for name, rows, columns in _lengths(params):
        weight, grad = _cube(params[name]), _cube(grads[name])
        by_row, by_column = (_inverse(lengths, strength) for lengths in (rows, columns))
        step = max(1, _BLOCK // (weight.shape[1] * weight.shape[2]))
        for first in range(0, len(weight), step):
            part = slice(first, first + step)
            factor = by_row[part, None, None] + by_column[None, :, None]
            grad[part] += factor * weight[part]


class _Pulled:
    """What all steps of one order share."""

    __slots__ = ("_mover", "_share", "_task", "penalty", "strength")

    def __init__(self, task: Task, mover: loop.Mover, strength: float, share: float, lengths: float) -> None:
        self._task = task
        self._mover = mover
        self._share = share
        self.strength = strength
        self.penalty = lengths

    def step(self, x: Floats, y: Labels) -> float:
        """Make one update from one batch; give its loss without the penalty."""
        task, engine = self._task, self._task.engine
        clear(engine.grads)
        loss, count = 0.0, len(x)
        for start in range(0, count, task.micro_batch):
            rows = slice(start, start + task.micro_batch)
            weight = loop.share_of(task.recipe, len(x[rows]), count)
            loss += weight * engine.forward_backward(x[rows], y[rows], scale=weight, loss=task.recipe.loss)
        if not self.strength:
            self.strength = strength_of(self._share, loss, self.penalty)
        add_pull(engine.params, engine.grads, self.strength)
        self._mover.apply()
        return loss


def _lengths(params: Mapping[str, Floats]) -> list[tuple[str, Floats, Floats]]:
    """Give for each weight its name and the lengths of its output and its input channels, zeros for what is not pulled."""
    names = [name for name, array in params.items() if array.ndim > 1]
    found = []
    for name in names:
        cube = _cube(params[name])
        rows, columns = np.zeros(cube.shape[0]), np.zeros(cube.shape[1])
        step = max(1, _BLOCK // (cube.shape[1] * cube.shape[2]))
        for first in range(0, len(cube), step):
            squares = np.square(cube[first : first + step]).sum(axis=2)
            rows[first : first + step] = squares.sum(axis=1, dtype=np.float64)
            columns += squares.sum(axis=0, dtype=np.float64)
        rows *= name != names[-1]
        columns *= name != names[0]
        found.append((name, np.sqrt(rows).astype(np.float32), np.sqrt(columns).astype(np.float32)))
    return found


def _inverse(lengths: Floats, strength: float) -> Floats:
    """Give ``strength / length``, and 0 where there is none."""
    return np.divide(np.float32(strength), lengths, out=np.zeros_like(lengths), where=lengths > 0)


def _cube(array: Floats) -> Floats:
    """View a weight as (outputs, inputs, kernel)."""
    return array.reshape(array.shape[0], array.shape[1], -1)
