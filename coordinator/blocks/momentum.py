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
_BLOCK = 1 << 16
"""Weights that are looked at together."""


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
    measured = statistics(spec)  # in the weights' order, so that a state is the same bytes in every process
    return {PREFIX + name: np.zeros_like(array) for name, array in weights.items() if name not in measured}


def carried(before: State, after: State) -> State:
    """Feed the momentum with what a round has moved, and let it move the same weights further.

    Args:
        before: The state that the round began with, with the arrays of `still`; without them nothing is carried.
        after: The same with the round's answers joined, and no weight named anew. Tensors that are not `before`'s are this
            function's to change; the other arrays stay.

    Memory: the new momentum. Cost: one pass over the model.
    """
    measured = statistics(before.spec)  # a state of before this block may hold momentum for them
    held = [name for name in after.weights if PREFIX + name in before.arrays and name not in measured]
    if after is before or not held:
        return after
    beta = np.float32(before.scalars["params"]["beta"])
    weights, arrays = dict(after.weights), dict(after.arrays)
    for name in held:
        old, new, speed = before.weights[name], after.weights[name], before.arrays[PREFIX + name]
        if new is old:
            continue
        new, speed = np.ascontiguousarray(new), speed.copy()
        _feed(beta, old.reshape(-1), new.reshape(-1), speed.reshape(-1))
        weights[name], arrays[PREFIX + name] = new, speed
    return dataclasses.replace(after, weights=weights, arrays=arrays)


def _feed(beta: np.float32, old: NDArray[np.float32], new: NDArray[np.float32], speed: NDArray[np.float32]) -> None:
    """Let `speed` take in how `old` became `new`, and move `new` further, block by block; both are changed in place."""
    for start in range(0, old.size, _BLOCK):
        block = slice(start, start + _BLOCK)
        step = new[block] - old[block]
        moves, fresh = step != 0, beta * speed[block] + step
        np.copyto(speed[block], fresh, where=moves)
        np.add(new[block], beta * fresh, out=new[block], where=moves)
