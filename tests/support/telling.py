"""A rule that trains as usual, and tells and keeps something as well. For tests.

Knobs: ``tell`` says of every tensor how far it moved, ``few`` at the first and the last kept place alone; ``say`` sends one
weight of ``f.weight`` instead of the update; ``fail`` ends it after so many steps.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from edge_runtime.rules import Extra, loop
from wire.masks import positions

NEEDS_ENGINE = True
PLACES = np.array([3, 20, 41], np.int64)


class Killed(BaseException):
    """The worker is no more."""


def copies(recipe):
    return 1 if recipe.momentum else 0


def train(task):
    knobs, mover, left = task.recipe.knobs, loop.Mover(task), [task.recipe.knobs.get("fail", 0)]

    def step(x, y):
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        return mover.step(x, y)

    trained = loop.run(task, step)
    orders = task.own.get("orders", np.zeros(1, np.float32)) + 1
    own = {"orders": orders, "deep/er:name-1": np.arange(6, dtype=np.float32).reshape(2, 3) * orders[0]}
    extras, said = {}, None
    if "tell" in knobs:
        lines = {name: task.engine.read(name) for name in task.engine.params}
        places = {name: positions(mask) for name, mask in task.masks.items()}
        extras = {name: Extra(line, places[name]) for name, line in lines.items() if name in places}
        extras["o.bias"] = Extra(lines["o.bias"])
    if "few" in knobs:
        extras = {"f.weight": Extra(np.array([0.25, -7.0], np.float32), np.array([0, 40], np.int64))}
    if "say" in knobs:
        said = {"f.weight": Extra(np.array([1.0, 2.0, -3.0], np.float32), PLACES)}
    return dataclasses.replace(trained, extras=extras, own=own, update=said, metrics={"orders": float(orders[0])})
