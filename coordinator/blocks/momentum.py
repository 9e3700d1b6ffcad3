"""A momentum that the coordinator carries: ``V = beta V + D`` and ``w += D + beta V``, D being how a round moved the model.

Nesterov's form of the server momentum of Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated
Visual Classification", 2019. What a round does not move (nobody covers it, no mask keeps it) stands still, with its momentum:
so one function serves whole, nested and masked models. Running statistics of batch norms are measured, not learnt: they
have none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from coordinator.algorithm import Arrays, State
from wire.errors import ConfigError
from wire.spec import ModelSpec, statistics

MOMENTUM: Mapping[str, float | str] = MappingProxyType({"beta": 0.0})
"""The parameter with its default: none."""
PREFIX = "momentum/"
_BETA_MAX = 0.999


def beta_of(params: Mapping[str, float | str]) -> float:
    """Read the parameter ``beta``.

    Raises:
        ConfigError: It is not from 0 to 0.999.
    """
    beta = float(params["beta"])
    if not 0.0 <= beta <= _BETA_MAX:
        raise ConfigError(f"parameter beta = {beta:g}: write a number from 0 to {_BETA_MAX}, such as 0.9")
    return beta


def still(spec: ModelSpec, weights: Arrays, params: Mapping[str, float | str]) -> dict[str, NDArray[np.float32]]:
    """Give the arrays that a state starts with: zeros for every tensor that learns, nothing where ``beta`` is 0.

    Raises:
        ConfigError: As `beta_of`.
    """
    if not beta_of(params):
        return {}
    return {PREFIX + name: np.zeros_like(weights[name]) for name in weights.keys() - statistics(spec)}


def carried(before: State, after: State) -> State:
    """Feed the momentum with what a round has moved, and let it move the same weights further.

    Args:
        before: The state that the round began with, with the arrays of `still`; without them nothing is carried.
        after: The same with the round's answers joined, and no weight named anew. Its other arrays stay.

    Cost: three tensors beside the new weights and momentum; one pass over the model.
    """
    held = [name for name in after.weights if PREFIX + name in before.arrays]
    if after is before or not held:
        return after
    beta = np.float32(before.scalars["params"]["beta"])
    weights, arrays = dict(after.weights), dict(after.arrays)
    for name in held:
        array, speed = after.weights[name], before.arrays[PREFIX + name]
        step = array - before.weights[name]
        moves, fresh = step != 0, beta * speed + step
        arrays[PREFIX + name] = np.where(moves, fresh, speed)
        weights[name] = np.where(moves, array + beta * fresh, array)
    return dataclasses.replace(after, weights=weights, arrays=arrays)
