"""Fledge: our own. Nested widths that take turns in every step, and teach each other what a device's own labels lack.

With uneven data the trouble of nested widths is at both ends. The narrow widths are neglected where wide devices train only
the wide one, and what only wide widths have is trained by few devices, on few classes. Here

* channels are ranked as in NestFL, by progressive L1 pruning; each device trains the widest width that its memory holds and,
  with ``deadline`` or ``slack``, whose turn is over in time, judged by its own turns (`blocks.pace`);
* in every step a device also trains a random narrower width and the narrowest, one after the other from the widest down
  (``recipe.widths``). The widest also learns from what the narrowest says of the batch, as that knows what all devices have
  seen; the narrower ones from what the widest says. The share of that is what the device's own labels lack, times
  ``recipe.mutual`` (the rule `sgd`). It costs two numbers for each class and sample of a batch, and a pass;
* every device has the same say in what it covers, however many samples it has;
* every ``personal_every`` rounds a device goes on, once its update is written, to make the model that it keeps its own: by its
  class shares and ``recipe.personal`` passes of its width and labels alone (`edge_runtime.tuning`). In the other rounds it
  keeps what it has trained;
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
from coordinator.blocks import affines, momentum, norms, pace
from coordinator.blocks.aggregate import evenly, joined
from coordinator.blocks.fixed import TRAINING, recipe_at
from coordinator.blocks.nesting import rank, widths_of
from coordinator.blocks.widths import fractions_of
from coordinator.recipes import merged
from wire.errors import ConfigError, SpecError
from wire.head import head_of
from wire.spec import ModelSpec

ABOUT = About("ours; docs/decisions/fledge.md", "ours", "tests/unit/test_fledge.py")
PARAMS: Mapping[str, float | str] = MappingProxyType(
    {
        **TRAINING,
        "recipe.rate": 0.05,
        "fractions": "0.2 0.4 0.6 0.8 1",
        "ranking_rounds": 1000.0,
        **pace.LIMITS,
        **norms.CALIBRATE,
        **affines.NORMS,
        "beta": 0.7,
        "recipe.widths": 1.0,
        "recipe.mutual": 1.0,
        "recipe.personal": 1.0,
        "personal_every": 5.0,
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
    pace.check(known)
    if not float(known["ranking_rounds"]) >= 0.0:
        raise ConfigError(
            f"parameter ranking_rounds = {known['ranking_rounds']}: write a number of rounds, such as 1000"
        )
    _check_own(spec, known)
    norms.check(spec, known)
    affines.check(spec, known)
    sets = affines.begun(spec, weights, widths, known)
    still = momentum.still(spec, {**weights, **affines.named(sets)}, known)
    return State(spec, 0, dict(weights), rank(spec, weights, widths), widths, {"params": known}, still, norms=sets)


def plan(
    state: State, round_number: int, devices: tuple[DeviceView, ...], rng: np.random.Generator
) -> tuple[State, tuple[Draft, ...]]:
    """See `coordinator.algorithm.Algorithm.plan`: rank, then give each device the widest that it can hold, and in time."""
    params = state.scalars["params"]
    if round_number <= params["ranking_rounds"]:
        state = dataclasses.replace(state, levels=rank(state.spec, state.weights, state.widths))
    state = dataclasses.replace(state, round=round_number)
    recipe = affines.told(recipe_at(params, round_number), params)
    if not _tunes(params, round_number):
        knobs = {name: value for name, value in recipe.knobs.items() if name != "personal"}
        recipe = dataclasses.replace(recipe, knobs=knobs)
    if norms.due(params, round_number):
        return norms.asked(pace.known(state, devices), recipe, devices, rng)
    return pace.asked(state, recipe, devices, rng, params)


def close(state: State, answers: Answers | Iterable[Answer]) -> State:
    """See `coordinator.algorithm.Algorithm.close`. Goes through the answers twice.

    Memory: one sum of the model's size, and the new weights and momentum beside the old ones.

    Raises:
        Malformed: An answer is of another ranking than this round's.
    """
    params = state.scalars["params"]
    if norms.due(params, state.round):
        return norms.pooled(state, answers)
    if pace.timed(params) and (_always(params) or not _tunes(params, state.round)):
        state = dataclasses.replace(state, scalars=pace.heard(state.scalars, answers))
    after = joined(state, affines.shared(state, answers), evenly)
    return affines.joined(state, momentum.carried(state, norms.unmoved(state, after)), answers, evenly)


def _check_own(spec: ModelSpec, params: Mapping[str, float | str]) -> None:
    """Refuse here what every device would refuse in each round in which it makes its model its own."""
    every, count = float(params["personal_every"]), float(params["recipe.personal"])
    if every < 0 or not every.is_integer():
        raise ConfigError(f"parameter personal_every = {every:g}: write a whole number, such as 5; 0 for never")
    if count < 0 or not count.is_integer():
        raise ConfigError(f"parameter recipe.personal = {count:g}: write a whole number, such as 1; 0 for never")
    if not every or not count:
        return
    if recipe_at(params, 1).loss != "cross_entropy":
        raise ConfigError("devices make models their own by cross_entropy alone; write personal_every = 0")
    try:
        head_of(spec)
    except SpecError as error:
        raise ConfigError(f"{error}; fledge runs it with personal_every = 0") from None


def _tunes(params: Mapping[str, float | str], round_number: int) -> bool:
    """Say whether devices make their models their own; for a round that calibrates they do so in the one before.

    It takes longer than the other rounds, whose turns tell what is over in time.
    """
    every = int(params.get("personal_every", 0.0)) if params.get("recipe.personal") else 0
    if not every or norms.due(params, round_number):
        return False
    return round_number % every == 0 or (norms.due(params, round_number + 1) and (round_number + 1) % every == 0)


def _always(params: Mapping[str, float | str]) -> bool:
    """Say whether devices do so in every round that trains, so that no other turns tell anything."""
    every = params.get("personal_every")
    return every == 1 or every == params.get("calibrate") == 2
