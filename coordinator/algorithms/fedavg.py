"""FedAvg: every device trains the whole model; the mean of their updates, weighted by samples, is added to it.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017, algorithm 1.
A device whose memory cannot hold the whole model, not even with one sample at a time, is not asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from coordinator.algorithm import About, Answer, Answers, Arrays, DeviceView, Draft, State
from coordinator.blocks.fixed import TRAINING, ask_to_train, joined, recipe_at
from coordinator.recipes import merged
from wire.spec import ModelSpec

ABOUT = About("McMahan et al., AISTATS 2017", "baseline", "tests/unit/test_fedavg.py")
PARAMS = TRAINING
"""Names of all parameters with their defaults."""


def init(spec: ModelSpec, weights: Arrays, params: Mapping[str, float | str]) -> State:
    """See `coordinator.algorithm.Algorithm.init`."""
    known = merged(PARAMS, params)
    recipe_at(known, 1)
    return State(spec, 0, dict(weights), scalars={"params": known})


def plan(
    state: State, round_number: int, devices: tuple[DeviceView, ...], rng: np.random.Generator
) -> tuple[State, tuple[Draft, ...]]:
    """See `coordinator.algorithm.Algorithm.plan`."""
    return ask_to_train(state, round_number, devices, rng)


def close(state: State, answers: Answers | Iterable[Answer]) -> State:
    """See `coordinator.algorithm.Algorithm.close`.

    Memory: one sum of the model's size.

    Raises:
        Malformed: An answer is not about the whole model.
    """
    return joined(state, answers)
