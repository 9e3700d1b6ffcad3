"""Synaptic flow: which models it runs through, and the order that has it measured (Tanaka et al., NeurIPS 2020)."""

from __future__ import annotations

from wire.masked import maskable
from wire.messages import Recipe
from wire.spec import ModelSpec

_OPS = frozenset(("linear", "conv2d", "relu", "max_pool2d", "avg_pool2d", "flatten"))
"""What lets a factor of one layer through to the output as it is."""


def obstacle(spec: ModelSpec) -> str:
    """Say what keeps the flow from running through a model; empty when nothing does.

    ``R = 1^T |W_L| ... |W_1| 1`` belongs to chains of linear layers and convolutions with ReLU and pools between them.
    """
    other = [node.op for node in spec.nodes if node.op not in _OPS]
    if other:
        return f"it has {other[0]!r}"
    weights = {tensor.name for tensor in spec.tensors if len(tensor.axes) > 1}
    return "" if set(maskable(spec)) == weights else "layers share weights"


def flow_order(iterations: float, density: float) -> Recipe:
    """Give the recipe by which one device scores all weights (see the rule `score`)."""
    knobs = {"synflow": iterations, "density": density}
    return Recipe(rule="score", batch=1, steps=1, loss="sum", knobs=knobs)
