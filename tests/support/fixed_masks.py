"""The smallest algorithm with masks: they are drawn once and stay, and the mean of the updates is added. For tests."""

from __future__ import annotations

import dataclasses

import numpy as np

from coordinator.algorithm import Draft, State
from coordinator.recipes import merged, recipe_of
from tests.support.orders import some_masks
from wire.structure import masked

PARAMS = {"density": 0.3, "mask_seed": 3.0, "recipe.rule": "sgd", "recipe.batch": 8.0, "recipe.rate": 0.1}


def init(spec, weights, params):
    known = merged(PARAMS, params)
    masks = some_masks(spec, float(known["density"]), int(known["mask_seed"]), ["c.weight", "f.weight"])
    return State(spec, 0, dict(weights), scalars={"params": known}, masks=masks)


def plan(state, round_number, devices, rng):
    drafts = []
    for device in sorted(devices, key=lambda d: d.name):
        recipe = dataclasses.replace(recipe_of(state.scalars["params"]), seed=int(rng.integers(1 << 31)))
        drafts.append(Draft(device.name, "train", masked(state.masks), recipe))
    return dataclasses.replace(state, round=round_number), tuple(drafts)


def close(state, answers):
    total = sum(answer.samples for answer in answers)
    weights = {name: array.astype(np.float64) for name, array in state.weights.items()}
    for answer in answers:
        for name, array in answer.update.items():
            weights[name] += answer.samples / total * array
    return dataclasses.replace(state, weights={name: array.astype(np.float32) for name, array in weights.items()})
