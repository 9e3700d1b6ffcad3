"""Trains this device's own narrow model: channels go while it does well here, and what others lack stays as it is here.

Hermes (Li et al., "Hermes: An Efficient Federated Learning Framework for Heterogeneous Mobile Clients", MobiCom 2021). One
order is:

1. Take the shared weights where they are shared, and this device's own everywhere else. The coordinator says with the knobs
   ``shared.*`` (`wire.channels.to_words`) which channels all devices of this device's last round kept: the weights between
   these were averaged. Without these knobs, or when nothing is remembered here, the whole received model is the start.
2. If the model is right on at least ``threshold`` of the device's samples and fewer than ``target`` of the channels are gone,
   take out of each axis group the fraction ``prune`` of those that are left, rounded up: those of smallest L1 norm of the
   weights that make them. A channel goes with its bias, its norm and all that reads it. Never more than ``target`` of a group
   goes, and never all of it.
3. Train what is left, with a group lasso of strength ``lambda`` on its channels (the pull of the rule `grouplasso`).
4. Send what is left: trained minus *received* weights, so that the coordinator's mean is one of weights.

Accuracy is measured on the training samples, as a device need not hold any others (the rule `lottery` does the same). The
masked model stays in the engine, so the worker's ``accuracy.after`` is the personal model's; ``accuracy.before`` is that of
the shared model as it came.

A group norm takes its mean over all places, also those of channels that are gone.

Knobs: ``threshold`` (default 0.5), ``target`` (0.5), ``prune`` (0.2), each from 0 to 1; ``lambda`` (at least 0, 0.001).

The reply's metrics: ``accuracy.own`` before training and before a cut, ``channels`` the kept fraction of all channels, and
``pruned`` 1 if any went, else 0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engines.arrays import Floats, Labels
from edge_runtime.rules import Extra, Task, Trained, loop
from edge_runtime.rules.grouplasso import add_pull
from wire.channels import Kept, all_kept, from_words, tensor_masks
from wire.errors import SpecError
from wire.masks import Mask
from wire.memory import copies
from wire.spec import ModelSpec, Structure

__all__ = ["NEEDS_ENGINE", "copies", "train"]

NEEDS_ENGINE = True

SHARED = "shared."
_KEPT, _OWN = "kept/", "own/"
_DEFAULTS = {"threshold": 0.5, "target": 0.5, "prune": 0.2}


def train(task: Task) -> Trained:
    """See `edge_runtime.rules.Rule.train`. Gradients are held throughout, because the penalty's are added to them.

    Memory: received and own weights, a byte per weight; at the end 12 bytes per weight that is sent of a cut tensor, instead
    of the received ones.

    Raises:
        SpecError: A knob makes no sense, or the order has masks or a width.
    """
    engine = task.engine
    if task.masks or engine.structure != Structure():
        raise SpecError("rule selfprune cuts channels of its own out of the whole model; the order brings a part of it")
    knobs = {name: _knob(task, name, 1.0) for name in _DEFAULTS}
    strength = _knob(task, "lambda", math.inf, 1e-3)
    received = {name: array.copy() for name, array in engine.params.items()}
    kept = _recalled(task)
    masks = tensor_masks(engine.spec, kept)
    _apply(engine.params, masks)
    metrics = {"pruned": 0.0}
    if len(task.x):
        _, right = engine.evaluate(task.x, task.y, task.micro_batch)
        metrics["accuracy.own"] = accuracy = right / len(task.x)
        if accuracy >= knobs["threshold"] and 1.0 - channels(kept) < knobs["target"]:
            before = channels(kept)
            kept = cut(engine.spec, engine.params, kept, prune=knobs["prune"], target=knobs["target"])
            masks = tensor_masks(engine.spec, kept)
            _apply(engine.params, masks)
            metrics["pruned"] = float(
                channels(kept) < before
            )  # the target of a group may be reached before that of all
    metrics["channels"] = channels(kept)
    trained = _train(task, masks, strength)
    own = {_OWN + name: _copied(array, task.own.get(_OWN + name)) for name, array in engine.params.items()}
    own |= {_KEPT + name: flags.astype(np.float32) for name, flags in kept.items()}
    update = {n: _moved(array, received.pop(n), masks.get(n)) for n, array in engine.params.items()}
    return dataclasses.replace(trained, metrics=metrics, own=own, update=update)


def channels(kept: Kept) -> float:
    """Give the kept fraction of all channels; 1 when none may go."""
    total = sum(flags.size for flags in kept.values())
    return sum(int(np.count_nonzero(flags)) for flags in kept.values()) / total if total else 1.0


def cut(spec: ModelSpec, weights: Mapping[str, Floats], kept: Kept, *, prune: float, target: float) -> dict[str, Mask]:
    """Take channels out: of each group ``ceil(prune * left)``, but never more than `target` of it in all, and never all.

    Args:
        spec: The model.
        weights: Whole arrays with zeros where nothing is kept.
        kept: What is kept so far.
        prune: Fraction of what is left.
        target: Fraction of the whole group.

    Returns:
        What is left; of equal norms the channel that stands first stays. New arrays.
    """
    norms, result = channel_norms(spec, weights), {}
    for name, flags in kept.items():
        left = int(np.count_nonzero(flags))
        least = max(1, math.ceil((1.0 - target) * flags.size - 1e-9))
        count = min(left, max(least, left - math.ceil(prune * left - 1e-9)))
        order = np.lexsort((np.arange(flags.size), -norms[name], ~flags))
        result[name] = np.zeros(flags.size, np.bool_)
        result[name][order[:count]] = True
    return result


def channel_norms(spec: ModelSpec, weights: Mapping[str, Floats]) -> dict[str, NDArray[np.float64]]:
    """Sum by prunable group the magnitudes of all weights that make each channel, float64 ``(size,)``.

    They are the tensors of two or more dimensions whose first follows the group; where there are none, those with the group in
    any dimension. Biases and norms do not count.
    """
    norms = {}
    for group in spec.groups:
        if not group.prunable:
            continue
        found = [t for t in spec.tensors if len(t.axes) > 1 and t.axes[0].group == group.name]
        found = found or [t for t in spec.tensors if len(t.axes) > 1 and any(a.group == group.name for a in t.axes)]
        norms[group.name] = np.zeros(group.size, np.float64)
        for tensor in found:
            place = next(i for i, axis in enumerate(tensor.axes) if axis.group == group.name)
            others = tuple(i for i in range(len(tensor.axes)) if i != place)
            line = np.abs(weights[tensor.name]).sum(axis=others, dtype=np.float64)
            norms[group.name] += line.reshape(tensor.axes[place].outer, -1, tensor.axes[place].inner).sum(axis=(0, 2))
    return norms


def _recalled(task: Task) -> Kept:
    """Put the device's own weights back where they are not shared; give the channels that it keeps."""
    engine = task.engine
    kept = all_kept(engine.spec)
    words = {n.removeprefix(SHARED): value for n, value in task.recipe.knobs.items() if n.startswith(SHARED)}
    names = [*(_KEPT + name for name in kept), *(_OWN + name for name in engine.params)]
    if not words or any(name not in task.own for name in names):
        return kept
    shared = tensor_masks(engine.spec, from_words(engine.spec, words))
    for name, mask in shared.items():
        np.copyto(engine.params[name], task.own[_OWN + name], where=~mask)
    return {name: task.own[_KEPT + name] != 0 for name in kept}


