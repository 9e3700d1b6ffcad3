"""How the weights of a loaded model are read, written and counted where some are masked: the same in every engine."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edge_runtime.engines import Update
from edge_runtime.engines.arrays import Floats
from edge_runtime.engines.masks import Held
from wire.errors import SpecError
from wire.masks import AnyMask, unpacked


def read(params: Mapping[str, Floats], held: Held, name: str) -> Floats:
    """See `edge_runtime.engines.Engine.read`."""
    param = params[name]
    if name in held.layouts:
        return held.layouts[name].to_c_order(param)
    mask = held.masks.get(name)
    return param.flatten() if mask is None else param[mask]


def write(params: Mapping[str, Floats], held: Held, name: str, values: Floats) -> None:
    """See `edge_runtime.engines.Engine.write`.

    Raises:
        SpecError: There are not as many.
    """
    param, mask = params[name], held.masks.get(name)
    size = param.size if mask is None else int(np.count_nonzero(mask))
    if values.shape != (size,):
        raise SpecError(f"values of shape {values.shape} for {name!r}, which takes {size}")
    if name in held.layouts:
        param[...] = held.layouts[name].from_c_order(values)
    elif mask is None:
        param[...] = values.reshape(param.shape)
    else:
        param[mask] = values


def fill(
    params: Mapping[str, Floats],
    held: Held,
    model: tuple[Mapping[str, Floats], Mapping[str, tuple[int, ...]], Mapping[str, AnyMask]],
) -> None:
    """Copy weights into a loaded model.

    Args:
        params: Of the engine; written.
        held: How masked ones are held.
        model: The weights, masked ones in their shape or as their kept values; the shapes of all; and the masks.

    Raises:
        SpecError: One is missing, or has another shape than the structure says.
    """
    arrays, shapes, masks = model
    if arrays.keys() != shapes.keys():
        raise SpecError(f"weights of {sorted(arrays.keys() ^ shapes.keys())[:3]} are missing, or not the model's")
    for name, array in arrays.items():
        if name in masks and array.shape == shapes[name]:
            write(params, held, name, array[unpacked(masks[name])])
        elif name in masks:
            write(params, held, name, array)
        elif array.shape != shapes[name]:
            raise SpecError(f"weights of {name!r} have shape {array.shape}, the structure says {shapes[name]}")
        else:
            params[name][...] = array


def count(params: Mapping[str, Floats], grads: Mapping[str, Floats], held: Held, update: Update | None) -> int:
    """Give the bytes of weights, where they stand, gradients if there are any, and what an update holds."""
    arrays = [params, grads]
    if update is not None:
        arrays += [state for state in (update.velocity, update.anchor) if state is not None]
    index = sum(layout.bytes_index for layout in held.layouts.values())
    masks = sum(mask.nbytes for mask in held.masks.values())
    return index + masks + sum(array.nbytes for found in arrays for array in found.values())
