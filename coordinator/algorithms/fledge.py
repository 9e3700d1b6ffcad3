"""Fledge: our own. Nested widths in which the narrow ones, that every device trains, teach the wide ones, that few can.

With uneven data the trouble of nested widths is at both ends. The narrow widths are neglected where wide devices train only
the wide one, and what only wide widths have is trained by few devices, on few classes. Here

* channels are ranked as in NestFL, by progressive L1 pruning; each device trains the widest width that its memory holds and,
  with ``deadline`` seconds, whose turn is over by then, judged by its own turns;
* in every step a device also trains the narrowest width and a random one between (``recipe.widths``). The narrowest learns
  from the labels; its output, which knows what all devices have seen, is a share ``recipe.upward`` of what the wider ones
  learn (the rule `sgd`; in-place distillation upside down). That costs no memory and no further pass;
* every device has the same say, ``1 / N`` of all N that answer, also on what few of them cover (FedMP's R2SP), so that what
  few devices say moves little;
* the round's movement D feeds a momentum at the coordinator, ``V = beta V + D`` and ``w += D + beta V`` (Nesterov's), width by
  width: what a width has beyond the next narrower one stands still, with its momentum, in a round in which nobody covers it.

What was tried and left out, with figures: docs/decisions/fledge.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import numpy as np

from coordinator.algorithm import About, Answer, Answers, Arrays, DeviceView, Draft, State
from coordinator.blocks import momentum, norms, pace
from coordinator.blocks.aggregate import covers_of, joined
from coordinator.blocks.fixed import TRAINING, recipe_at
from coordinator.blocks.nesting import rank, whole_of, widths_of
from coordinator.blocks.widths import fractions_of
from coordinator.recipes import merged
from wire.errors import ConfigError
from wire.spec import ModelSpec

ABOUT = About("ours; docs/decisions/fledge.md", "ours", "tests/unit/test_fledge.py")
PARAMS: Mapping[str, float | str] = MappingProxyType(
    {
        **TRAINING,
        "fractions": "0.2 0.4 0.6 0.8 1",
        "ranking_rounds": 1000.0,
        "deadline": 0.0,
        **norms.CALIBRATE,
        "beta": 0.7,
        "recipe.widths": 1.0,
        "recipe.upward": 0.5,
    }
)
"""Names of all parameters with their defaults."""


def init(spec: ModelSpec, weights: Arrays, params: Mapping[str, float | str]) -> State:
    """See `coordinator.algorithm.Algorithm.init`."""
    known = merged(PARAMS, params)
    recipe_at(known, 1)
    widths = widths_of(spec, fractions_of(str(known["fractions"])))
    if not widths:
        raise ConfigError(f"model {spec.name!r} has no prunable channels; fledge needs some, fedavg does not")
    if not float(known["deadline"]) >= 0.0:
        raise ConfigError(f"parameter deadline = {known['deadline']}: write seconds, or 0 for none")
    norms.check(spec, known)
    still = momentum.still(spec, weights, known)
    return State(spec, 0, dict(weights), rank(spec, weights, widths), widths, {"params": known}, still)


def plan(
    state: State, round_number: int, devices: tuple[DeviceView, ...], rng: np.random.Generator
) -> tuple[State, tuple[Draft, ...]]:
    """See `coordinator.algorithm.Algorithm.plan`: rank, then give each device the widest that it can hold, and in time."""
    params = state.scalars["params"]
    if round_number <= params["ranking_rounds"]:
        state = dataclasses.replace(state, levels=rank(state.spec, state.weights, state.widths))
    state = dataclasses.replace(state, round=round_number)
    recipe = recipe_at(params, round_number)
    if norms.due(params, round_number):
        return norms.asked(pace.known(state, devices), recipe, devices, rng)
    return pace.asked(state, recipe, devices, rng, float(params["deadline"]))


def close(state: State, answers: Answers | Iterable[Answer]) -> State:
    """See `coordinator.algorithm.Algorithm.close`. Goes through the answers twice.

    Memory: one sum of the model's size, and the new weights and momentum beside the old ones.

    Raises:
        Malformed: An answer is of another ranking than this round's.
    """
    params, whole = state.scalars["params"], whole_of(state)
    if norms.due(params, state.round):
        return norms.pooled(state, answers)
    if params["deadline"]:
        state = dataclasses.replace(state, scalars=pace.heard(state.scalars, answers))
    heard = len(covers_of(answers, whole)[0])  # the narrowest width is covered by all
    after = joined(state, answers, lambda cover: [1.0 / heard] * len(cover))
    return momentum.carried(state, norms.unmoved(state, after))
