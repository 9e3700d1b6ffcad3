"""How well a model does on the device's own test data."""

from __future__ import annotations

import math

from edge_runtime.engines import Engine
from edge_runtime.engines.arrays import Floats, Labels
from wire.errors import NonFinite


def score(engine: Engine, test: tuple[Floats, Labels], batch: int) -> tuple[float, float]:
    """Give accuracy and mean cross-entropy.

    Args:
        engine: Loaded.
        test: Inputs ``(n, *input_shape)`` and labels ``(n,)``; at least one sample.
        batch: Samples at a time.

    Raises:
        NonFinite: The loss is no number: weights can be numbers all the same, where what they give is beyond float32. It
            could not be sent either.
    """
    loss, correct = engine.evaluate(*test, batch)
    if not math.isfinite(loss):
        raise NonFinite(f"the loss on the test data is {loss}")
    return correct / len(test[0]), loss / len(test[0])
