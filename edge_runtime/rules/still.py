"""No training at all, for measuring what everything around the training costs.

Knob ``step`` (default 0): the update moves every weight by ``step`` times the round's number, so that every round has new
weights to publish and to fetch. Without it the update is zeros, and what a device holds already is never sent again.
"""

from __future__ import annotations

import numpy as np

from edge_runtime.engines.arrays import Floats
from edge_runtime.rules import Task, Trained
from wire.messages import Recipe

NEEDS_ENGINE = False


def update(recipe: Recipe, round_number: int, shape: tuple[int, ...]) -> Floats:
    """Give one tensor's update."""
    return np.full(shape, recipe.knobs.get("step", 0.0) * round_number, np.float32)


def copies(recipe: Recipe) -> int:
    """Hold nothing, whatever the recipe."""
    del recipe
    return 0


def train(task: Task) -> Trained:
    """Leave the weights alone."""
    del task
    return Trained(losses=(), steps=0)
