"""Small models for tests, spelled out so that they do not depend on the zoo."""

from __future__ import annotations

import numpy as np

from wire.spec import Axis, AxisGroup, ModelSpec, Node, Structure, TensorSpec, check, tensor_shapes

RANKING = "ab" * 32


def small_cnn(channels=6, hidden=12, classes=4, side=6):
    """conv 1 -> channels, relu, max pool 2, flatten, linear -> hidden, tanh, linear -> classes."""
    pooled = (side // 2) ** 2
    tensors = (
        TensorSpec("c.weight", (Axis("a"), Axis(), Axis(inner=3), Axis(inner=3)), "kaiming", 9),
        TensorSpec("c.bias", (Axis("a"),)),
        TensorSpec("f.weight", (Axis("b"), Axis("a", pooled)), "kaiming", channels * pooled),
        TensorSpec("f.bias", (Axis("b"),)),
        TensorSpec("o.weight", (Axis("classes"), Axis("b")), "fan", hidden),
        TensorSpec("o.bias", (Axis("classes"),)),
    )
    nodes = (
        Node("c", "conv2d", ("input",), _params("c"), {"kernel": 3, "stride": 1, "padding": 1}),
        Node("r", "relu", ("c",)),
        Node("p", "max_pool2d", ("r",), {}, {"kernel": 2, "stride": 2}),
        Node("flat", "flatten", ("p",)),
        Node("f", "linear", ("flat",), _params("f")),
        Node("t", "tanh", ("f",)),
        Node("o", "linear", ("t",), _params("o")),
    )
    groups = (AxisGroup("a", channels), AxisGroup("b", hidden), AxisGroup("classes", classes, prunable=False))
    return check(ModelSpec("small-cnn", (1, side, side), classes, groups, tensors, nodes))


def linear(inputs=3, classes=2):
    """One linear layer, for sums done by hand."""
    tensors = (
        TensorSpec("o.weight", (Axis("classes"), Axis(inner=inputs)), "fan", inputs),
        TensorSpec("o.bias", (Axis("classes"),)),
    )
    nodes = (Node("o", "linear", ("input",), _params("o")),)
    groups = (AxisGroup("classes", classes, prunable=False),)
    return check(ModelSpec("linear", (inputs,), classes, groups, tensors, nodes))


def widths(**counts):
    """A structure at its widest capacity."""
    (length,) = {len(c) for c in counts.values()}
    return Structure(length - 1, {name: tuple(c) for name, c in counts.items()}, RANKING)


def random_arrays(spec, structure, seed=0, scale=0.3):
    rng = np.random.default_rng(seed)
    shapes = tensor_shapes(spec, structure)
    return {name: (scale * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


def batch(spec, count, seed=1):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, *spec.input_shape)).astype(np.float32)
    return x, rng.integers(0, spec.classes, count).astype(np.int64)


def _params(layer):
    return {"weight": f"{layer}.weight", "bias": f"{layer}.bias"}
