"""Per-FedAvg: a model that is good to start from; each device makes it its own by a step or two over its own samples.

Fallah, Mokhtari and Ozdaglar, "Personalized Federated Learning with Theoretical Guarantees: A Model-Agnostic Meta-Learning
Approach", NeurIPS 2020, algorithm 1. Devices take meta-gradient steps (see the rule `maml`: first order, or Hessian-free with
``recipe.hf`` of 1); the mean of how these moved the weights, each device counting the same, is added to the model. A device's
personal model is the meta-model after ``recipe.tune`` passes of plain steps of size ``recipe.alpha``. Its own test accuracy
after training is about that; the global model itself is not meant to be good before such steps.

Hessian-free steps want a smaller ``recipe.alpha``, such as 0.01: they multiply by ``I - alpha H``, which turns around
what is curved by more than ``2 / alpha``, and the default, chosen for first order, diverges on the digits
(docs/results/nested.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import numpy as np

from coordinator.algorithm import About, Answer, Answers, Arrays, DeviceView, Draft, State
from coordinator.blocks.fixed import TRAINING, ask_to_train, recipe_at
from coordinator.recipes import merged
from wire.errors import Malformed
from wire.spec import ModelSpec, Structure
from wire.structure import paste_add

ABOUT = About("Fallah, Mokhtari and Ozdaglar, NeurIPS 2020", "baseline", "tests/unit/test_perfedavg.py")
PARAMS: Mapping[str, float | str] = MappingProxyType(
    {
        **TRAINING,
        "recipe.rule": "maml",
        "recipe.alpha": 0.03,
        "recipe.hf": 0.0,
        "recipe.delta": 1e-3,
        "recipe.tune": 1.0,
    }
)
"""Names of all parameters with their defaults; the recipe's rate is the paper's beta."""


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
    """See `coordinator.algorithm.Algorithm.close`: the plain mean of all answers that have samples behind them.

    Memory: one sum of the model's size.

    Raises:
        Malformed: An answer is not about the whole model.
    """
    count = 0
    for answer in answers:
        if answer.structure != Structure():
            raise Malformed(f"{answer.device} answers about a part of the model; it was asked for the whole")
        count += answer.samples > 0
    if not count:
        return state
    total = {name: np.zeros_like(array) for name, array in state.weights.items()}
    for answer in answers:
        if answer.samples > 0:
            paste_add(state.spec, total, answer.update, Structure(), 1.0 / count)
    return dataclasses.replace(state, weights={name: array + total[name] for name, array in state.weights.items()})
