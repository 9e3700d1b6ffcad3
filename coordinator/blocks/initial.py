"""The weights that a run begins with."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from wire.errors import SpecError
from wire.spec import ModelSpec, Structure, tensor_shapes


def initial_weights(spec: ModelSpec, seed: int) -> dict[str, NDArray[np.float32]]:
    """Draw all weights of a model, the same on every machine.

    Each tensor has a source of its own, of (seed, place in the spec), so that one tensor more changes no other.

    Args:
        spec: The model; each tensor's `init` names its distribution. ``kaiming`` is He et al., ICCV 2015, in its uniform
            form with the gain of a relu: bound ``sqrt(6 / fan_in)``. ``fan`` has the bound ``1 / sqrt(fan_in)``.
        seed: Of the run.

    Returns:
        float32 arrays by tensor name, in canonical order.

    Raises:
        SpecError: A tensor asks for a distribution that is not known.
    """
    shapes = tensor_shapes(spec, Structure())
    weights = {}
    for place, tensor in enumerate(spec.tensors):
        rng = np.random.default_rng([seed, place])
        bound = _bound(tensor.init, tensor.fan_in)
        weights[tensor.name] = (bound * rng.uniform(-1.0, 1.0, shapes[tensor.name])).astype(np.float32)
        if tensor.init == "ones":
            weights[tensor.name].fill(1.0)
    return weights


def _bound(init: str, fan_in: int) -> float:
    if init == "kaiming":
        return math.sqrt(6.0 / fan_in)
    if init == "fan":
        return 1.0 / math.sqrt(fan_in)
    if init in ("zeros", "ones"):
        return 0.0
    raise SpecError(f"init {init!r}: there are kaiming, fan, zeros and ones")
