"""What deciding on a mask costs: PruneFL's algorithm 2 and its relatives on a model of 6.6 million weights.

`python -m tests bench prune --json`. Importance, time per weight and the protected part are drawn as they are in a run of
Conv-2: importance spread over orders of magnitude, the published seconds of a Raspberry Pi 4, half of the weights kept.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from coordinator.blocks.importance import Base, Layer, protected, solve, stopped, undecided
from coordinator.blocks.masks import top_global
from tests.bench import Row, machine, outcome
from wire import zoo
from wire.masked import maskable
from wire.spec import Structure, tensor_shapes

SECONDS = (0.0, 7.10e-6, 1.93e-7, 1.78e-7)
CONSTANT = 6.2465
CAPS = (None, 2_000_000, 200_000)
TIMES = 5
MIB = 1 << 20


def layers() -> list[Layer]:
    """Draw the layers of Conv-2."""
    rng = np.random.default_rng(0)
    spec = zoo.by_name("conv-2")
    shapes = tensor_shapes(spec, Structure())
    found = []
    for name, seconds in zip(maskable(spec), SECONDS, strict=True):
        size = int(np.prod(shapes[name]))
        kept = rng.random(size) < 0.5
        weights = rng.standard_normal(size).astype(np.float32) * kept
        importance = (rng.standard_normal(size) ** 2 * rng.lognormal(0, 2, size)).astype(np.float32)
        fixed = protected(weights, kept, 0.3)
        found.append(Layer(importance, fixed, ~fixed, seconds))
    return found


def run() -> dict[str, Any]:
    """Time everything that a reconfiguration decides."""
    found, base = layers(), Base(CONSTANT)
    uppers = [layer.importance for layer in found]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = []
    for cap in CAPS:
        case = "no cap" if cap is None else f"at most {cap:,} beside the protected"
        chosen = solve(found, base, cap)
        rows.append(Row(case, "solve", _median(lambda cap=cap: solve(found, base, cap)), "s", "lower", 1.0))
        rows.append(Row(case, "passes", chosen.passes, "", "lower"))
        again = _median(lambda cap=cap, chosen=chosen: undecided(found, uppers, base, chosen, cap))
        rows.append(Row(case, "certificate", again, "s", "lower", 1.0))
    rows.append(
        Row("at most 200,000", "paper's sorted pass", _median(lambda: stopped(found, base, 200_000), 2), "s", "lower")
    )
    scores = {str(place): layer.importance for place, layer in enumerate(found)}
    rows.append(
        Row("660,000 of all", "largest of all layers", _median(lambda: top_global(scores, 660_000)), "s", "lower")
    )
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    rows.append(Row("all of these", "memory beside the layers", grown, "MiB", "lower"))
    return outcome("prune", rows, machine())


def _median(work: Callable[[], object], times: int = TIMES) -> float:
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)
