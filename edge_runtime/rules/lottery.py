"""Trains this device's own lottery ticket: a mask that grows sparser while the model does well here, rewound each time.

LotteryFL (Li et al., "LotteryFL: Personalized and Communication-Efficient Federated Learning with Lottery Ticket Hypothesis
on Non-IID Datasets", 2020), algorithm 1: mask the received model; if it is right on more than ``threshold`` of the device's
samples and the mask keeps more than ``target``, leave out the fraction ``prune`` of smallest magnitude of what each weight
keeps, and set what is left to the ticket theta_0; train with the mask; send what the mask keeps.
Biases and norms have no mask.

The ticket is *what this device received at its first order*, kept in the device's own state beside the mask. For a device
of the first round these are the initial weights, as in the paper; one that joins later rewinds to the model of then (late
rewinding: Frankle et al., "Stabilizing the Lottery Ticket Hypothesis", 2019), because the model is all that it is sent.

Accuracy is measured on the training samples, as a device need not hold any others.

Knobs of the recipe: ``threshold`` (default 0.2), ``target`` (0.1), ``prune`` (0.2), each from 0 to 1.

The reply's metrics: ``accuracy.ticket`` before training and before a cut, ``density`` of the mask, ``pruned`` 1 or 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engines.arrays import Arrays, Floats, Labels
from edge_runtime.rules import Extra, Task, Trained, loop
from wire.errors import SpecError
from wire.masks import Mask
from wire.memory import copies

__all__ = ["NEEDS_ENGINE", "copies", "train"]

NEEDS_ENGINE = True

_MASK, _TICKET = "mask/", "ticket/"
_DEFAULTS = {"threshold": 0.2, "target": 0.1, "prune": 0.2}


def train(task: Task) -> Trained:
    """See `edge_runtime.rules.Rule.train`.

    Memory: received weights, ticket and mask, the mask twice at the end, and a byte per weight.

    Raises:
        SpecError: A knob makes no sense, or the order has masks of its own.
    """
    if task.masks:
        raise SpecError("rule lottery has a mask of this device; the order brings another")
    knobs = {name: _knob(task, name) for name in _DEFAULTS}
    params = task.engine.params
    received = {name: array.copy() for name, array in params.items()}
    masks, ticket = _recalled(task, received)
    _apply(params, masks)
    metrics = {"pruned": 0.0}
    if len(task.x):
        metrics["accuracy.ticket"] = accuracy = _accuracy(task)
        if accuracy > knobs["threshold"] and density(masks) > knobs["target"]:
            masks = {name: pruned(params[name], mask, knobs["prune"]) for name, mask in masks.items()}
            for name, array in params.items():
                array[...] = ticket[name]
            _apply(params, masks)
            metrics["pruned"] = 1.0
    metrics["density"] = density(masks)
    mover = loop.Mover(task)

    def step(x: Floats, y: Labels) -> float:
        loss = mover.step(x, y)
        _apply(params, masks)
        return loss

    trained = loop.run(task, step)
    update = {name: _moved(array, received[name], masks.get(name)) for name, array in params.items()}
    received.clear()
    own = {_TICKET + name: array for name, array in ticket.items()}
    own |= {_MASK + name: mask.astype(np.float32) for name, mask in masks.items()}
    return dataclasses.replace(trained, metrics=metrics, own=own, update=update)


def pruned(weights: Floats, mask: Mask, fraction: float) -> Mask:
    """Leave out the floor of `fraction` of what is kept: the smallest magnitudes, of equal ones those that stand first.

    Args:
        weights: Any shape.
        mask: Of that shape.
        fraction: From 0 to 1.

    Cost: a sort of what is kept.
    """
    kept = np.flatnonzero(mask)
    order = np.argsort(np.abs(weights.reshape(-1)[kept]), kind="stable")
    narrower = mask.copy()
    narrower.reshape(-1)[kept[order[: int(fraction * len(kept))]]] = False
    return narrower


def density(masks: Mapping[str, NDArray[Any]]) -> float:
    """Give the kept fraction of all weights that have a mask; 1 when none has."""
    total = sum(mask.size for mask in masks.values())
    return sum(int(np.count_nonzero(mask)) for mask in masks.values()) / total if total else 1.0


def _recalled(task: Task, received: Arrays) -> tuple[dict[str, Mask], Mapping[str, Floats]]:
    """Give mask and ticket; at a first order all is kept, and the ticket is what was received."""
    weights = [name for name, array in received.items() if array.ndim > 1]
    if any(_TICKET + name not in task.own for name in received):
        return {name: np.ones(received[name].shape, np.bool_) for name in weights}, dict(received)
    masks = {name: task.own[_MASK + name] != 0 for name in weights}
    return masks, {name: task.own[_TICKET + name] for name in received}


def _apply(params: Arrays, masks: Mapping[str, Mask]) -> None:
    for name, mask in masks.items():
        np.multiply(params[name], mask, out=params[name])


def _moved(array: Floats, received: Floats, mask: Mask | None) -> Extra:
    """Give trained minus received weights where the mask keeps them."""
    if mask is None or mask.all():
        return Extra(array - received)
    places = np.flatnonzero(mask)
    return Extra(array.reshape(-1)[places] - received.reshape(-1)[places], places)


def _accuracy(task: Task) -> float:
    _, right = task.engine.evaluate(task.x, task.y, task.micro_batch)
    return right / len(task.x)


def _knob(task: Task, name: str) -> float:
    value = task.recipe.knobs.get(name, _DEFAULTS[name])
    if not 0 <= value <= 1:
        raise SpecError(f"knob {name} = {value}: write a number from 0 to 1")
    return value
