"""FedAvg: every device trains the whole model; the mean of their updates, weighted by samples, is added to it.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017, algorithm 1.
A device whose memory cannot hold the whole model, not even with one sample at a time, is not asked.

With ``width`` below 1 the model is that much narrower from the start: the first ``ceil(width C)`` channels of every prunable
layer, which is what training one width alone takes. It is the measure of all methods of nested widths. With ``beta`` above 0
the coordinator carries a momentum (`blocks.momentum`), as in the methods of our own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import numpy as np

from coordinator.algorithm import About, Answer, Answers, Arrays, DeviceView, Draft, State
from coordinator.blocks import momentum
from coordinator.blocks.aggregate import counted, covers_of, moved, shares_of, summed
from coordinator.blocks.drafts import drafted
from coordinator.blocks.fixed import TRAINING, ask_to_train, joined, recipe_at
from coordinator.blocks.nesting import whole_of, widths_of
from coordinator.recipes import merged
from wire.errors import ConfigError
from wire.spec import ModelSpec

ABOUT = About("McMahan et al., AISTATS 2017", "baseline", "tests/unit/test_fedavg.py")
PARAMS: Mapping[str, float | str] = MappingProxyType({**TRAINING, "width": 1.0, **momentum.MOMENTUM})
"""Names of all parameters with their defaults."""


def init(spec: ModelSpec, weights: Arrays, params: Mapping[str, float | str]) -> State:
    """See `coordinator.algorithm.Algorithm.init`."""
    known = merged(PARAMS, params)
    recipe_at(known, 1)
    width = float(known["width"])
    if not 0.0 < width <= 1.0:
        raise ConfigError(f"parameter width = {width:g}: write a number above 0 and at most 1, such as 0.2")
    widths = widths_of(spec, (width,)) if width < 1.0 else {}
    if width < 1.0 and not widths:
        raise ConfigError(f"model {spec.name!r} has no prunable channels: it has no width but 1")
    sizes = {group.name: group.size for group in spec.groups}
    levels = {name: (np.arange(sizes[name]) >= count).astype(np.uint8) for name, (count,) in widths.items()}
    return State(spec, 0, dict(weights), levels, widths, {"params": known}, momentum.still(spec, weights, known))


def plan(
    state: State, round_number: int, devices: tuple[DeviceView, ...], rng: np.random.Generator
) -> tuple[State, tuple[Draft, ...]]:
    """See `coordinator.algorithm.Algorithm.plan`."""
    if not state.widths:
        return ask_to_train(state, round_number, devices, rng)
    recipe = recipe_at(state.scalars["params"], round_number)
    drafts = drafted(state.spec, whole_of(state), recipe, devices, rng)
    return dataclasses.replace(state, round=round_number), drafts


def close(state: State, answers: Answers | Iterable[Answer]) -> State:
    """See `coordinator.algorithm.Algorithm.close`.

    Memory: one sum of the model's size.

    Raises:
        Malformed: An answer is not about the whole model, or the width that is trained.
    """
    if not state.widths:
        return momentum.carried(state, joined(state, answers))
    whole = whole_of(state)
    samples = {seat.device: seat.samples for seat in covers_of(answers, whole)[0]}
    if not samples:
        return state
    total = summed(state.spec, state.weights, counted(answers, whole), shares_of(samples))
    return momentum.carried(state, moved(state, total))
