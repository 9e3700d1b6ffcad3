"""PruneTrain: a group lasso pulls channels to zero, and those that get there are taken out at fixed intervals, for good.

Lym et al., "PruneTrain: Fast Neural Network Training by Dynamic Sparse Model Reconfiguration", SC 2019, with FedAvg around
it as in FedDIP's comparison:

* The strength lambda is settled in the first round that anybody answers: each device finds the one for which the penalty is
  ``share`` of the whole loss in its first batch (the rule `grouplasso`), and their mean, weighted by samples, stands from
  then on.
* Every ``interval`` rounds a channel goes when no weight that makes or reads it has a magnitude of ``threshold`` or more; a
  round that nobody answers leaves that to the next.
  Layers that meet in a sum share their channels, so that one of them that still needs a channel keeps it (`blocks.channels`).
* What is left travels, trains and is measured as a smaller dense model: one width of the state, level 0 for the channels that
  are in. Without norms it computes what the whole model does with zeros for the others. A group norm takes its mean over
  fewer channels, which training makes up for.
* ``enlarge`` 1 lets the batch grow into the memory that is freed, and the rate with it (section 4.4); a batch never takes more
  than the whole model did with the recipe's own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

import numpy as np

from coordinator.algorithm import About, Answer, Answers, Arrays, DeviceView, Draft, State
from coordinator.blocks.aggregate import shares
from coordinator.blocks.channels import largest_weights, narrowed, without
from coordinator.blocks.drafts import drafted
from coordinator.blocks.fixed import TRAINING
from coordinator.recipes import merged, recipe_of, scheduled
from wire.errors import ConfigError, Malformed
from wire.memory import predict
from wire.messages import Recipe
from wire.spec import ModelSpec, Structure
from wire.structure import paste_add, ranking_digest, to_canonical, widths_of

ABOUT = About("Lym et al., SC 2019", "baseline", "tests/unit/test_prunetrain.py")
PARAMS: Mapping[str, float | str] = MappingProxyType(
    {
        "share": 0.2,
        "threshold": 1e-4,
        "interval": 10.0,
        "enlarge": 0.0,
        **TRAINING,
        "recipe.rule": "grouplasso",
    }
)
"""Names of all parameters with their defaults."""

_BATCH_MAX = 1024


def init(spec: ModelSpec, weights: Arrays, params: Mapping[str, float | str]) -> State:
    """See `coordinator.algorithm.Algorithm.init`."""
    known = merged(PARAMS, params)
    scheduled(recipe_of(known), str(known["schedule"]), 1)
    if not 0.0 <= float(known["share"]) < 1.0:
        raise ConfigError(f"parameter share = {known['share']}: write a number from 0 to below 1")
    if not 0.0 < float(known["threshold"]) < math.inf:
        raise ConfigError(f"parameter threshold = {known['threshold']}: write a number above 0, such as 1e-4")
    if not float(known["interval"]).is_integer() or float(known["interval"]) < 1:
        raise ConfigError(f"parameter interval = {known['interval']}: write a whole number of rounds")
    if known["enlarge"] not in (0.0, 1.0):
        raise ConfigError(f"parameter enlarge = {known['enlarge']}: write 0 or 1")
    levels = {group.name: np.zeros(group.size, np.uint8) for group in spec.groups if group.prunable}
    if not levels:
        raise ConfigError(f"model {spec.name!r} has no prunable channels; prunetrain needs some, fedavg does not")
    scalars = {"params": known, "lambda": 0.0}
    return State(spec, 0, dict(weights), levels, widths_of(levels, 1), scalars)


def plan(
    state: State, round_number: int, devices: tuple[DeviceView, ...], rng: np.random.Generator
) -> tuple[State, tuple[Draft, ...]]:
    """See `coordinator.algorithm.Algorithm.plan`."""
    params, structure = state.scalars["params"], _structure(state)
    recipe = scheduled(recipe_of(params), str(params["schedule"]), round_number)
    settled = float(state.scalars["lambda"])
    knobs = {"lambda": settled, "share": 0.0 if settled else float(params["share"])}
    recipe = dataclasses.replace(recipe, knobs={**recipe.knobs, **knobs})
    if params["enlarge"]:
        recipe = _enlarged(state.spec, structure, recipe)
    drafts = drafted(state.spec, structure, recipe, devices, rng)
    return dataclasses.replace(state, round=round_number), drafts


def close(state: State, answers: Answers | Iterable[Answer]) -> State:
    """See `coordinator.algorithm.Algorithm.close`.

    Memory: one sum of the model's size, in wire order and back.

    Raises:
        Malformed: An answer is of other channels than this round's.
    """
    structure = _structure(state)
    samples = [answer.samples for answer in _of(answers, structure)]
    if not sum(samples):
        return state
    total = {name: np.zeros_like(array) for name, array in state.weights.items()}
    strength = 0.0
    for answer, share in zip(_of(answers, structure), shares(samples), strict=True):
        paste_add(state.spec, total, answer.update, structure, share)
        strength += share * max(0.0, answer.metrics.get("lambda", 0.0))
    moves = to_canonical(state.spec, total, state.levels)
    weights = {name: array + moves[name] for name, array in state.weights.items()}
    scalars = {**state.scalars, "lambda": state.scalars["lambda"] or strength}
    state = dataclasses.replace(state, weights=weights, scalars=scalars)
    every, last = int(state.scalars["params"]["interval"]), int(state.scalars.get("reconfigured", 0))
    return _reconfigured(state) if state.round // every > last // every else state


def _reconfigured(state: State) -> State:
    """Take out what has become small."""
    threshold = float(state.scalars["params"]["threshold"])
    levels = narrowed(state.levels, largest_weights(state.spec, state.weights), threshold)
    weights = without(state.spec, state.weights, levels)
    scalars = {**state.scalars, "reconfigured": state.round}
    return dataclasses.replace(state, weights=weights, levels=levels, widths=widths_of(levels, 1), scalars=scalars)


def _enlarged(spec: ModelSpec, structure: Structure, recipe: Recipe) -> Recipe:
    """Give the largest multiple of the batch that takes no more memory than the whole model with one, the rate in step."""
    granted = predict(spec, Structure(), recipe).bound
    factor = 1
    while recipe.batch * (factor + 1) <= _BATCH_MAX:
        larger = dataclasses.replace(recipe, batch=recipe.batch * (factor + 1))
        if predict(spec, structure, larger).bound > granted:
            break
        factor += 1
    return dataclasses.replace(recipe, batch=recipe.batch * factor, rate=recipe.rate * factor)


def _of(answers: Answers | Iterable[Answer], structure: Structure) -> Iterator[Answer]:
    for answer in answers:
        if answer.structure != structure:
            raise Malformed(f"{answer.device} answers with other channels than it was asked for")
        yield answer


def _structure(state: State) -> Structure:
    return Structure(0, state.widths, ranking_digest(state.levels))
