"""PruneFL at a small model, and answers made by hand."""

from __future__ import annotations

import numpy as np

from coordinator.algorithm import Answer, DeviceView, rng_of
from coordinator.algorithms import prunefl
from tests.support.models import random_arrays, small_cnn
from wire.masked import maskable
from wire.messages import Usage
from wire.spec import Structure
from wire.structure import masked

SPEC = small_cnn()
NAMES = maskable(SPEC)
GREAT = 1 << 40
DEVICES = (DeviceView("a", GREAT, 30), DeviceView("b", GREAT, 50))
TIME = "1 0.001 0.001 0.001"


def start(**params):
    known = {name.replace("__", "."): value for name, value in params.items()}
    return prunefl.init(SPEC, random_arrays(SPEC, Structure(), 9), {"time": TIME, **known})


def planned(state, number, devices=DEVICES):
    return prunefl.plan(state, number, devices, rng_of(0, number))


def answer(state, device="a", samples=10, seed=0, z=None, took=(0.0, 0.0), top=None, **metrics):
    """An answer whose importance is given, or random where `z` says ``random``; without, it told none.

    `took`: seconds of training and of the whole turn.
    """
    rng = np.random.default_rng([seed, samples])
    update = {name: np.zeros_like(array) for name, array in state.weights.items()}
    for name, array in update.items():
        kept = state.masks.get(name, np.ones(array.shape, bool))
        array[kept] = 0.01 * rng.standard_normal(int(kept.sum()))
    extras = {}
    if z is not None:
        for name in NAMES:
            line = rng.exponential(size=state.weights[name].size).astype(np.float32) if z == "random" else z[name]
            places = np.arange(line.size)
            if top is not None and name in top and top[name] < line.size:
                places = np.sort(np.argsort(-line, kind="stable")[: top[name]])
            extras[name] = (places, line[places])
            metrics[f"theta.{name}"] = float(line[places].min()) if len(places) < line.size else 0.0
    structure = masked(state.masks) if state.masks else Structure()
    return Answer(device, samples, structure, metrics, Usage(seconds=took[0]), update, {}, extras, seconds_turn=took[1])


def asked(draft):
    return {n.removeprefix("top."): int(v) for n, v in draft.recipe.knobs.items() if n.startswith("top.")}
