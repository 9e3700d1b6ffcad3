"""FedDIP: pruning with error feedback whose mask comes from the dense mean, and a penalty that grows in steps.

Long et al., "FedDIP: Federated Learning with Extreme Dynamic Pruning and Incremental Regularization", ICDM 2023. Every
`every` rounds the weights of largest magnitude, of all layers together, make the mask; sparsity goes from `sparsity_start` to
`sparsity` along a cubic over `horizon` rounds, after which the mask stays. Devices hold dense weights and take the gradient
at the masked ones (rule `dpf`); what is added to their loss is ``lambda_t * sum |w * m|^2``, and ``lambda_t`` rises in
`segments` steps over the same rounds.

What the parameters choose between:

* `mask`: ``round`` is the paper's: after every round the mean is masked, and the mask is taken from the dense mean of the
  round that reconfigures. So the error of pruning lives within a round, and pruned weights are zero in between; updates of
  the other rounds are sparse, which changes nothing, since their pruned part is dropped. A weight returns only if one round
  carries it past the smallest kept ones, which is rare while sparsity rises. ``dense`` keeps the dense mean on the
  coordinator, so that the error is never lost; every round's update is dense, until the mask is final. ``nested`` drops the
  error before the mask is taken as well, so that nothing returns: so does the public code, whose updates are dense for all
  that.
* `start`: ``erk``, a random mask by layer shapes; or ``dense``, no mask before the first reconfiguration.
* `ramp`: ``paper``, ``lambda * floor(Q t / T) / Q``; or ``code``, the public code's, which starts from 5e-4.
* `penalty`: ``squared``, or ``norm`` for the public code's sum of layer norms.

A dense mean never travels: devices are sent the kept weights, and what the others are is not needed for how they move (see
`edge_runtime.rules.dpf`). With sparsity 0 and no penalty this is FedAvg, to the bit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import numpy as np

from coordinator.algorithm import About, Answer, Answers, Arrays, DeviceView, Draft, State
from coordinator.blocks.drafts import drafted
from coordinator.blocks.feedback import Pruning, choice, closed, last_pruned, rounds, started, told_of
from coordinator.blocks.schedule import segmented, segmented_by_code
from coordinator.recipes import Params, merged, recipe_of, scheduled
from wire.errors import ConfigError
from wire.messages import Recipe
from wire.spec import ModelSpec, Structure
from wire.structure import masked

ABOUT = About("Long et al., ICDM 2023", "paper", "tests/unit/test_feddip.py")
PARAMS: Mapping[str, float | str] = MappingProxyType(
    {
        "sparsity": 0.9,
        "sparsity_start": 0.5,
        "horizon": 200.0,
        "every": 5.0,
        "mask": "round",
        "start": "erk",
        "lambda": 1e-3,
        "segments": 20.0,
        "ramp": "paper",
        "penalty": "squared",
        "schedule": "exponential 0.998",
        "recipe.rule": "dpf",
        "recipe.epochs": 5.0,
        "recipe.batch": 128.0,
        "recipe.rate": 0.1,
        "recipe.momentum": 0.0,
        "recipe.decay": 5e-4,
        "recipe.clip": 0.0,
    }
)
"""Parameters and defaults; the recipe is that of the public code, for 1000 rounds with 5 of 50 devices."""


def init(spec: ModelSpec, weights: Arrays, params: Mapping[str, float | str]) -> State:
    """See `coordinator.algorithm.Algorithm.init`."""
    known = merged(PARAMS, params)
    Pruning.of(known)
    choice(known, "start", ("erk", "dense"))
    _recipe(known, 1, dense=True)
    return State(spec, 0, weights=dict(weights), scalars={"params": known})


def plan(
    state: State, round_number: int, devices: tuple[DeviceView, ...], rng: np.random.Generator
) -> tuple[State, tuple[Draft, ...]]:
    """See `coordinator.algorithm.Algorithm.plan`."""
    params = state.scalars["params"]
    pruning = Pruning.of(params)
    if params["start"] == "erk":
        state = started(state, pruning, rng)
    recipe = _recipe(params, round_number, dense=pruning.wants_dense(round_number, last_pruned(state)))
    structure = masked(state.masks) if state.masks else Structure()
    drafts = drafted(state.spec, structure, recipe, devices, rng)
    return dataclasses.replace(state, round=round_number), drafts


def close(state: State, answers: Answers | Iterable[Answer]) -> State:
    """See `coordinator.algorithm.Algorithm.close` and `coordinator.blocks.feedback.closed`."""
    return closed(state, Pruning.of(state.scalars["params"]), answers)


def facts(state: State) -> Mapping[str, float]:
    """See `coordinator.algorithm.Algorithm` and `coordinator.blocks.feedback.told_of`."""
    return told_of(state)


def _recipe(params: Params, round_number: int, *, dense: bool) -> Recipe:
    """Give a round's recipe."""
    recipe = scheduled(recipe_of(params), str(params["schedule"]), round_number)
    if recipe.knobs.get("adam"):
        raise ConfigError("parameter recipe.adam: dense weights under a mask are moved by plain SGD; write 0")
    strength, segments = float(params["lambda"]), rounds(params, "segments")
    if not 0.0 <= strength < math.inf:
        raise ConfigError(f"parameter lambda = {strength:g}: write a number from 0, such as 0.001")
    code = choice(params, "ramp", ("paper", "code")) == "code"
    norm = choice(params, "penalty", ("squared", "norm")) == "norm"
    ramp = segmented_by_code if code and strength else segmented
    grown = ramp(strength, segments, round_number - 1, rounds(params, "horizon"))
    knobs = {"lambda": grown, "norm": float(norm), "dense": float(dense)}
    return dataclasses.replace(recipe, knobs={**recipe.knobs, **knobs})
