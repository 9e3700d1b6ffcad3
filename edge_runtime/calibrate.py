"""Orders of the verb ``calibrate``: what the batch norms of a width and of all narrower ones see of this device's data.

Nothing is trained. In a width's own pass every norm takes the statistics of each batch, as in training, and those of the
data are pooled from them, n being a batch's samples: ``m = sum n m_b / sum n``, ``v = sum n (v_b + m_b^2) / sum n - m^2``.
(Static batch norm of HeteroFL: Diao, Ding and Tarokh, ICLR 2021, section 3; there it is the mean of both.) So what batches
differ by counts in the variance, as it does when the coordinator pools devices by the same two lines. A batch with one entry
of each channel says nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engines import Engine
from edge_runtime.engines.arrays import Arrays, Floats
from edge_runtime.engines.update import finite
from wire.errors import NonFinite, SpecError, Unsupported
from wire.messages import Order
from wire.norms import OWN, measured, pairs
from wire.spec import Structure
from wire.structure import cut

Tell = Callable[[float, float], None]


def structure_of(order: Order) -> Structure:
    """Give the widest width that is to be calibrated.

    Raises:
        Unsupported: There are several; one stands for all narrower ones.
    """
    if len(order.structures) != 1:
        raise Unsupported(f"an order to calibrate names {len(order.structures)} widths; name the widest alone")
    return order.structures[0]


def observed(
    engine: Engine, own: Callable[[int], Arrays], x: Floats, batch: int, *, seeds: tuple[int, ...], tell: Tell
) -> Arrays:
    """Pass all samples through a width and each narrower one; give what their norms see, by name in the update.

    Args:
        engine: The loaded width, whose running statistics are moved.
        own: Gives the running statistics that a width has already, by its capacity; they stay where nothing is seen.
        x: Samples ``(n, *input_shape)``.
        batch: How many pass at a time.
        seeds: Shuffle them, so that a batch is not all of one class where the data are sorted; alike for every width.
        tell: Called after every batch with the fraction that is done, and 0.

    Raises:
        SpecError: The model has no batch norm.
        NonFinite: A statistic is no number.

    Cost: one forward pass for each width; a copy of the statistics.
    """
    spec, structure = engine.spec, engine.structure
    if not pairs(spec):
        raise SpecError(f"model {spec.name!r} has no batch norm to calibrate")
    still = measured(spec)
    received = {tensor.name: engine.params[tensor.name].copy() for tensor in still.tensors}
    found: Arrays = {}
    for capacity in range(structure.capacity + 1):
        width, share = engine, capacity / (structure.capacity + 1)
        if capacity < structure.capacity:
            narrowed = structure.narrowed(capacity)
            width = engine.narrow(narrowed, {**cut(still, received, narrowed), **own(capacity)})

        def told(done: float, loss: float, share: float = share) -> None:
            tell(share + done / (structure.capacity + 1), loss)

        seen = _seen(width, x, batch, np.random.default_rng(seeds), told)
        found |= {f"{OWN}{capacity}/{name}": array for name, array in seen.items()}
    if not finite(found):
        raise NonFinite("a statistic is no number after calibration")
    return found


def _seen(engine: Engine, x: Floats, batch: int, rng: np.random.Generator, tell: Tell) -> Arrays:
    """Pool the statistics of all batches of one width, in float64."""
    params, seen, norms = engine.params, 0, pairs(engine.spec)
    sums: dict[str, NDArray[np.float64]] = {}
    pooled: Arrays = {}
    order = rng.permutation(len(x))
    for start in range(0, len(x), batch):
        rows = order[start : start + batch]
        # A norm to which this batch says nothing leaves what it has, and so the batch does not count there.
        for name, array in pooled.items():
            params[name][...] = array
        with np.errstate(over="ignore", invalid="ignore"):
            engine.observe(x[rows], 1.0)
            seen += len(rows)
            for mean, variance in norms:
                m = params[mean].astype(np.float64)
                for name, part in ((mean, m), (variance, params[variance] + m * m)):
                    sums[name] = sums.get(name, 0.0) + len(rows) * part
                m = sums[mean] / seen
                pooled[mean] = m.astype(np.float32)
                pooled[variance] = np.maximum(sums[variance] / seen - m * m, 0.0).astype(np.float32)
        tell(seen / len(x), 0.0)
    return pooled or {name: params[name].copy() for pair in norms for name in pair}
