"""DPF, federated: dense weights are trained through a mask that is taken from them again every few rounds.

Lin et al., "Dynamic Model Pruning with Feedback", ICLR 2020. The gradient is taken at the masked weights and moves all of
them, ``w -= rate * grad f(w * m)``; momentum and decay are those of the dense weights. What pruning leaves out is so an error
that ``w`` remembers: a weight that was pruned too early grows until the next mask takes it back. Sparsity rises along a cubic
from `sparsity_start` over `horizon` rounds, after which the mask stays.

The paper makes a new mask every 16 steps of one machine. Here one mask holds for all devices and for `every` rounds of local
steps: masks of their own would let the devices' models drift apart and could not be sent as values alone. The coordinator
takes the mask from the dense mean and keeps the error; a device is sent the kept weights, which is all that a gradient needs,
and answers with how every weight moved. What the dense weights would have lost to decay there is added here (see
`edge_runtime.rules.dpf`). So a round costs a sparse model down and a dense one up. Momentum begins anew with every order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import numpy as np

from coordinator.algorithm import About, Answer, Answers, Arrays, DeviceView, Draft, State
from coordinator.blocks.drafts import drafted
from coordinator.blocks.feedback import Pruning, closed, last_pruned, told_of
from coordinator.recipes import merged, recipe_of, scheduled
from wire.errors import ConfigError
from wire.spec import ModelSpec, Structure
from wire.structure import masked

ABOUT = About("Lin et al., ICLR 2020", "baseline", "tests/unit/test_dpf.py")
PARAMS: Mapping[str, float | str] = MappingProxyType(
    {
        "sparsity": 0.9,
        "sparsity_start": 0.0,
        "horizon": 200.0,
        "every": 1.0,
        "schedule": "constant",
        "recipe.rule": "dpf",
        "recipe.epochs": 2.0,
        "recipe.batch": 32.0,
        "recipe.rate": 0.05,
        "recipe.clip": 0.0,
        "recipe.momentum": 0.9,
        "recipe.decay": 1e-4,
    }
)
"""Parameters and defaults; momentum (plain, not Nesterov) and decay are those of the codes for one machine."""


def init(spec: ModelSpec, weights: Arrays, params: Mapping[str, float | str]) -> State:
    """See `coordinator.algorithm.Algorithm.init`."""
    known = merged(PARAMS, params)
    Pruning.of({**known, "mask": "dense"})
    recipe = scheduled(recipe_of(known), str(known["schedule"]), 1)
    if recipe.knobs.get("adam"):
        raise ConfigError("parameter recipe.adam: dense weights under a mask are moved by plain SGD; write 0")
    return State(spec, round=0, weights=dict(weights), scalars={"params": known})


def plan(
    state: State, round_number: int, devices: tuple[DeviceView, ...], rng: np.random.Generator
) -> tuple[State, tuple[Draft, ...]]:
    """See `coordinator.algorithm.Algorithm.plan`."""
    params = state.scalars["params"]
    recipe = scheduled(recipe_of(params), str(params["schedule"]), round_number)
    dense = Pruning.of({**params, "mask": "dense"}).wants_dense(round_number, last_pruned(state))
    recipe = dataclasses.replace(recipe, knobs={**recipe.knobs, "dense": float(dense)})
    structure = masked(state.masks) if state.masks else Structure()
    return dataclasses.replace(state, round=round_number), drafted(state.spec, structure, recipe, devices, rng)


def close(state: State, answers: Answers | Iterable[Answer]) -> State:
    """See `coordinator.algorithm.Algorithm.close` and `coordinator.blocks.feedback.closed`."""
    return closed(state, Pruning.of({**state.scalars["params"], "mask": "dense"}), answers)


def facts(state: State) -> Mapping[str, float]:
    """See `coordinator.algorithm.Algorithm` and `coordinator.blocks.feedback.told_of`."""
    return told_of(state)
