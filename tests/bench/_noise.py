"""Weights, masks and batches of noise for whole models, the same at every call. Loads numpy only."""

from __future__ import annotations

from typing import Any

import numpy as np

from wire.spec import ModelSpec, Structure, tensor_shapes

Array = np.ndarray[Any, Any]
BATCH = 20


def batch(spec: ModelSpec) -> tuple[Array, Array]:
    """Draw inputs and labels."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((BATCH, *spec.input_shape), np.float32)
    return x, rng.integers(0, spec.classes, BATCH)


def weights(spec: ModelSpec, seed: int = 1) -> dict[str, Array]:
    """Draw all weights, small enough to train on noise."""
    rng = np.random.default_rng(seed)
    found = {}
    shapes = tensor_shapes(spec, Structure())
    for tensor in spec.tensors:
        scale = (2.0 / tensor.fan_in) ** 0.5 if tensor.init in ("kaiming", "fan") else 0.0
        noise = np.float32(scale) * rng.standard_normal(shapes[tensor.name], np.float32)
        found[tensor.name] = noise + np.float32(tensor.init == "ones")
    return found


def masks(spec: ModelSpec, density: float, *, first: bool = True, seed: int = 2) -> dict[str, Array]:
    """Draw random, uniform masks for the weights of all linear layers and convolutions.

    Args:
        spec: The model.
        density: Expected share of each that is kept.
        first: Whether the first layer has one too. Biases and norms have none.
        seed: Of the masks.
    """
    rng = np.random.default_rng(seed)
    shapes = tensor_shapes(spec, Structure())
    layers = [node for node in spec.nodes if node.op in ("linear", "conv2d")]
    found = {}
    for node in layers if first else layers[1:]:
        name = node.params["weight"]
        mask = np.empty(shapes[name], np.bool_)
        for row in mask.reshape(len(mask), -1):  # by row: nothing that is as large as a weight
            row[:] = rng.random(row.size, np.float32) < density
        found[name] = mask
    return found
