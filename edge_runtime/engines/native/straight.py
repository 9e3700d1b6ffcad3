"""Training steps of a model that is one stretch of sparse layers: one crossing into the compiled core for all of a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import numpy as np

from edge_runtime.engines.arrays import Floats, Labels
from edge_runtime.engines.masks import Wires
from edge_runtime.kernels import Stretch
from edge_runtime.kernels.stretch import NativeStretch
from wire.errors import DataError
from wire.messages import Loss
from wire.spec import ModelSpec


def whole(spec: ModelSpec, stretches: Mapping[tuple[int, int], Stretch]) -> NativeStretch | None:
    """Give the stretch that is the whole model, but for a flatten before it; None where there is none.

    Args:
        spec: The model.
        stretches: By the places of their first and last node.
    """
    if len(stretches) != 1:
        return None
    ((first, last), stretch), *_ = stretches.items()
    before = {node.op for node in spec.nodes[:first]}
    if last != len(spec.nodes) - 1 or before - {"flatten"} or not isinstance(stretch, NativeStretch):
        return None
    return stretch


def learn(
    stretch: NativeStretch, wires: Wires, x: Floats, y: Labels | Floats, goal: tuple[Loss, float]
) -> tuple[Floats, float] | None:
    """Do a training step, where the loss is one that the core has: cross-entropy with labels.

    Args:
        stretch: As `whole` gives it.
        wires: Where gradients go.
        x: Inputs ``(n, *input_shape)``.
        y: Labels ``(n,)`` or distributions ``(n, classes)``.
        goal: The loss, and the scale of its gradient.

    Returns:
        Logits, and the loss, not scaled; None where it is to be done step by step.

    Raises:
        DataError: There are not as many labels as inputs, or one is no class.
    """
    loss, scale = goal
    if loss != "cross_entropy" or y.dtype != np.int64 or y.ndim != 1 or len(stretch.out_shape) != 1:
        return None
    if len(y) != len(x):
        raise DataError(f"{len(y)} labels for {len(x)} inputs")
    update = wires.update[0] if wires.update else None
    watch = wires.watch[0] if wires.watch else None
    x = x.reshape(len(x), *stretch.in_shape)
    return stretch.learn(x, cast("Labels", y), scale, (None if update is not None else wires.grads, update, watch))
