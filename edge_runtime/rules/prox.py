"""SGD that is drawn back to the weights that it began with, so that devices with uneven data drift apart less.

FedProx (Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020), equation 2: the local objective is
``F(w) + (mu / 2) |w - w_t|^2``, whose gradient is that of F and ``mu (w - w_t)``, w_t being the weights that were received.
The pull is added after clipping, as decay is, so that no gradient is too large to be drawn back from.

Knob of the recipe: ``mu`` (at least 0, default 0). With 0 it is the rule `sgd`, to the bit, and nothing is held beside.
"""

from __future__ import annotations

import dataclasses

from edge_runtime.rules import Task, Trained, loop
from wire.errors import SpecError
from wire.memory import copies

__all__ = ["NEEDS_ENGINE", "copies", "train"]

NEEDS_ENGINE = True


def train(task: Task) -> Trained:
    """See `edge_runtime.rules.Rule.train`. Memory: one copy of the weights, which is cut along with them.

    Raises:
        SpecError: The knob makes no sense.
    """
    mu, mover = task.recipe.knobs.get("mu", 0.0), loop.Mover(task)
    if mu < 0:
        raise SpecError(f"knob mu = {mu}: write a number, at least 0")
    held = mover.held
    if mu:
        anchor = {name: array.copy() for name, array in task.engine.params.items()}
        mover.update = dataclasses.replace(mover.update, pull=mu, anchor=anchor)
        held = dataclasses.replace(held, arrays=[*held.arrays, anchor])
    return loop.run(task, mover.step, held=held)
