"""NestFL: nested widths of one model, each device the widest that its memory holds; joined partition by partition.

NestFL, MobiCom 2022 poster, doi 10.1145/3495243.3558248. The poster gives no equations; docs/decisions/nestfl.md says what was
filled in and why.

* Channels are ranked by progressive L1 pruning, from the smallest pruning rate to the largest, so that every width
  contains the narrower ones. The ranking is renewed in the first ``ranking_rounds`` rounds and stays from then on.
* Joining goes partition by partition, from the narrowest width outward. On each, a device's weight is its samples times a
  function of the angle between its update and the mean update of all that cover the partition (FedAdp; ``angle`` is that
  function's steepness, and 0 leaves only the samples), the angle being averaged over the device's own rounds.
* A device trains the widest width that its memory holds and, where ``deadline`` (seconds) or ``slack`` (times the turn of the
  round's median device) is set, that is over by then, judged by the turns that were measured there (`blocks.pace`). A device
  that drops to a narrower width while it trains is joined on what it then covers.
* The recipe's ``widths`` and ``distil`` train narrower widths inside each device as well (see the rule `sgd`). The poster has
  nothing like it; without it (``recipe.widths`` 0) the narrow widths, and now and then the whole model, fail on uneven data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from coordinator.algorithm import About, Answer, Answers, Arrays, DeviceView, Draft, State
from coordinator.blocks import affines, momentum, norms, pace
from coordinator.blocks.aggregate import Covers, add_up, by_samples, counted, covers_of, moved, shares
from coordinator.blocks.angles import angle, angle_weights, inner_product, smoothed
from coordinator.blocks.nesting import partition, rank, whole_of, widths_of
from coordinator.blocks.roster import latest
from coordinator.blocks.widths import fractions_of
from coordinator.recipes import merged, recipe_of, scheduled
from wire.errors import ConfigError
from wire.norms import learnt
from wire.spec import ModelSpec, Structure

ABOUT = About("NestFL, MobiCom 2022 (poster)", "paper", "tests/unit/test_nestfl.py")
PARAMS: Mapping[str, float | str] = MappingProxyType(
    {
        "fractions": "0.2 0.4 0.6 0.8 1",
        "ranking_rounds": 1000.0,
        "angle": 5.0,
        **pace.LIMITS,
        **norms.CALIBRATE,
        **affines.NORMS,
        **momentum.MOMENTUM,
        "schedule": "constant",
        "recipe.rule": "sgd",
        "recipe.epochs": 2.0,
        "recipe.batch": 32.0,
        "recipe.rate": 0.1,
        "recipe.momentum": 0.9,
        "recipe.decay": 0.0,
        "recipe.clip": 2.0,
        "recipe.widths": 1.0,
        "recipe.distil": 0.0,
    }
)
"""Names of all parameters with their defaults. The recipe was tuned on digits; docs/decisions/nestfl.md has the figures."""

_ANGLE_MAX = 100.0
"""Beyond some hundreds the exponentials of the angle weights have no number."""


@dataclass(frozen=True, slots=True)
class _Part:
    """What the mean update is on one partition.

    Attributes:
        mean: Views of it, box by box.
        square: Its squared length.
    """

    mean: tuple[NDArray[np.float32], ...]
    square: float


def init(spec: ModelSpec, weights: Arrays, params: Mapping[str, float | str]) -> State:
    """See `coordinator.algorithm.Algorithm.init`."""
    known = merged(PARAMS, params)
    scheduled(recipe_of(known), str(known["schedule"]), 1)
    widths = widths_of(spec, fractions_of(str(known["fractions"])))
    if not widths:
        raise ConfigError(f"model {spec.name!r} has no prunable channels; nestfl needs some, fedavg does not")
    pace.check(known)
    if not float(known["ranking_rounds"]) >= 0.0:
        raise ConfigError(
            f"parameter ranking_rounds = {known['ranking_rounds']}: write a number of rounds, such as 1000"
        )
    if not 0.0 <= float(known["angle"]) <= _ANGLE_MAX:
        raise ConfigError(f"parameter angle = {known['angle']}: write a number from 0 to {_ANGLE_MAX:g}, such as 5")
    norms.check(spec, known)
    affines.check(spec, known)
    levels = rank(spec, weights, widths)
    scalars, sets = {"params": known, "clients": []}, affines.begun(spec, weights, widths, known)
    still = momentum.still(spec, {**weights, **affines.named(sets)}, known)
    return State(spec, 0, dict(weights), levels, widths, scalars, still, norms=sets)


def plan(
    state: State, round_number: int, devices: tuple[DeviceView, ...], rng: np.random.Generator
) -> tuple[State, tuple[Draft, ...]]:
    """See `coordinator.algorithm.Algorithm.plan`: rank, then give each device the widest that it can hold, and in time."""
    params = state.scalars["params"]
    if round_number <= params["ranking_rounds"]:
        state = dataclasses.replace(state, levels=rank(state.spec, state.weights, state.widths))
    recipe = affines.told(scheduled(recipe_of(params), str(params["schedule"]), round_number), params)
    state = dataclasses.replace(state, round=round_number)
    if norms.due(params, round_number):
        return norms.asked(pace.known(state, devices), recipe, devices, rng)
    return pace.asked(state, recipe, devices, rng, params)


def close(state: State, answers: Answers | Iterable[Answer]) -> State:
    """See `coordinator.algorithm.Algorithm.close`. Goes through the answers three times: mean, angles, sum.

    Memory: one sum of the model's size, which becomes the new weights, and one answer.

    Raises:
        Malformed: An answer is of another ranking than this round's.
    """
    if norms.due(state.scalars["params"], state.round):
        return norms.pooled(state, answers)
    if pace.timed(state.scalars["params"]):
        state = dataclasses.replace(state, scalars=pace.heard(state.scalars, answers))
    whole, shared = whole_of(state), affines.shared(state, answers)
    covers = covers_of(shared, whole)
    if not covers[0]:
        return state
    before, total = state, {name: np.zeros_like(array) for name, array in state.weights.items()}
    means = [shares([seat.samples for seat in cover]) if cover else [] for cover in covers]
    add_up(state.spec, total, counted(shared, whole), covers, means)
    parts = _parts(learnt(state.spec), total, whole)
    angles = dict(map(partial(_angles, learnt(state.spec), parts), counted(shared, whole)))
    del parts  # views of the mean, which would keep it beside the new weights
    state = _remembered(state, covers, angles)
    for array in total.values():
        array[...] = 0.0
    add_up(state.spec, total, counted(shared, whole), covers, _weights(state, covers))
    after = momentum.carried(state, norms.unmoved(state, moved(state, total)))
    return affines.joined(before, after, answers, by_samples)


def _angles(spec: ModelSpec, parts: Sequence[_Part], answer: Answer) -> tuple[str, list[float]]:
    """Measure the angle between a device's update and the mean on each partition that it covers."""
    found = []
    for capacity, part in enumerate(parts[: answer.structure.capacity + 1]):
        dot = square_own = 0.0
        own_parts = partition(spec, answer.update, answer.structure, capacity)
        for target, own in zip(part.mean, own_parts, strict=True):
            dot += inner_product(target, own)
            square_own += inner_product(own, own)
        found.append(angle(dot, part.square, square_own))
    return answer.device, found


