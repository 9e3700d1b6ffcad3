"""FedProx: FedAvg whose devices are drawn back to the model they were sent, and of whom the slow ones may do part of the work.

Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, algorithm 2. Each device minimises
``F_k(w) + (mu / 2) |w - w_t|^2`` (see the rule `prox`), as far as it gets; what it has got by then counts in full. Answers are
joined as in FedAvg, by samples. With ``mu`` and ``patience`` of 0 it is FedAvg, to the bit.

The paper lets a global clock cut the slow devices off. Here they are told beforehand how many steps to make: a device whose
whole work would take longer than ``patience`` times the median of the fleet makes as many steps as that time holds, and one
at least. What a step takes a device is measured: the seconds of its last answer over the steps that it was asked for. A device
that has not answered yet is asked for everything, and so is one that does not say how many samples it has. Measured times
make such a run one that cannot be repeated to the bit, but for a simulated one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from statistics import median
from types import MappingProxyType

import numpy as np

from coordinator.algorithm import About, Answer, Answers, Arrays, DeviceView, Draft, State
from coordinator.blocks.fixed import TRAINING, ask_to_train, joined, recipe_at
from coordinator.blocks.roster import latest
from coordinator.recipes import merged
from wire.errors import ConfigError
from wire.messages import Recipe
from wire.spec import ModelSpec

ABOUT = About("Li et al., MLSys 2020", "baseline", "tests/unit/test_fedprox.py")
PARAMS: Mapping[str, float | str] = MappingProxyType(
    {**TRAINING, "recipe.rule": "prox", "recipe.mu": 0.01, "patience": 1.0}
)
"""Names of all parameters with their defaults; the paper tries mu of 0.001, 0.01, 0.1 and 1."""

_STEPS_MAX = 1 << 53
"""A recipe says no more, and a device may say that it has as many samples as it likes."""


def init(spec: ModelSpec, weights: Arrays, params: Mapping[str, float | str]) -> State:
    """See `coordinator.algorithm.Algorithm.init`."""
    known = merged(PARAMS, params)
    recipe_at(known, 1)
    for name in ("patience", "recipe.mu"):
        if not float(known.get(name, 0.0)) >= 0.0:
            raise ConfigError(f"parameter {name} = {known[name]}: write a number, at least 0")
    return State(spec, 0, dict(weights), scalars={"params": known, "asked": {}, "pace": {}})


def plan(
    state: State, round_number: int, devices: tuple[DeviceView, ...], rng: np.random.Generator
) -> tuple[State, tuple[Draft, ...]]:
    """See `coordinator.algorithm.Algorithm.plan`."""
    state, drafts = ask_to_train(state, round_number, devices, rng)
    samples, pace = {d.name: d.samples for d in devices}, state.scalars["pace"]
    work = {draft.device: steps_of(draft.recipe, samples[draft.device]) for draft in drafts}
    seconds = {name: steps * pace[name] for name, steps in work.items() if pace.get(name)}
    allowed = float(state.scalars["params"]["patience"]) * (median(seconds.values()) if seconds else 0.0)
    steps = {name: held(work[name], allowed / pace[name]) for name in seconds if 0.0 < allowed < seconds[name]}
    drafts = tuple(
        dataclasses.replace(d, recipe=dataclasses.replace(d.recipe, steps=steps[d.device])) if d.device in steps else d
        for d in drafts
    )
    return dataclasses.replace(state, scalars={**state.scalars, "asked": {**work, **steps}}), drafts


def close(state: State, answers: Answers | Iterable[Answer]) -> State:
    """See `coordinator.algorithm.Algorithm.close`.

    Memory: one sum of the model's size, and a number for each device that is remembered (`roster.latest`).

    Raises:
        Malformed: An answer is not about the whole model.
    """
    asked, pace = state.scalars["asked"], {}
    for answer in answers:
        if asked.get(answer.device) and answer.usage.seconds > 0:
            pace[answer.device] = answer.usage.seconds / asked[answer.device]
        del answer
    scalars = {**state.scalars, "pace": latest(state.scalars["pace"], pace)}
    return joined(dataclasses.replace(state, scalars=scalars), answers)


def steps_of(recipe: Recipe, samples: int) -> int:
    """Count the updates that a recipe asks of a device with so many samples; 0 when they are not known."""
    return recipe.steps or min(_STEPS_MAX, recipe.epochs * -(-samples // recipe.batch))


def held(steps: int, limit: float) -> int:
    """Give the whole steps within a limit: at least one, at most as many as there are."""
    return max(1, min(steps, int(limit)))
