"""FedAvg: every device trains the whole model; the mean of their updates, weighted by samples, is added to it.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017, algorithm 1.
A device whose memory cannot hold the whole model, not even with one sample at a time, is not asked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import numpy as np

from coordinator.algorithm import About, Answer, Answers, Arrays, DeviceView, Draft, State
from coordinator.blocks.aggregate import shares
from coordinator.recipes import merged, recipe_of, scheduled
from wire.errors import Malformed
from wire.memory import fit
from wire.spec import ModelSpec, Structure
from wire.structure import paste_add

ABOUT = About("McMahan et al., AISTATS 2017", "baseline", "tests/unit/test_fedavg.py")
PARAMS: Mapping[str, float | str] = MappingProxyType(
    {
        "schedule": "constant",
        "recipe.rule": "sgd",
        "recipe.epochs": 2.0,
        "recipe.batch": 32.0,
        "recipe.rate": 0.1,
        "recipe.momentum": 0.9,
        "recipe.decay": 0.0,
        "recipe.clip": 2.0,
    }
)
"""Names of all parameters with their defaults."""


def init(spec: ModelSpec, weights: Arrays, params: Mapping[str, float | str]) -> State:
    """See `coordinator.algorithm.Algorithm.init`."""
    known = merged(PARAMS, params)
    scheduled(recipe_of(known), str(known["schedule"]), 1)
    return State(spec, 0, dict(weights), scalars={"params": known})


def plan(
    state: State, round_number: int, devices: tuple[DeviceView, ...], rng: np.random.Generator
) -> tuple[State, tuple[Draft, ...]]:
    """See `coordinator.algorithm.Algorithm.plan`."""
    params = state.scalars["params"]
    recipe = scheduled(recipe_of(params), str(params["schedule"]), round_number)
    drafts = []
    for device in sorted(devices, key=lambda d: d.name):
        seeded = dataclasses.replace(recipe, seed=int(rng.integers(1 << 31)))
        fits = fit(state.spec, (Structure(),), seeded, device.bytes_budget, device.memory_scale)
        if fits is not None:
            drafts.append(Draft(device.name, "train", Structure(), seeded, fits.bytes_bound))
    return dataclasses.replace(state, round=round_number), tuple(drafts)


def close(state: State, answers: Answers | Iterable[Answer]) -> State:
    """See `coordinator.algorithm.Algorithm.close`.

    Memory: one sum of the model's size.

    Raises:
        Malformed: An answer is not about the whole model.
    """
    samples = []
    for answer in answers:
        if answer.structure != Structure():
            raise Malformed(f"{answer.device} answers with a part of the model; FedAvg asked for all of it")
        samples.append(answer.samples)
    if not sum(samples):
        return state
    total = {name: np.zeros_like(array) for name, array in state.weights.items()}
    for answer, share in zip(answers, shares(samples), strict=True):
        paste_add(state.spec, total, answer.update, Structure(), share)
    return dataclasses.replace(state, weights={name: array + total[name] for name, array in state.weights.items()})
