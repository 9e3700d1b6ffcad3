"""How much each weight would matter, told once and nothing trained: SNIP, and with knob ``synflow`` SynFlow.

*SNIP* (Lee et al., ICLR 2019, equations 4 and 6): ``|w * dL/dw|`` at the received weights, which is how much the loss would
change if the weight were gone; ``L`` is the mean over the recipe's batches (``steps`` says how many; the paper takes one).

*SynFlow* (Tanaka et al., NeurIPS 2020, algorithm 1): ``w * dR/dw`` with ``R = 1^T |W_L| ... |W_1| 1``. It reads no data. In
``synflow`` rounds all but ``density ** (k / rounds)`` of the weights are left out, the smallest scores of all layers together,
and what remains is scored again; the last scores are told, and whoever asked keeps ``density`` of them. Biases count as zero,
and so do, for this rule, all tensors of one dimension: a model with norms has no such ``R``, and one where branches meet
must not be scaled by layer, as it is done here against overflow (a layer's factor is a factor of every score, so that masks
are the same).

The weights are the received ones again afterwards; no update is sent.

Knobs of the recipe:

* ``synflow`` (whole number, default 0): rounds of SynFlow, 100 in the paper; 0 for SNIP.
* ``density`` (above 0, at most 1; default 1): where SynFlow's rounds lead to.
* ``top`` (whole number, default 0): tell only so many of the largest scores, with their places; 0 for all.

Metrics: ``score``, the sum of all scores; a score over it is SNIP's normalised one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engines import Engine
from edge_runtime.engines.arrays import Arrays, Floats
from edge_runtime.engines.update import clear
from edge_runtime.rules import Extra, Task, Trained
from edge_runtime.rules.loop import batches, count_steps, share_of
from wire.errors import NonFinite, SpecError
from wire.masks import Mask
from wire.messages import Recipe

NEEDS_ENGINE = True

_BLOCK = 1 << 18
_BITS = 16
_LOWER = (1 << _BITS) - 1


def copies(recipe: Recipe) -> int:
    """Nothing: no momentum; what SynFlow holds is counted by `wire.memory.whole_copies`."""
    del recipe
    return 0


def train(task: Task) -> Trained:
    """See `edge_runtime.rules.Rule.train`; but the weights stay as they are.

    Cost: SNIP one backward pass per batch; SynFlow one of a single sample per round and a few passes over the weights.

    Raises:
        NonFinite: A score is no number.
        SpecError: A knob makes no sense, or masks hold already: scores are for dense weights.
    """
    knobs = _knobs(task.recipe)
    if task.masks:
        raise SpecError("rule score: masks hold already, and scores are for dense weights")
    if not knobs.rounds and not count_steps(task):
        return Trained((), 0, update={})
    with np.errstate(over="ignore", invalid="ignore"):  # what is no number is found by name below
        losses, scores = _synflow(task, knobs) if knobs.rounds else _snip(task)
    total = math.fsum(float(array.sum(dtype=np.float64)) for array in scores.values())
    if not math.isfinite(total):
        raise NonFinite("a score is no number")
    return Trained(losses, 0, _told(scores, knobs.top), {"score": total}, update={})


@dataclass(frozen=True, slots=True)
class _Knobs:
    rounds: int
    density: float
    top: int


def _knobs(recipe: Recipe) -> _Knobs:
    rounds, top = recipe.knobs.get("synflow", 0.0), recipe.knobs.get("top", 0.0)
    density = recipe.knobs.get("density", 1.0)
    if rounds != int(rounds) or not 0 <= rounds <= 10_000:
        raise SpecError(f"knob synflow = {rounds}: write a whole number from 0 to 10000")
    if top != int(top) or top < 0:
        raise SpecError(f"knob top = {top}: write a whole number, 0 for all")
    if not 0 < density <= 1:
        raise SpecError(f"knob density = {density}: write a number above 0 and at most 1")
    return _Knobs(int(rounds), density, int(top))


def _snip(task: Task) -> tuple[tuple[float, ...], Arrays]:
    """Give the mean loss and the scores, which stand where the gradients were."""
    engine, count = task.engine, count_steps(task)
    clear(engine.grads)
    received = {name: array.copy() for name, array in engine.params.items() if name not in engine.grads}
    total = 0.0
    for done, rows in enumerate(batches(task), 1):
        loss = 0.0
        for start in range(0, len(rows), task.micro_batch):
            part = rows[start : start + task.micro_batch]
            share = share_of(task.recipe, len(part), len(rows))
            x, y = task.x[part], task.y[part]
            loss += share * engine.forward_backward(x, y, scale=share / count, loss=task.recipe.loss)
        if not math.isfinite(loss):
            raise NonFinite(f"the loss of batch {done} is {loss}")
        total += loss
        task.tell(done / count, loss)
    for name, array in received.items():  # running statistics of norms, which follow every batch
        engine.params[name][...] = array
    return (total / count,), _products(engine)


def _synflow(task: Task, knobs: _Knobs) -> tuple[tuple[float, ...], Arrays]:
    """Give no loss, and the scores of the last round. Memory: a copy of the weights, and the mask of one tensor."""
    engine = task.engine
    received = {name: array.copy() for name, array in engine.params.items()}
    weights = _weights(engine.params)
    size = sum(array.size for array in weights.values())
    x, y = np.ones((1, *task.x.shape[1:]), np.float32), np.zeros(1, np.int64)
    scores: Arrays = {}
    try:
        for name, array in engine.params.items():
            if name in weights:
                np.abs(array, out=array)
            else:
                array.fill(0.0)
        for k in range(knobs.rounds):
            if k:
                for name, kept in largest(scores, round(size * knobs.density ** (k / knobs.rounds))):
                    np.multiply(weights[name], kept, out=weights[name])
            for weight in weights.values():
                _rescale(weight)
            clear(engine.grads)
            engine.forward_backward(x, y, loss="sum")
            scores = _products(engine)
            task.tell((k + 1) / knobs.rounds, 0.0)
    finally:
        for name, array in received.items():
            engine.params[name][...] = array
    return (), scores


def _rescale(weight: Floats) -> None:
    """Make the mean over outputs of what all inputs bring to one of them 1."""
    gain = float(weight.sum(dtype=np.float64)) / len(weight)
    if gain > 0.0:
        np.multiply(weight, 1.0 / gain, out=weight)


def _weights(arrays: Mapping[str, Floats]) -> Arrays:
    return {name: array for name, array in arrays.items() if array.ndim > 1}


def _products(engine: Engine) -> Arrays:
    """Turn the gradients of weights into ``|w * g|``, in place."""
    scores = _weights(engine.grads)
    for name, array in scores.items():
        np.multiply(array, engine.params[name], out=array)
        np.abs(array, out=array)
    return scores


def _told(scores: Arrays, top: int) -> dict[str, Extra]:
    if not 0 < top < sum(array.size for array in scores.values()):
        return {name: Extra(array) for name, array in scores.items()}
    told = {}
    for name, mask in largest(scores, top):
        places = np.flatnonzero(mask)
        told[name] = Extra(scores[name].reshape(-1)[places], places)
    return told


def largest(scores: Mapping[str, Floats], count: int) -> Iterator[tuple[str, Mask]]:
    """Mark the `count` largest of all scores together; of equal ones the first, by tensor and then by place.

    The bits of floats that are not negative stand in the order of their values. So the least one that is kept is found by
    counting the upper halves of all bits, then the lower halves of those in its class: two passes and no copy.

    Args:
        scores: Contiguous, none negative, none a NaN.
        count: At most as many as there are.

    Yields:
        Every name and its mask of the scores' shape. Cost: O(weights); a megabyte or two beside one mask.
    """
    above, upper = _class(_bits(scores), count)
    inside, lower = _class(_inside(scores, upper), count - above)
    least, ties = (upper << _BITS) | lower, count - above - inside
    for name, array in scores.items():
        bits = _unsigned(array)
        mask = bits > least
        equal = np.flatnonzero(bits == least)[:ties]
        mask[equal] = True
        ties -= len(equal)
        yield name, mask.reshape(array.shape)


def _unsigned(array: Floats) -> NDArray[np.uint32]:
    return array.reshape(-1).view(np.uint32)


def _bits(scores: Mapping[str, Floats]) -> Iterator[NDArray[Any]]:
    """Give the upper halves of all bits, in blocks."""
    for array in scores.values():
        flat = _unsigned(array)
        for start in range(0, flat.size, _BLOCK):
            yield flat[start : start + _BLOCK] >> _BITS


def _inside(scores: Mapping[str, Floats], upper: int) -> Iterator[NDArray[Any]]:
    """Give the lower halves of those bits whose upper half is this one, in blocks."""
    for array in scores.values():
        flat = _unsigned(array)
        for start in range(0, flat.size, _BLOCK):
            block = flat[start : start + _BLOCK]
            yield block[block >> _BITS == upper] & _LOWER


def _class(halves: Iterator[NDArray[Any]], count: int) -> tuple[int, int]:
    """Find the half in which the `count`-th largest lies, and how many lie above it."""
    counts = np.zeros(1 << _BITS, np.int64)
    for block in halves:
        counts += np.bincount(block, minlength=1 << _BITS)
    at_least = np.cumsum(counts[::-1])[::-1]
    found = int(np.flatnonzero(at_least >= max(count, 1))[-1]) if at_least[0] else 0
    return int(at_least[found] - counts[found]), found
