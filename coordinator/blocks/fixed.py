"""What algorithms share that train one model, masked or whole, on every device: asking, scores that come back, the mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from coordinator.algorithm import Answer, Answers, DeviceView, Draft, State
from coordinator.blocks.aggregate import Expected
from coordinator.blocks.drafts import drafted
from coordinator.blocks.masks import masked_mean
from coordinator.recipes import recipe_of, scheduled
from wire.errors import ConfigError
from wire.masked import maskable
from wire.messages import Recipe
from wire.spec import ModelSpec, Structure, tensor_shapes
from wire.structure import masked

TRAINING: Mapping[str, float | str] = MappingProxyType(
    {
        "schedule": "constant",
        "recipe.rule": "sgd",
        "recipe.epochs": 2.0,
        "recipe.batch": 32.0,
        "recipe.rate": 0.1,
        "recipe.momentum": 0.9,
        "recipe.decay": 0.0,
        "recipe.clip": 2.0,
    }
)
"""Parameters of ordinary local training with their defaults, which are FedAvg's."""


def recipe_at(params: Mapping[str, float | str], round_number: int) -> Recipe:
    """Give the recipe of a round.

    Raises:
        ConfigError: A parameter of it is impossible.
    """
    return scheduled(recipe_of(params), str(params["schedule"]), round_number)


def density_of(params: Mapping[str, float | str]) -> float:
    """Read the parameter ``density``.

    Raises:
        ConfigError: It is not above 0 and at most 1.
    """
    density = float(params["density"])
    if not 0.0 < density <= 1.0:
        raise ConfigError(f"parameter density = {density:g}: write a number above 0 and at most 1, such as 0.1")
    return density


def ask_to_train(
    state: State, round_number: int, devices: Sequence[DeviceView], rng: np.random.Generator
) -> tuple[State, tuple[Draft, ...]]:
    """Plan an ordinary round: every device trains what the masks keep. The parameters stand in ``scalars["params"]``."""
    recipe = recipe_at(state.scalars["params"], round_number)
    drafts = drafted(state.spec, masked(state.masks), recipe, devices, rng)
    return dataclasses.replace(state, round=round_number), drafts


def joined(state: State, answers: Answers | Iterable[Answer]) -> State:
    """Close an ordinary round: the mean of the kept weights, by samples (`masks.masked_mean`); the state itself without any.

    Raises:
        Malformed: An answer is of other masks than the state's.
    """
    weights = masked_mean(state.spec, state.weights, Expected(answers, masked(state.masks)))
    nobody = all(weights[name] is array for name, array in state.weights.items())
    return state if nobody else dataclasses.replace(state, weights=weights)


def told_scores(spec: ModelSpec, answers: Answers | Iterable[Answer]) -> list[bool]:
    """Say of each answer whether it tells any score; masks must not be made of those that do not."""
    names = maskable(spec)
    return [not answer.extras.keys().isdisjoint(names) for answer in answers]


def mean_scores(
    spec: ModelSpec, answers: Answers | Iterable[Answer], weights: Sequence[float]
) -> dict[str, NDArray[np.float32]]:
    """Add up what answers tell of every weight that may be masked; what is not told counts as 0.

    Args:
        spec: The model.
        answers: With the scores as extras.
        weights: One for each answer, in their order.

    Returns:
        Arrays in the tensors' shapes. Cost: one such set.
    """
    shapes = tensor_shapes(spec, Structure())
    total = {name: np.zeros(shapes[name], np.float32) for name in maskable(spec)}
    for answer, weight in zip(answers, weights, strict=True):
        for name in total.keys() & answer.extras.keys():
            places, values = answer.extras[name]
            total[name].reshape(-1)[places] += np.float32(weight) * values
    return total
