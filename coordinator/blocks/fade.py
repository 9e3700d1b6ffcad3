"""What the rest of a model hears of channels that nobody trains: less and less.

Where all devices prune, most channels of the whole model are as they were drawn, and what is read of them disturbs those that
were trained: the whole model is then worse than its own sub-models. So what is read of them fades. What makes them does
not: a channel from which nothing is read has a gradient in what reads it, so that it is there when it is asked for, and
a model that is given wider sub-models goes on from what it knew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wire.spec import ModelSpec


def faded(
    spec: ModelSpec,
    weights: Mapping[str, NDArray[Any]],
    levels: Mapping[str, NDArray[np.uint8]],
    widest: int,
    share: float,
) -> dict[str, NDArray[Any]]:
    """Take a share from every weight that reads a channel which a round did not train.

    Those are the weights of all axes after the first, which is that of what a weight makes. All rows fade alike, those of
    channels that were not trained too: otherwise the trained ones would fall behind when channels are ranked by the sums of
    their weights. The table of an embedding reads no channels.

    Args:
        spec: The model.
        weights: Whole arrays in canonical order; not changed.
        levels: By group, the narrowest capacity that has each channel.
        widest: The widest capacity that was trained.
        share: From 0, which changes nothing, to 1.

    Returns:
        New weights; those of which nothing fades are the same arrays. Cost: one product per weight that reads channels.
    """
    tables = {name for node in spec.nodes if node.op == "embedding" for name in node.params.values()}
    found = dict(weights)
    for tensor in spec.tensors:
        for place, axis in enumerate(tensor.axes):
            if place == 0 or axis.group not in levels or tensor.name in tables:
                continue
            kept = np.where(levels[axis.group] <= widest, np.float32(1.0), np.float32(1.0 - share))
            if kept.min() < 1.0:
                line = np.tile(np.repeat(kept, axis.inner), axis.outer)
                shape = [-1 if k == place else 1 for k in range(len(tensor.axes))]
                found[tensor.name] = found[tensor.name] * line.reshape(shape)
    return found
