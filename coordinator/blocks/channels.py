"""Channels that carry nothing any more: found over every weight that touches them, and taken out of a model for good."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wire.spec import Axis, ModelSpec

Levels = Mapping[str, NDArray[np.uint8]]
Arrays = Mapping[str, NDArray[Any]]


def largest_weights(spec: ModelSpec, weights: Arrays) -> dict[str, NDArray[np.float32]]:
    """Give the largest magnitude of any weight that makes or reads each channel, by axis group ``(size,)``.

    A channel of an axis group is made by some layers and read by others; those that meet in a sum share their channels. The
    largest of all of them is small only if the channel can go everywhere (PruneTrain's channel union: Lym et al., SC 2019,
    section 4.2). Biases and norms do not count: what they add is lost where nothing reads it.

    Cost: one pass over the weights per dimension that follows a group.
    """
    found = {group.name: np.zeros(group.size, np.float32) for group in spec.groups if group.prunable}
    for tensor in spec.tensors:
        if len(tensor.axes) < 2:
            continue
        magnitudes = np.abs(weights[tensor.name])
        for dimension, axis in enumerate(tensor.axes):
            if axis.group in found:
                others = tuple(i for i in range(magnitudes.ndim) if i != dimension)
                by_channel = _grid(axis, magnitudes.max(axis=others)).max(axis=(0, 2))
                np.maximum(found[axis.group], by_channel, out=found[axis.group])
    return found


def narrowed(
    levels: Levels, magnitudes: Mapping[str, NDArray[np.float32]], threshold: float
) -> dict[str, NDArray[np.uint8]]:
    """Take out the channels of which no weight reaches a threshold; one that is out stays out, and one of a group stays in.

    Args:
        levels: By axis group: 0 for a channel that is in, 1 for one that is out.
        magnitudes: See `largest_weights`.
        threshold: Above 0.

    Returns:
        New levels. Where all of a group would go, its largest channel stays, of equal ones the first.
    """
    result = {}
    for name, level in levels.items():
        stays = (level == 0) & (magnitudes[name] >= threshold)
        if not stays.any():
            stays[np.argmax(np.where(level == 0, magnitudes[name], -1.0))] = True
        result[name] = np.where(stays, 0, 1).astype(np.uint8)
    return result


def without(spec: ModelSpec, weights: Arrays, levels: Levels) -> dict[str, NDArray[np.float32]]:
    """Give the weights with zeros in all channels that are out, biases and norms as well; copies where something changes."""
    result = dict(weights)
    for tensor in spec.tensors:
        for dimension, axis in enumerate(tensor.axes):
            gone = levels[axis.group] != 0 if axis.group in levels else np.zeros(0, np.bool_)
            if gone.any():
                array = result[tensor.name]
                array = array.copy() if array is weights[tensor.name] else array
                line = np.ones(array.shape[dimension], np.float32)
                _grid(axis, line)[:, gone] = 0.0
                array *= line.reshape([-1 if i == dimension else 1 for i in range(array.ndim)])
                result[tensor.name] = array
    return result


def _grid(axis: Axis, line: NDArray[Any]) -> NDArray[Any]:
    """View what stands along one dimension as (outer, channels, inner)."""
    return line.reshape(axis.outer, -1, axis.inner)
