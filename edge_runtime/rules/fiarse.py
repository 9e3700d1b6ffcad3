"""SGD on a masked model whose gradient also says how much each weight matters for being kept.

FIARSE (Wu et al., "FIARSE: Model-Heterogeneous Federated Learning via Importance-Aware Submodel Extraction", NeurIPS 2024): a
size of the model keeps the weights of magnitude ``threshold`` or more, so that magnitude is importance, and learning may move
a weight over the threshold. The mask is not differentiable; in its place stands a smooth function of the same threshold, which
makes the gradient of a kept weight w ``g (1 + 2 threshold |w| / (|w| + threshold)^2)``: between 1 and 1.5 times g, most where
``|w| = threshold``. Weights that are not kept have none. Weights without masks (biases, norms) have the plain gradient.

The mask is the order's, and stands for the whole order: a weight that falls below the threshold in between stays in, and the
next round decides. The factor multiplies the gradient before clipping, momentum and decay.

Knob of the recipe: ``threshold`` (at least 0, default 0, which makes it plain SGD).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edge_runtime.engines.arrays import Floats, Labels
from edge_runtime.engines.update import BLOCK
from edge_runtime.rules import Task, Trained, loop
from wire.errors import SpecError
from wire.memory import copies

__all__ = ["NEEDS_ENGINE", "copies", "train"]

NEEDS_ENGINE = True


def train(task: Task) -> Trained:
    """See `edge_runtime.rules.Rule.train`. Gradients are held throughout, because they are changed before weights move.

    Raises:
        SpecError: The knob makes no sense.
    """
    threshold = task.recipe.knobs.get("threshold", 0.0)
    if not 0.0 <= threshold < np.inf:
        raise SpecError(f"knob threshold = {threshold}: write a number, at least 0")
    mover, params, grads = loop.Mover(task), task.engine.params, task.engine.grads

    def whole() -> None:
        if threshold:
            scale(params, grads, task.masks, threshold)

    def step(x: Floats, y: Labels) -> float:
        return mover.step(x, y, whole=whole)

    return loop.run(task, step)


def scale(
    params: Mapping[str, Floats], grads: Mapping[str, Floats], names: Mapping[str, object], threshold: float
) -> None:
    """Multiply gradients by ``1 + 2 threshold |w| / (|w| + threshold)^2``, of the tensors that are named.

    Args:
        params: Weights, contiguous.
        grads: Their gradients, in the same order; changed in place.
        names: Has the tensors' names as keys.
        threshold: Above 0.

    Cost: one pass in blocks.
    """
    for name in names:
        weights, gradient = params[name].reshape(-1), grads[name].reshape(-1)
        for start in range(0, weights.size, BLOCK):
            magnitude = np.abs(weights[start : start + BLOCK])
            factor = magnitude + np.float32(threshold)
            np.divide(magnitude, factor, out=magnitude)
            np.divide(np.float32(2.0 * threshold), factor, out=factor)  # never squared: tiny numbers would vanish
            factor *= magnitude
            factor += np.float32(1.0)
            gradient[start : start + BLOCK] *= factor
