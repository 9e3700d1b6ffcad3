"""How fast this device is, next to the core that `wire.effort` counts with: from the layers that its workers have timed.

Workers time layers that are masked, dense and sparse (`edge_runtime.kernels.choose`), and keep what they took in a file. The
dense ones say what the same layers should have taken by `wire.effort`. Light: no numpy, since `edge-runtime plan` reads it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path
from statistics import median
from typing import Any

from wire import effort

_BYTES_MAX = 1 << 20
_KEY = re.compile(r" t(\d+) (?:linear|conv2d) ")


@dataclass(frozen=True, slots=True)
class Speed:
    """What was found.

    Attributes:
        factor: Seconds here for one that `wire.effort` predicts.
        layers: How many timed layers say so.
    """

    factor: float
    layers: int


def known(path: Path, threads: int) -> Speed | None:
    """Read what layers took here with so many threads; None where nothing was timed, or the file cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(_BYTES_MAX + 1)
        entries = json.loads(data)["entries"] if len(data) <= _BYTES_MAX else {}
        found = list(_ratios(entries, threads))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError, RecursionError):
        return None
    return Speed(median(found), len(found)) if found else None


def _ratios(entries: Mapping[str, Any], threads: int) -> Iterator[float]:
    for key, entry in entries.items():
        said = _KEY.search(key)
        took = float(entry["seconds"].get("dense", 0.0))
        if said is None or int(said[1]) != threads or "layer" not in entry or not isfinite(took) or took <= 0.0:
            continue
        expected = _expected(entry["layer"])
        if expected > 0.0 and isfinite(took / expected):
            yield took / expected


def _expected(layer: Mapping[str, Any]) -> float:
    """Give what `wire.effort` says of a training step of one layer alone."""
    shape, before, batch = [int(n) for n in layer["shape"]], [int(n) for n in layer["input_shape"]], int(layer["batch"])
    after = [shape[0]]
    if layer["op"] == "conv2d":
        padding, stride = (int(n) for n in layer["details"][-2:])
        after += [
            (side + 2 * padding - kernel) // stride + 1 for side, kernel in zip(before[1:], shape[2:], strict=True)
        ]
    values = prod(before) + prod(after)
    there, back = effort.of_node(layer["op"], tuple(after), {"weight": tuple(shape)}, values)
    alone = effort.Effort(there, back, prod(shape) * effort.UNIT)
    return alone.step(batch, batch) if layer["input_gradient"] else alone.step(batch, batch) - batch * alone.forward[0]
