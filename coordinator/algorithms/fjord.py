"""FjORD: prefix widths by ordered dropout; each device the widest that it holds, training all narrower ones as well.

Horvath et al., "FjORD: Fair and Accurate Federated Learning under heterogeneous targets with Ordered Dropout", NeurIPS 2021.

* Channels stand in the order of their index: width p keeps the first ``ceil(p C)`` of every prunable layer (section 3.1).
* A device draws a width for every batch (see the rule `fjord`); the parameter ``recipe.distil`` is the paper's
  self-distillation, and 1 by default.
* Batch norms have running statistics of their own for each width, as in the paper, with ``calibrate``
  (`coordinator.blocks.norms`).
* What a width has beyond the next narrower one becomes the mean, by samples, over the devices whose width has it
  (algorithm 1, line 14). The paper's code writes blocks from the largest width inward, each over the one before, which is the
  same.

docs/decisions/nested-baselines.md says what differs from the paper's experiments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import numpy as np

from coordinator.algorithm import About, Answer, Answers, Arrays, DeviceView, Draft, State
from coordinator.blocks import affines, aggregate, momentum, norms
from coordinator.blocks.nesting import prefix, widths_of
from coordinator.blocks.widths import fractions_of, structures_of, widest
from coordinator.recipes import merged, recipe_of, scheduled
from wire.errors import ConfigError
from wire.spec import ModelSpec

ABOUT = About("Horvath et al., NeurIPS 2021", "baseline", "tests/unit/test_fjord.py")
PARAMS: Mapping[str, float | str] = MappingProxyType(
    {
        "fractions": "0.2 0.4 0.6 0.8 1",
        **norms.CALIBRATE,
        **affines.NORMS,
        **momentum.MOMENTUM,
        "schedule": "constant",
        "recipe.rule": "fjord",
        "recipe.epochs": 2.0,
        "recipe.batch": 32.0,
        "recipe.rate": 0.1,
        "recipe.momentum": 0.9,
        "recipe.decay": 1e-4,
        "recipe.clip": 2.0,
        "recipe.distil": 1.0,
    }
)
"""Names of all parameters with their defaults."""


def init(spec: ModelSpec, weights: Arrays, params: Mapping[str, float | str]) -> State:
    """See `coordinator.algorithm.Algorithm.init`."""
    known = merged(PARAMS, params)
    scheduled(recipe_of(known), str(known["schedule"]), 1)
    widths = widths_of(spec, fractions_of(str(known["fractions"])))
    if not widths:
        raise ConfigError(f"model {spec.name!r} has no prunable channels; fjord needs some, fedavg does not")
    norms.check(spec, known)
    affines.check(spec, known)
    sets = affines.begun(spec, weights, widths, known)
    still = momentum.still(spec, {**weights, **affines.named(sets)}, known)
    return State(spec, 0, dict(weights), prefix(spec, widths), widths, {"params": known}, still, norms=sets)


def plan(
    state: State, round_number: int, devices: tuple[DeviceView, ...], rng: np.random.Generator
) -> tuple[State, tuple[Draft, ...]]:
    """See `coordinator.algorithm.Algorithm.plan`: each device the widest structure that it can hold."""
    params, structures = state.scalars["params"], structures_of(state)
    recipe = affines.told(scheduled(recipe_of(params), str(params["schedule"]), round_number), params)
    if norms.due(params, round_number):
        return norms.asked(dataclasses.replace(state, round=round_number), recipe, devices, rng)
    held = widest(state.spec, structures, recipe, devices)
    drafts = []
    for device in sorted(devices, key=lambda d: d.name):
        seeded = dataclasses.replace(recipe, seed=int(rng.integers(1 << 31)))
        if device.name in held:
            fits = held[device.name]
            drafts.append(Draft(device.name, "train", structures[fits.capacity], seeded, fits.bytes_bound))
    return dataclasses.replace(state, round=round_number), tuple(drafts)


def close(state: State, answers: Answers | Iterable[Answer]) -> State:
    """See `coordinator.algorithm.Algorithm.close`.

    Memory: one sum of the model's size, which becomes the new weights, and one answer.

    Raises:
        Malformed: An answer is of another ranking than this run's.
    """
    if norms.due(state.scalars["params"], state.round):
        return norms.pooled(state, answers)
    after = aggregate.joined(state, affines.shared(state, answers), aggregate.by_samples)
    after = momentum.carried(state, norms.unmoved(state, after))
    return affines.joined(state, after, answers, aggregate.by_samples)