def _train(task: Task, masks: Mapping[str, Mask], strength: float) -> Trained:
    params, grads, mover = task.engine.params, task.engine.grads, loop.Mover(task)

    def whole() -> None:
        if strength:
            add_pull(params, grads, strength)
        _apply(grads, masks)  # so that clipping, momentum and decay never see what is gone

    def step(x: Floats, y: Labels) -> float:
        return mover.step(x, y, whole=whole)

    return loop.run(task, step)


def _apply(arrays: Mapping[str, Floats], masks: Mapping[str, Mask]) -> None:
    for name, mask in masks.items():
        if name in arrays:  # statistics of a norm have no gradient
            np.multiply(arrays[name], mask, out=arrays[name])


def _copied(array: Floats, into: Floats | None) -> Floats:
    if into is None or into.shape != array.shape:
        return array.copy()
    np.copyto(into, array)
    return into


def _moved(array: Floats, received: Floats, mask: Mask | None) -> Extra:
    """Give trained minus received weights where the mask keeps them; `received` is written to."""
    np.subtract(array, received, out=received)
    if mask is None:
        return Extra(received)
    places = np.flatnonzero(mask)
    return Extra(received.reshape(-1)[places], places)


def _knob(task: Task, name: str, most: float, default: float | None = None) -> float:
    value = task.recipe.knobs.get(name, _DEFAULTS.get(name, 0.0) if default is None else default)
    if not 0 <= value <= most:
        wanted = "write a number from 0 to 1" if most == 1.0 else "write a number, at least 0"
        raise SpecError(f"knob {name} = {value}: {wanted}")
    return value
