"""Stretches in the torch engine: chains of masked layers that run as one step of autograd's graph.

A masked weight that is held sparse belongs to a kit's stretch, one that is held dense to a `DenseStretch`; either way its
gradient is made, added or applied within the stretch's own backward pass, and autograd never sees the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch

from edge_runtime.engines import losses
from edge_runtime.engines.arrays import Floats
from edge_runtime.engines.dense import FOLLOW, DenseStretch, aligned, plain
from edge_runtime.engines.masks import Backend, Shape, Wires, settle
from edge_runtime.kernels import Stretch
from edge_runtime.kernels.kits import open_kit
from wire.masks import Mask
from wire.messages import Loss
from wire.spec import Node

Tensor = torch.Tensor


class _Through(torch.autograd.Function):
    """A stretch as one function of autograd. `spark` is an empty leaf: it asks for a backward pass that weights need."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spark: Tensor, stretch: Stretch, wires: Wires) -> Tensor:
        del spark
        ctx.stretch, ctx.wires = stretch, wires
        return aligned(stretch.forward(plain(x), train=True))

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, None, None, None]:
        dx = settle(ctx.stretch, ctx.wires, plain(dys[0]), input_gradient=ctx.needs_input_grad[0])
        return (None if dx is None else aligned(dx)), None, None, None


def through(stretch: Stretch, wires: Wires) -> Callable[[Any, list[Tensor], Any], Tensor]:
    """Give the function that runs a stretch as a step of the engine."""
    spark = torch.empty(0, requires_grad=True)

    def run(_: Any, inputs: list[Tensor], __: Any) -> Tensor:
        if torch.is_grad_enabled():
            return cast("Tensor", _Through.apply(inputs[0], spark, stretch, wires))  # type: ignore[no-untyped-call] # torch left it untyped
        return aligned(stretch.forward(plain(inputs[0]), train=False))

    return run


def straight(
    line: Sequence[Stretch], wires: Wires, x: Floats, target: Tensor, goal: tuple[Loss, float]
) -> tuple[Floats, float]:
    """Do a training step of a model that is nothing but stretches, without autograd.

    Args:
        line: The stretches, each reading the one before.
        wires: Where gradients go.
        x: Inputs.
        target: Labels ``(n,)`` or distributions ``(n, classes)``.
        goal: The loss, and the scale of its gradient.

    Returns:
        Logits, and the loss, not scaled.
    """
    value = plain(aligned(x))
    for stretch in line:
        value = stretch.forward(value, train=True)
    output = aligned(value)
    with torch.no_grad():
        loss = losses.value(output, target, goal[0]).item()
        dy = losses.gradient(output, target, *goal)
    for place in reversed(range(len(line))):
        back = settle(line[place], wires, plain(dy), input_gradient=place > 0)
        if back is not None:
            dy = aligned(back)
    return plain(output), loss


def _dense(nodes: Sequence[Node], input_shape: Shape, params: Mapping[str, Floats], mask: Mask) -> Stretch:
    del input_shape  # torch finds it out
    return DenseStretch(nodes, params, mask)


TORCH = Backend(f"torch {torch.__version__}", open_kit, _dense, frozenset(FOLLOW))
"""What this engine brings for masked layers."""
