"""Orders of the verb ``calibrate``: what a width's batch norms see of this device's data, and no training.

In a width's own pass every norm takes the statistics of each batch, as in training, and the running ones become the mean of
these over all batches, each weighed by its samples (the cumulative average of torch's batch norm without momentum; static
batch norm of HeteroFL: Diao, Ding and Tarokh, ICLR 2021, section 3). The answer is an update of the running statistics
alone, new minus received; everything else in the model did not move. A batch with one entry of each channel says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from edge_runtime.engines import Engine
from edge_runtime.engines.arrays import Arrays, Floats
from edge_runtime.engines.update import finite
from wire.errors import NonFinite, SpecError, Unsupported
from wire.messages import Order
from wire.spec import Structure, statistics


def structure_of(order: Order) -> Structure:
    """Give the width that is to be calibrated.

    Raises:
        Unsupported: There are several; an update is of one.
    """
    if len(order.structures) != 1:
        raise Unsupported(f"an order to calibrate {len(order.structures)} widths; send one for each")
    return order.structures[0]


def observed(
    engine: Engine, x: Floats, batch: int, rng: np.random.Generator, tell: Callable[[float, float], None]
) -> Arrays:
    """Pass all samples through a model once, in batches drawn by `rng`; give by how much running statistics moved.

    Args:
        engine: The loaded width, whose running statistics are moved.
        x: Samples ``(n, *input_shape)``.
        batch: How many pass at a time.
        rng: Shuffles them, so that a batch is not all of one class where the data are sorted.
        tell: Called after every batch with the fraction that is done, and 0.

    Raises:
        SpecError: The model has no batch norm.
        NonFinite: A statistic is no number.

    Cost: one forward pass; a copy of the statistics.
    """
    names = [tensor.name for tensor in engine.spec.tensors if tensor.name in statistics(engine.spec)]
    if not names:
        raise SpecError(f"model {engine.spec.name!r} has no batch norm to calibrate")
    received = {name: engine.params[name].copy() for name in names}
    order, seen = rng.permutation(len(x)), 0
    for start in range(0, len(x), batch):
        rows = order[start : start + batch]
        seen += len(rows)
        with np.errstate(over="ignore", invalid="ignore"):
            engine.observe(x[rows], len(rows) / seen)
        tell(seen / len(x), 0.0)
    return _moves(engine.params, received)


def _moves(params: Mapping[str, Floats], received: Arrays) -> Arrays:
    moves = {name: params[name] - array for name, array in received.items()}
    if not finite(moves):
        raise NonFinite("a statistic is no number after calibration")
    return moves
