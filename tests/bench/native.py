"""Predicted against measured memory of whole orders on the native engine, from an order's files to its answer's.

``python -m tests bench native``, about half a minute. Each case is two orders, one after the other, in a copy of a warm
worker (`tests.bench.memory`), by the kernel's own account: dense, 0.4 of the channels, 0.05 of what can be masked, and both of
these. An error may be 2 % of the peak or 1 MiB, whichever is more, and no bound may be exceeded.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

from tests.bench import Row, outcome
from tests.bench.memory import KINDS, UPDATES, Case, case_rows, grid

SHARE, LEAST = 0.02, 1 << 20
MODELS = (
    ("lenet-300-100", 20),
    ("lenet-5", 20),
    ("digits-cnn", 32),
    ("conv-2", 8),
    ("conv-2", 32),
    ("resnet-18", 1),
    ("resnet-18", 4),
)


def run() -> dict[str, object]:
    """Measure and give the result in the bench shape."""
    cases = [
        Case(model, batch, kind, update, "native", 0.05)
        for (model, batch), kind, update in itertools.product(MODELS, (*KINDS, "both"), UPDATES)
    ]
    rows, used = [], dict[str, float]()
    with tempfile.TemporaryDirectory() as place:
        for case, found, peak in grid(Path(place), cases):
            rows += case_rows(case.name, found, peak, (SHARE, LEAST))
            error = abs(found.peak - peak) / max(SHARE * peak, LEAST)
            used[case.kind] = max(used.get(case.kind, 0.0), error)
    rows += [Row(kind, "largest error, of what is allowed", most, "of it", "lower", 1.0) for kind, most in used.items()]
    shares = [row.value / row.target for row in rows if row.measure == "peak" and row.target is not None]
    rows.append(Row("all", "largest share of a bound that was used", max(shares), "of the bound", "lower", 1.0))
    return outcome("native", rows)
