"""SynFlow: masks from the initial weights alone, in rounds of pruning without any data; fixed from then on.

Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic flow", NeurIPS 2020, algorithm 1:
``iterations`` times, score the remaining weights by ``|w| dR/d|w|`` with ``R = 1^T |W_L| ... |W_1| 1`` and keep the largest of
all layers together, ``density ** (k / iterations)`` of all. One device does that in round 1 (see the rule `score`), the first
by name that can hold it, or the next one in the next round if it does not answer; no layer is emptied before every layer is
down to its last weights.

``R`` belongs to chains of linear layers and convolutions with ReLU and pools between them; other models are refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import numpy as np

from coordinator.algorithm import About, Answer, Answers, Arrays, DeviceView, Draft, State
from coordinator.blocks.aggregate import shares
from coordinator.blocks.drafts import drafted, one_of
from coordinator.blocks.fixed import TRAINING, ask_to_train, density_of, joined, mean_scores, recipe_at, told_scores
from coordinator.blocks.flow import flow_order, obstacle
from coordinator.blocks.masks import top_global
from coordinator.recipes import merged
from wire.errors import ConfigError
from wire.spec import ModelSpec, Structure

ABOUT = About("Tanaka et al., NeurIPS 2020", "baseline", "tests/unit/test_synflow.py")
PARAMS: Mapping[str, float | str] = MappingProxyType({**TRAINING, "density": 0.1, "iterations": 100.0})
"""Names of all parameters with their defaults."""


def init(spec: ModelSpec, weights: Arrays, params: Mapping[str, float | str]) -> State:
    """See `coordinator.algorithm.Algorithm.init`."""
    known = merged(PARAMS, params)
    recipe_at(known, 1)
    density_of(known)
    iterations = float(known["iterations"])
    if not 1 <= iterations <= 10_000 or not iterations.is_integer():
        raise ConfigError(f"parameter iterations = {iterations:g}: write a whole number from 1 to 10000, such as 100")
    why = obstacle(spec)
    if why:
        raise ConfigError(f"synflow knows no flow through model {spec.name!r}: {why}; snip takes any model")
    return State(spec, 0, dict(weights), scalars={"params": known})


def plan(
    state: State, round_number: int, devices: tuple[DeviceView, ...], rng: np.random.Generator
) -> tuple[State, tuple[Draft, ...]]:
    """See `coordinator.algorithm.Algorithm.plan`: scores from one device, then training under the masks."""
    if state.masks:
        return ask_to_train(state, round_number, devices, rng)
    params = state.scalars["params"]
    recipe = flow_order(float(params["iterations"]), float(params["density"]))
    drafts = drafted(state.spec, Structure(), recipe, devices, rng)
    return dataclasses.replace(state, round=round_number), one_of(drafts, round_number)


def close(state: State, answers: Answers | Iterable[Answer]) -> State:
    """See `coordinator.algorithm.Algorithm.close`. Memory: one array of scores for each that may be masked.

    Raises:
        Malformed: An answer is of other masks than were asked for.
        NonFinite: A score is no number.
    """
    if state.masks:
        return joined(state, answers)
    told = told_scores(state.spec, answers)
    if not any(told):
        return state
    scores = mean_scores(state.spec, answers, shares(told))
    size = sum(array.size for array in scores.values())
    return dataclasses.replace(state, masks=top_global(scores, round(density_of(state.scalars["params"]) * size)))
