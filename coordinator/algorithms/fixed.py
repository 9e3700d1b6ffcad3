"""Masks that are there from the start and stay: random ones here, or whatever masks a state is given.

The plainest sparse training there is, and the one that every other method should beat. ``layers`` says how the ``density``
is shared out: ``uniform`` or ``erk`` (Erdos-Renyi kernel, Evci et al., ICML 2020: small layers are kept denser). Which weights
of a layer stay is drawn from ``mask_seed``. At density 1 there are no masks, and this is FedAvg. The lottery-ticket experiment
(`coordinator ticket`) trains its tickets with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import numpy as np

from coordinator.algorithm import About, Answer, Answers, Arrays, DeviceView, Draft, State
from coordinator.blocks.erk import erk_counts, whole_counts
from coordinator.blocks.fixed import TRAINING, ask_to_train, density_of, joined, recipe_at
from coordinator.blocks.masks import random_masks
from coordinator.recipes import merged
from wire.errors import ConfigError
from wire.masked import maskable
from wire.spec import ModelSpec

ABOUT = About("random masks; Evci et al., ICML 2020", "baseline", "tests/unit/test_ticket.py")
PARAMS: Mapping[str, float | str] = MappingProxyType({**TRAINING, "density": 0.1, "layers": "erk", "mask_seed": 0.0})
"""Names of all parameters with their defaults."""


def init(spec: ModelSpec, weights: Arrays, params: Mapping[str, float | str]) -> State:
    """See `coordinator.algorithm.Algorithm.init`."""
    known = merged(PARAMS, params)
    recipe_at(known, 1)
    density, seed = density_of(known), float(known["mask_seed"])
    if known["layers"] not in ("uniform", "erk"):
        raise ConfigError(f"parameter layers = {known['layers']!r}: write uniform or erk")
    if seed < 0 or not seed.is_integer():
        raise ConfigError(f"parameter mask_seed = {seed:g}: write a whole number, at least 0")
    state = State(spec, 0, dict(weights), scalars={"params": known})
    if density == 1.0:
        return state
    shapes = {name: weights[name].shape for name in maskable(spec)}
    sizes = {name: weights[name].size for name in shapes}
    count = round(density * sum(sizes.values()))
    if known["layers"] == "erk":
        counts = erk_counts(shapes, count)
    else:
        counts = whole_counts({name: density * size for name, size in sizes.items()}, sizes, count)
    return dataclasses.replace(state, masks=random_masks(shapes, counts, np.random.default_rng(int(seed))))


def plan(
    state: State, round_number: int, devices: tuple[DeviceView, ...], rng: np.random.Generator
) -> tuple[State, tuple[Draft, ...]]:
    """See `coordinator.algorithm.Algorithm.plan`."""
    return ask_to_train(state, round_number, devices, rng)


def close(state: State, answers: Answers | Iterable[Answer]) -> State:
    """See `coordinator.algorithm.Algorithm.close`.

    Raises:
        Malformed: An answer is of other masks than were asked for.
    """
    return joined(state, answers)
