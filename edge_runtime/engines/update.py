"""The arithmetic of `Update` over numpy arrays, in blocks that stay in the cache: no array-sized temporaries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from edge_runtime.engines import Update
from edge_runtime.engines.arrays import Arrays, Floats

BLOCK = 16_384
"""Weights per block: three blocks of float32 fit a small core's second-level cache."""


def apply(params: Mapping[str, Floats], grads: Mapping[str, Floats], update: Update) -> None:
    """Move those of `params` that have gradients along these, whose values are overwritten with what was applied.

    Cost: one pass over the weights, 64 KiB of scratch.
    """
    for name, param in _moved(params, grads):
        move(name, param, grads[name], update)


def move(name: str, param: Floats, gradient: Floats, update: Update, first: int = 0) -> None:
    """Move one weight, or its rows from `first` on, along a gradient whose values are overwritten with what was applied.

    Args:
        name: Of the weight, whose rows of `Update.velocity` and `Update.anchor` these are.
        param: The rows.
        gradient: Of the same shape.
        update: How.
        first: Where the rows begin.
    """
    rows = slice(first, first + len(param))
    velocity = update.velocity[name][rows] if update.momentum and update.velocity is not None else None
    anchor = update.anchor[name][rows] if update.pull and update.anchor is not None else None
    w, g = _flat(param), _flat(gradient)
    v = None if velocity is None else _flat(velocity)
    a = None if anchor is None else _flat(anchor)
    draws = update.decay or a is not None
    scratch = np.empty(min(BLOCK, w.size) if draws else 0, w.dtype)
    for start in range(0, w.size, BLOCK):
        block = slice(start, start + BLOCK)
        some, slope = w[block], g[block]
        if draws:
            _draw(some, slope, scratch[: some.size], update, None if a is None else a[block])
        if v is not None:
            held = v[block]
            held *= update.momentum
            held += slope
            np.multiply(held, update.rate, out=slope)
        else:
            slope *= update.rate
        some -= slope


@dataclass(slots=True)
class Adam:
    """What Adam remembers (Kingma and Ba, ICLR 2015, algorithm 1).

    Attributes:
        first: Running mean of the gradients, by tensor name; written.
        second: Running mean of their squares; written.
        steps: Updates so far.
        decays: How much of both is kept.
        epsilon: Added to the root of the second.
    """

    first: Arrays
    second: Arrays
    steps: int = 0
    decays: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8


def apply_adam(params: Mapping[str, Floats], grads: Mapping[str, Floats], update: Update, state: Adam) -> None:
    """Move `params` by Adam with the rate, the L2 decay and the pull of `update`; `grads` are overwritten.

    Cost: one pass over the weights, 64 KiB of scratch.
    """
    state.steps += 1
    keeps, keeps_square = state.decays
    size = update.rate / (1 - keeps**state.steps)
    root = (1 - keeps_square**state.steps) ** 0.5
    scratch = np.empty(BLOCK, np.float32)
    for name, param in _moved(params, grads):
        arrays = [_flat(array) for array in (param, grads[name], state.first[name], state.second[name])]
        anchor = _flat(update.anchor[name]) if update.pull and update.anchor is not None else None
        for start in range(0, param.size, BLOCK):
            w, g, m, v = (array[start : start + BLOCK] for array in arrays)
            spare = scratch[: w.size]
            _draw(w, g, spare, update, None if anchor is None else anchor[start : start + BLOCK])
            m *= keeps
            m += np.multiply(g, 1 - keeps, out=spare)
            v *= keeps_square
            np.multiply(g, g, out=g)
            v += np.multiply(g, 1 - keeps_square, out=g)
            np.sqrt(v, out=g)
            g /= root
            g += state.epsilon
            np.divide(m, g, out=g)
            g *= size
            w -= g


def _moved(params: Mapping[str, Floats], grads: Mapping[str, Floats]) -> Iterator[tuple[str, Floats]]:
    """Give what has a gradient, in the order of `params`: running statistics have none, and are nowhere moved but there."""
    return ((name, param) for name, param in params.items() if name in grads)


def _draw(w: Floats, g: Floats, spare: Floats, update: Update, anchor: Floats | None) -> None:
    """Add to a block's gradient what draws its weights to zero, and to the anchor."""
    if update.decay:
        np.multiply(w, update.decay, out=spare)
        g += spare
    if anchor is not None:
        np.subtract(w, anchor, out=spare)
        spare *= update.pull
        g += spare


def norm(grads: Mapping[str, Floats]) -> float:
    """Give the Euclidean norm over all gradients: float32 within a block, double precision across blocks."""
    total = 0.0
    for block in _blocks(grads):
        total += float(np.dot(block, block))
    return float(total**0.5)


def multiply(arrays: Mapping[str, Floats], factor: float) -> None:
    """Scale all arrays in place."""
    for array in arrays.values():
        np.multiply(array, factor, out=array)


def clear(arrays: Mapping[str, Floats]) -> None:
    """Set all arrays to zero in place."""
    for array in arrays.values():
        array.fill(0.0)


def finite(arrays: Mapping[str, Floats]) -> bool:
    """Tell whether every value is a number; 16 KiB of scratch."""
    return all(bool(np.isfinite(block).all()) for block in _blocks(arrays))


def _blocks(arrays: Mapping[str, Floats], length: int = 8192) -> Iterator[Floats]:
    # 8192: below the length from which BLAS would split a dot product over threads, whose order is not fixed.
    for array in arrays.values():
        flat = _flat(array)
        for start in range(0, flat.size, length):
            yield flat[start : start + length]


def _flat(array: Floats) -> Floats:
    if not array.flags.c_contiguous:
        raise ValueError("only contiguous arrays can be worked on in place")
    return array.reshape(-1)
