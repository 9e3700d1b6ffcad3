"""LotteryFL: every device finds a sparse ticket of its own; each weight is averaged over the devices that keep it.

Li et al., "LotteryFL: Personalized and Communication-Efficient Federated Learning with Lottery Ticket Hypothesis on Non-IID
Datasets", 2020, algorithm 1. Masks, pruning and rewinding are the device's (the rule `lottery`); here
``w_j = sum_k m_kj w_kj / sum_k m_kj``: every device counts once, however many samples it has, as in the authors' code. A
weight that no device of the round keeps stays as it is.

What comes of it is one personal model per device, the joined weights under its own mask: ``accuracy.ticket`` of the answers is
about these, and so is ``density``; `simulate` and `compare` tell both. The joined model itself is what `evaluate` measures.

Uploads are sparse. The download is *not*, unlike in the paper: the weights of a round are published once for all devices
(DESIGN decision 2), so each is sent the whole model and masks it itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import numpy as np

from coordinator.algorithm import About, Answer, Answers, Arrays, DeviceView, Draft, State
from coordinator.blocks.aggregate import Expected
from coordinator.blocks.drafts import drafted
from coordinator.blocks.masks import masked_mean
from coordinator.recipes import merged, recipe_of, scheduled
from wire.errors import ConfigError
from wire.spec import ModelSpec, Structure

ABOUT = About("Li et al., 2020", "baseline", "tests/unit/test_lotteryfl.py")
PARAMS: Mapping[str, float | str] = MappingProxyType(
    {
        "schedule": "constant",
        "recipe.rule": "lottery",
        "recipe.epochs": 10.0,
        "recipe.batch": 10.0,
        "recipe.rate": 0.01,
        "recipe.momentum": 0.5,
        "recipe.decay": 0.0,
        "recipe.clip": 0.0,
        "recipe.threshold": 0.2,
        "recipe.target": 0.1,
        "recipe.prune": 0.2,
    }
)
"""Names of all parameters with their defaults."""


def init(spec: ModelSpec, weights: Arrays, params: Mapping[str, float | str]) -> State:
    """See `coordinator.algorithm.Algorithm.init`."""
    known = merged(PARAMS, params)
    scheduled(recipe_of(known), str(known["schedule"]), 1)
    for name in ("threshold", "target", "prune"):
        if not 0.0 <= float(known[f"recipe.{name}"]) <= 1.0:
            raise ConfigError(f"parameter recipe.{name} = {known[f'recipe.{name}']}: write a number from 0 to 1")
    return State(spec, 0, dict(weights), scalars={"params": known})


def plan(
    state: State, round_number: int, devices: tuple[DeviceView, ...], rng: np.random.Generator
) -> tuple[State, tuple[Draft, ...]]:
    """See `coordinator.algorithm.Algorithm.plan`."""
    params = state.scalars["params"]
    recipe = scheduled(recipe_of(params), str(params["schedule"]), round_number)
    drafts = drafted(state.spec, Structure(), recipe, devices, rng)
    return dataclasses.replace(state, round=round_number), drafts


def close(state: State, answers: Answers | Iterable[Answer]) -> State:
    """See `coordinator.algorithm.Algorithm.close`.

    Memory: one sum of the model's size, and a byte for each weight, or two with more than 255 answers.

    Raises:
        Malformed: An answer is not about the whole model.
    """
    return dataclasses.replace(state, weights=masked_mean(state.spec, state.weights, Expected(answers), evenly=True))
