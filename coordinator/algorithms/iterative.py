"""Iterative magnitude pruning: train, and now and then drop each layer's smallest weights, until the density is reached.

Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015, as it is run in PruneFL's
comparison (Jiang et al., TNNLS 2022): ``prunings`` times at equal distances in the first half of ``horizon`` rounds, each
layer alike by the rate ``1 - density ** (1 / prunings)``; the weights that stay go on from where they are, and what is gone
never comes back.

After pruning k a layer of n weights has ``floor(n density ** (k / prunings))`` of them. The power is taken of the whole, and
not floored from one pruning to the next, which would empty small layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from math import floor
from types import MappingProxyType

import numpy as np

from coordinator.algorithm import About, Answer, Answers, Arrays, DeviceView, Draft, State
from coordinator.blocks.fixed import TRAINING, ask_to_train, density_of, joined, recipe_at
from coordinator.blocks.masks import top_per_tensor
from coordinator.recipes import merged
from wire.errors import ConfigError
from wire.masked import maskable
from wire.spec import ModelSpec

ABOUT = About("Han et al., NeurIPS 2015", "baseline", "tests/unit/test_iterative.py")
PARAMS: Mapping[str, float | str] = MappingProxyType(
    {**TRAINING, "density": 0.1, "prunings": 20.0, "horizon": 200.0, "until": 0.5}
)
"""Names of all parameters with their defaults; ``until`` is the part of the horizon in which pruning happens."""


def init(spec: ModelSpec, weights: Arrays, params: Mapping[str, float | str]) -> State:
    """See `coordinator.algorithm.Algorithm.init`."""
    known = merged(PARAMS, params)
    recipe_at(known, 1)
    density_of(known)
    for name in ("prunings", "horizon"):
        value = float(known[name])
        if value < 1 or not value.is_integer():
            raise ConfigError(f"parameter {name} = {value:g}: write a whole number, at least 1")
    if not 0.0 < float(known["until"]) <= 1.0:
        raise ConfigError(f"parameter until = {known['until']:g}: write a part of the horizon above 0 and at most 1")
    return State(spec, 0, dict(weights), scalars={"params": known, "pruned": 0})


def plan(
    state: State, round_number: int, devices: tuple[DeviceView, ...], rng: np.random.Generator
) -> tuple[State, tuple[Draft, ...]]:
    """See `coordinator.algorithm.Algorithm.plan`."""
    return ask_to_train(state, round_number, devices, rng)


def close(state: State, answers: Answers | Iterable[Answer]) -> State:
    """See `coordinator.algorithm.Algorithm.close`: the mean, then as many prunings as are due after this round.

    Those of a round that nobody answered are left to the next.

    Raises:
        Malformed: An answer is of other masks than were asked for.
        NonFinite: A weight is no number.
    """
    if not sum(answer.samples for answer in answers):
        return state
    state = joined(state, answers)
    due = prunings_due(state)
    if due <= state.scalars["pruned"]:
        return state
    params = state.scalars["params"]
    left = density_of(params) ** (due / float(params["prunings"]))
    names = maskable(state.spec)
    counts = {name: floor(left * state.weights[name].size + 1e-9) for name in names}
    kept = {name: state.masks.get(name, True) for name in names}
    scores = {name: np.where(kept[name], np.abs(state.weights[name]), np.float32(-1.0)) for name in names}
    scalars = {**state.scalars, "pruned": due}
    return dataclasses.replace(state, masks=top_per_tensor(scores, counts), scalars=scalars)


def prunings_due(state: State) -> int:
    """Count the prunings that belong before the end of the state's round."""
    params = state.scalars["params"]
    prunings, last = float(params["prunings"]), float(params["until"]) * float(params["horizon"])
    return floor(min(prunings, prunings * state.round / last + 1e-9))
