"""FlexCom: every device trains the whole model and sends the largest part of its update that it has time for.

Li et al., "To Talk or to Work: Flexible Communication Compression for Energy Efficient Federated Learning over Heterogeneous
Mobile Edge Devices", INFOCOM 2021, in the way in which FedMP (ICDE 2022) compares with it: a compression ratio for each
device. The paper's ratios follow from energy and channel models that a run here does not have; here they follow from times.

* A device's transfers took ``seconds_turn - seconds``, for the whole model down and what it sent up; so many seconds a byte.
  Both are of its last answer, whatever it was asked for since.
* The deadline is the turn of the slowest device when it sends the fraction ``least``. Every other one sends as large a
  fraction of its entries as meets the same deadline; before anything is measured, ``first``.
* What is not sent stays on the device and is added to the next update (the rule `topk`). The updates' mean is weighted by
  samples; an entry that a device did not send counts as not moved.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from coordinator.algorithm import About, Answer, Answers, Arrays, DeviceView, Draft, State
from coordinator.blocks.aggregate import shares
from coordinator.blocks.drafts import drafted
from coordinator.blocks.fixed import TRAINING, recipe_at
from coordinator.blocks.roster import latest
from coordinator.recipes import merged
from wire.errors import ConfigError, Malformed
from wire.spec import ModelSpec, Structure, parameter_count
from wire.structure import paste_add

ABOUT = About("Li et al., INFOCOM 2021", "baseline", "tests/unit/test_flexcom.py")
PARAMS: Mapping[str, float | str] = MappingProxyType(
    {"first": 0.1, "least": 0.05, **TRAINING, "recipe.rule": "topk"},
)
"""Names of all parameters with their defaults; ``first`` and ``least`` are fractions of the update's entries."""

_PLACE = 2.0
"""What an entry with its place takes on the way up, in whole entries; beyond half of them all are sent without places."""


def init(spec: ModelSpec, weights: Arrays, params: Mapping[str, float | str]) -> State:
    """See `coordinator.algorithm.Algorithm.init`."""
    known = merged(PARAMS, params)
    recipe_at(known, 1)
    first, least = float(known["first"]), float(known["least"])
    if not 0.0 < least <= first <= 1.0:
        raise ConfigError(f"parameters least = {least:g}, first = {first:g}: write 0 < least <= first <= 1")
    return State(spec, 0, dict(weights), scalars={"params": known, "fractions": {}, "sent": {}})


def plan(
    state: State, round_number: int, devices: tuple[DeviceView, ...], rng: np.random.Generator
) -> tuple[State, tuple[Draft, ...]]:
    """See `coordinator.algorithm.Algorithm.plan`."""
    params, size = state.scalars["params"], parameter_count(state.spec, Structure())
    drafts = drafted(state.spec, Structure(), recipe_at(params, round_number), devices, rng)
    asked = {draft.device for draft in drafts}
    fractions = _fractions([d for d in devices if d.name in asked], _sent(state), params)
    scalars = {**state.scalars, "fractions": latest(state.scalars["fractions"], fractions)}
    chosen = tuple(_sending(draft, max(1, math.ceil(fractions[draft.device] * size - 1e-9))) for draft in drafts)
    return dataclasses.replace(state, round=round_number, scalars=scalars), chosen


def close(state: State, answers: Answers | Iterable[Answer]) -> State:
    """See `coordinator.algorithm.Algorithm.close`. Goes through the answers twice: samples, sum.

    Memory: one sum of the model's size.

    Raises:
        Malformed: An answer is not about the whole model.
    """
    samples, sent, asked = [], dict[str, float](), state.scalars["fractions"]
    for answer in answers:
        if answer.structure != Structure():
            raise Malformed(f"{answer.device} answers with a part of the model; it was asked for all of it")
        samples.append(answer.samples)
        if answer.device in asked:
            sent[answer.device] = asked[answer.device]
    state = dataclasses.replace(state, scalars={**state.scalars, "sent": latest(_sent(state), sent)})
    if not sum(samples):
        return state
    total = {name: np.zeros_like(array) for name, array in state.weights.items()}
    for answer, share in zip(answers, shares(samples), strict=True):
        paste_add(state.spec, total, answer.update, Structure(), share)
    return dataclasses.replace(state, weights={name: array + total[name] for name, array in state.weights.items()})


def _sent(state: State) -> Mapping[str, float]:
    """Give the fraction of each device's last answer, which its measured times are about; a later order may be lost."""
    known: Mapping[str, float] = state.scalars.get(
        "sent", state.scalars["fractions"]
    )  # a run of before has these alone
    return known


def _sending(draft: Draft, count: int) -> Draft:
    recipe = dataclasses.replace(draft.recipe, knobs={**draft.recipe.knobs, "k": float(count)})
    return dataclasses.replace(draft, recipe=recipe)


def _fractions(devices: Sequence[DeviceView], sent: Mapping[str, float], params: Mapping[str, Any]) -> dict[str, float]:
    """Give each device's fraction: that which meets the common deadline, or the first one where nothing is measured."""
    least = float(params["least"])
    found = {device.name: float(params["first"]) for device in devices}
    timed = [d for d in devices if d.name in sent and d.seconds_turn > d.seconds > 0.0]
    # Seconds for the whole model one way; a device's link is taken to be as fast up as down.
    way = {d.name: (d.seconds_turn - d.seconds) / (1.0 + _sized(sent[d.name])) for d in timed}
    deadline = max((d.seconds + way[d.name] * (1.0 + _sized(least)) for d in timed), default=0.0)
    for device in timed:
        room = (deadline - device.seconds) / way[device.name] - 1.0
        found[device.name] = 1.0 if room >= 1.0 else max(least, min(room, 1.0) / _PLACE)
    return found


def _sized(fraction: float) -> float:
    """Give the size of what is sent, in whole models."""
    return min(1.0, _PLACE * fraction)