def _parts(spec: ModelSpec, mean: Arrays, whole: Structure) -> list[_Part]:
    """Cut the mean update into partitions, once for all answers that are held against it."""
    found = []
    for capacity in range(whole.capacity + 1):
        boxes = tuple(partition(spec, mean, whole, capacity))
        square = 0.0
        for box in boxes:
            square += inner_product(box, box)
        found.append(_Part(boxes, square))
    return found


def _remembered(state: State, covers: Covers, angles: Mapping[str, list[float]]) -> State:
    """Average each device's angles over its own rounds, partition by partition.

    A device that covers a partition alone *is* the mean there. Its angle of 0 says nothing about it and is not remembered.
    """
    old = {name: row for row, name in enumerate(state.scalars["clients"])}
    clients = list(latest(old, dict.fromkeys(sorted(angles), -1)))
    means, counts = _memory(len(clients), len(covers))
    for row, name in enumerate(clients):
        if name in old:
            means[row], counts[row] = state.arrays["angles"][old[name]], state.arrays["rounds"][old[name]]
    row_of = {name: row for row, name in enumerate(clients)}
    for capacity, cover in enumerate(covers):
        for seat in cover if len(cover) > 1 else ():
            at = (row_of[seat.device], capacity)
            means[at] = smoothed(float(means[at]), int(counts[at]), angles[seat.device][capacity])
            counts[at] += 1
    scalars = {**state.scalars, "clients": clients}
    return dataclasses.replace(state, scalars=scalars, arrays={**state.arrays, "angles": means, "rounds": counts})


def _weights(state: State, covers: Covers) -> list[list[float]]:
    row = {name: i for i, name in enumerate(state.scalars["clients"])}
    means, steepness = state.arrays["angles"], float(state.scalars["params"]["angle"])
    return [
        angle_weights([s.samples for s in cover], [float(means[row[s.device], k]) for s in cover], steepness)
        for k, cover in enumerate(covers)
    ]


def _memory(clients: int, capacities: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Give mean angles and how many rounds they are the mean of; both ``(clients, capacities)``."""
    return np.zeros((clients, capacities), np.float64), np.zeros((clients, capacities), np.int64)
