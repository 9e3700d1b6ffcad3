"""Sends the k largest of what has gathered here since it was last sent, and keeps the rest for later.

Han, Wang and Leung, ICDCS 2020, algorithm 1: ``a += gradient``, send the k entries of largest magnitude with their places,
set them to zero here. What gathers is the movement of the weights over all local steps, momentum and decay included, so that
one step of plain SGD gathers ``-rate * gradient``: the paper's a times a constant. Where the rate changes from round to
round, what is left over keeps the rate of the step that made it (as in Stich et al., "Sparsified SGD with Memory", NeurIPS
2018), and an update means the same whoever adds it up.

A device here never hears which of its entries the coordinator took; it may not be asked again for a long time. It sets to
zero all that it sent, and what is not taken is the coordinator's to keep (see `coordinator.algorithms.online`).

Knobs of the recipe:

* ``k`` (whole number, default 0): how many entries are sent; 0, or as many as there are weights, for all.
* ``probe`` (whole number, default 0): with k' > 0 the reply says what this device's own update, cut to k' and to k entries,
  makes of the loss of one batch of its samples: ``loss.start``, ``loss.probe``, ``loss.sent``.

The engine ends with the weights that it was sent, moved by what is sent back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engines.arrays import Arrays, Floats
from edge_runtime.rules import Extra, Task, Trained, loop
from wire.errors import SpecError
from wire.memory import copies

__all__ = ["NEEDS_ENGINE", "copies", "train"]

NEEDS_ENGINE = True

_BLOCK = 1 << 16
_MAGNITUDE = np.uint32((1 << 31) - 1)

Places = Mapping[str, NDArray[np.int64]]


def train(task: Task) -> Trained:
    """See `edge_runtime.rules.Rule.train`.

    Memory: the received weights and what has gathered, beside what the device kept; 12 bytes per entry that is sent.

    Raises:
        SpecError: A knob makes no sense, or weights are masked.
    """
    if task.masks:
        raise SpecError("rule topk sends places in the whole model; it does not train a masked one")
    params = task.engine.params
    size = sum(array.size for array in params.values())
    count, probe = _knob(task, "k", size) or size, _knob(task, "probe", size)
    received = {name: array.copy() for name, array in params.items()}
    trained = loop.run(task, loop.Mover(task).step)
    gathered = _gathered(task, received)
    metrics = {}
    if probe and len(task.x):
        metrics["loss.start"] = _loss(task, received, {}, None)
        metrics["loss.probe"] = _loss(task, received, gathered, largest(gathered, probe))
    places = largest(gathered, count) if count < size else None
    _place(params, received, gathered, places)
    if metrics:
        metrics["loss.sent"] = _mean_loss(task)
    received.clear()  # before what is sent is copied
    update = _taken(gathered, places)
    return dataclasses.replace(trained, metrics=metrics, own=gathered, update=update)


def largest(arrays: Mapping[str, Floats], count: int) -> dict[str, NDArray[np.int64]]:
    """Give the places of the `count` largest magnitudes of all arrays together; of equal ones the first are taken.

    Args:
        arrays: By tensor name, contiguous and finite.
        count: At least 1; all places, if there are fewer.

    Returns:
        Ascending positions in C order, of those tensors that have any.

    Cost: three passes in blocks; 1 MiB of scratch beside the places.
    """
    least, missing = _threshold(arrays, count)
    found = {}
    for name, array in arrays.items():
        bits = _bits(array)
        chosen = bits > least
        equal = np.flatnonzero(bits == least)[:missing]
        chosen[equal] = True
        missing -= len(equal)
        places = np.flatnonzero(chosen)
        if len(places):
            found[name] = places
    return found


def _threshold(arrays: Mapping[str, Floats], count: int) -> tuple[int, int]:
    """Give the bits of the `count`-th largest magnitude, and how many of exactly that magnitude are among the largest."""
    top, left = 0, min(count, sum(array.size for array in arrays.values()))
    for shift in (16, 0):  # bits of positive floats are in the order of the floats
        held = np.zeros(1 << 16, np.int64)
        for array in arrays.values():
            for start in range(0, array.size, _BLOCK):
                bits = _bits(array.reshape(-1)[start : start + _BLOCK])
                if not shift:
                    bits = bits[(bits >> np.uint32(16)) == top] & np.uint32(0xFFFF)
                held += np.bincount((bits >> np.uint32(shift)).astype(np.int64), minlength=1 << 16)
        above = np.cumsum(held[::-1])
        place = int(np.searchsorted(above, left))
        left -= int(above[place - 1]) if place else 0
        top = (top << 16) | (len(held) - 1 - place)
    return top, left


def _bits(array: Floats) -> NDArray[np.uint32]:
    return np.ravel(array).view(np.uint32) & _MAGNITUDE


def _gathered(task: Task, received: Arrays) -> Arrays:
    """Give the movement of this order, on top of what was kept."""
    gathered = {}
    for name, array in task.engine.params.items():
        gathered[name] = moved = array - received[name]
        if name in task.own:
            moved += task.own[name]
    return gathered


def _place(params: Arrays, received: Arrays, gathered: Mapping[str, Floats], places: Places | None) -> None:
    """Set the engine's weights to what was received, moved at some places; None for all."""
    for name, array in params.items():
        array[...] = received[name]
        if places is None and name in gathered:
            np.add(array, gathered[name], out=array)
        elif places is not None and name in places:
            at = places[name]
            array.reshape(-1)[at] += gathered[name].reshape(-1)[at]


def _taken(gathered: Arrays, places: Places | None) -> dict[str, Extra]:
    """Take what is sent out of what has gathered, where zeros stay."""
    if places is None:
        whole = {name: Extra(array.copy()) for name, array in gathered.items()}
        for array in gathered.values():
            array.fill(0.0)
        return whole
    taken = {}
    for name, at in places.items():
        flat = gathered[name].reshape(-1)
        taken[name] = Extra(flat[at], at)
        flat[at] = 0.0
    return taken


def _loss(task: Task, received: Arrays, gathered: Mapping[str, Floats], places: Places | None) -> float:
    _place(task.engine.params, received, gathered, places)
    return _mean_loss(task)


def _mean_loss(task: Task) -> float:
    """Give the mean cross-entropy of one batch, the same for every call."""
    rng = np.random.default_rng([task.recipe.seed, task.round, 1])
    rows = rng.permutation(len(task.x))[: task.recipe.batch]
    loss, _ = task.engine.evaluate(task.x[rows], task.y[rows], task.micro_batch)
    return loss / len(rows)


def _knob(task: Task, name: str, most: int) -> int:
    value = task.recipe.knobs.get(name, 0.0)
    if value != int(value) or value < 0:
        raise SpecError(f"knob {name} = {value}: write a whole number of weights, at least 0")
    return min(int(value), most)
