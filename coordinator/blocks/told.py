"""What devices told of how much weights matter, joined: a lower and an upper bound of the sum over devices.

A device that tells its largest values only also tells ``theta``, which no other value of that tensor exceeds (see the rule
`importance`). What it is silent about lies between 0 and theta.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordinator.algorithm import Answer, Answers

_MOST = np.float32(1e30)
"""The most that is believed, so that no sum of it overflows whatever a device says."""


@dataclass(frozen=True, slots=True)
class Told:
    """Sums of ``n_k z_k`` over the devices k that told anything, n being their samples.

    Attributes:
        lower: By tensor, float32 in one line; silence counts as 0.
        upper: By tensor; silence counts as theta. The same arrays where nobody was silent.
        rest: The sum over what is no tensor here (biases).
        devices: How many told.
    """

    lower: Mapping[str, NDArray[np.float32]]
    upper: Mapping[str, NDArray[Any]]
    rest: float
    devices: int


def told(answers: Answers | Iterable[Answer], sizes: Mapping[str, int]) -> Told:
    """Join a round's answers; those without any theta told nothing and are passed over.

    Args:
        answers: The round's.
        sizes: Weights of each tensor.

    Cost: one line of float32 for each tensor, and one of float64 where somebody was silent about some of it.
    """
    lower = {name: np.zeros(size, np.float32) for name, size in sizes.items()}
    silent: dict[str, NDArray[np.float64]] = {}
    rest, devices = 0.0, 0
    for answer in answers:
        if not answer.samples or not any(name.startswith("theta.") for name in answer.metrics):
            continue
        devices += 1
        rest = min(rest + answer.samples * max(0.0, answer.metrics.get("rest", 0.0)), float(_MOST))
        for name, size in sizes.items():
            places, values = answer.extras.get(name, (np.empty(0, np.int64), np.empty(0, np.float32)))
            with np.errstate(over="ignore"):
                told_here = np.float32(answer.samples) * np.maximum(values, np.float32(0.0))
                lower[name][places] = np.minimum(lower[name][places] + told_here, _MOST)
            bound = min(answer.samples * max(0.0, answer.metrics.get(f"theta.{name}", 0.0)), float(_MOST))
            if bound and len(places) < size:
                line = silent.setdefault(name, np.zeros(size))
                heard = line[places]
                line += bound
                line[places] = heard
    upper = {name: line + silent[name] if name in silent else line for name, line in lower.items()}
    return Told(lower, upper, rest, devices)
