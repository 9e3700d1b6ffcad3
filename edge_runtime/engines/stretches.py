"""Stretches in the torch engine: chains of masked layers that run as one step of autograd's graph.

A masked weight that is held sparse belongs to a kit's stretch, one that is held dense to a `DenseStretch`; either way its
gradient is made, added or applied within the stretch's own backward pass, and autograd never sees the weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch

from edge_runtime.engines import Update, losses
from edge_runtime.engines.arrays import Arrays, Floats
from edge_runtime.engines.dense import FOLLOW, DenseStretch, aligned, plain
from edge_runtime.kernels import STRETCHABLE, Layout, Stretch, Watch
from edge_runtime.kernels.kits import Kit
from wire.errors import SpecError
from wire.masks import Mask
from wire.messages import Loss
from wire.spec import ModelSpec, Node, Structure, node_shapes

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class Held:
    """How the masked weights of a loaded model are held.

    Attributes:
        ways: Tensor name to ``dense`` or the name of a layout.
        layouts: Of the sparse ones.
        masks: Of the dense ones.
    """

    ways: Mapping[str, str] = field(default_factory=dict)
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    masks: Mapping[str, Mask] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Wires:
    """What hooks and stretches read of their engine, without keeping the engine alive.

    Attributes:
        update: None or one: what to apply in this backward pass.
        grads: Where gradients are added otherwise.
        watch: None or one: who is shown what passes through masked layers.
    """

    update: list[Update] = field(default_factory=list)
    grads: Arrays = field(default_factory=dict)
    watch: list[Watch] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Chain:
    """Nodes ``first`` to ``last`` (inclusive) of a spec, that run as one stretch."""

    first: int
    last: int
    stretch: Stretch


class _Through(torch.autograd.Function):
    """A stretch as one function of autograd. `spark` is an empty leaf: it asks for a backward pass that weights need."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spark: Tensor, stretch: Stretch, wires: Wires) -> Tensor:
        del spark
        ctx.stretch, ctx.wires = stretch, wires
        return aligned(stretch.forward(plain(x), train=True))

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, None, None, None]:
        dx = settle(ctx.stretch, ctx.wires, dys[0], input_gradient=ctx.needs_input_grad[0])
        return (None if dx is None else aligned(dx)), None, None, None


def settle(stretch: Stretch, wires: Wires, dy: Tensor, *, input_gradient: bool) -> Floats | None:
    """Run a stretch backward, into the update if there is one and into the gradients if not."""
    update = wires.update[0] if wires.update else None
    grads = wires.grads if update is None else None
    watch = wires.watch[0] if wires.watch else None
    return stretch.backward(plain(dy), grads=grads, update=update, input_gradient=input_gradient, watch=watch)


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
        back = settle(line[place], wires, dy, input_gradient=place > 0)
        if back is not None:
            dy = aligned(back)
    return plain(output), loss


def check_masks(spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]], masks: Mapping[str, Mask]) -> dict[str, Node]:
    """Give the node of each masked tensor.

    Raises:
        SpecError: A mask has another shape than its tensor, or that is not the weight of exactly one layer whose bias is
            its own too, or of a convolution in groups or a linear layer over many steps, for which there is no sparse form.
    """
    uses = [name for node in spec.nodes for name in node.params.values()]
    layers = {node.params["weight"]: node for node in spec.nodes if node.op in ("linear", "conv2d")}
    inputs = node_shapes(spec, Structure())
    for name, mask in masks.items():
        if name not in layers or uses.count(name) != 1 or uses.count(layers[name].params["bias"]) != 1:
            raise SpecError(f"a mask for {name!r}, which is not the weight of one linear layer or convolution")
        if layers[name].attrs.get("groups", 1) > 1:
            raise SpecError(f"a mask for {name!r}, a convolution in groups: these stay dense")
        if layers[name].op == "linear" and len(inputs[layers[name].name]) > 1:
            raise SpecError(f"a mask for {name!r}, a linear layer over many steps: these stay dense")
        if mask.dtype != np.bool_ or mask.shape != shapes[name]:
            raise SpecError(
                f"the mask of {name!r} is {mask.dtype} of shape {mask.shape}, expected bool of {shapes[name]}"
            )
    return {name: layers[name] for name in masks}


def chains(
    spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]], kit: Kit, held: Held, params: Mapping[str, Floats]
) -> Iterator[Chain]:
    """Give the stretches of a model, in order: as long as can be, each beginning with a masked layer.

    Args:
        spec: The model.
        shapes: Of every node's output.
        kit: Makes the sparse ones.
        held: How weights are held.
        params: By tensor name.

    Raises:
        SpecError: The kit cannot run a layer that has a layout of its own making.
    """
    nodes, place = spec.nodes, 0
    readers = Counter(name for node in nodes for name in node.inputs)
    while place < len(nodes):
        node = nodes[place]
        weight = node.params.get("weight", "")
        chain = None
        last = place
        if weight in held.masks:
            while last + 1 < len(nodes) and _follows(nodes[last], nodes[last + 1], readers, held, dense=True):
                last += 1
            chain = Chain(place, last, DenseStretch(nodes[place : last + 1], params, held.masks[weight]))
        elif weight in held.layouts:
            while last + 1 < len(nodes) and _follows(nodes[last], nodes[last + 1], readers, held, dense=False):
                last += 1
            chain = _longest(nodes, (place, last), shapes[node.inputs[0]], kit, (held, params))
        if chain is not None:
            yield chain
            place = chain.last
        place += 1


def _follows(node: Node, following: Node, readers: Mapping[str, int], held: Held, *, dense: bool) -> bool:
    if following.inputs != (node.name,) or readers[node.name] != 1:
        return False
    if following.op in FOLLOW:
        return True
    return not dense and following.op in STRETCHABLE and following.params["weight"] in held.layouts


def _longest(
    nodes: Sequence[Node],
    place: tuple[int, int],
    input_shape: tuple[int, ...],
    kit: Kit,
    weights: tuple[Held, Mapping[str, Floats]],
) -> Chain:
    held, params = weights
    for last in range(place[1], place[0] - 1, -1):
        chain = nodes[place[0] : last + 1]
        names = [name for node in chain for name in node.params.values()]
        own = {name: params[name] for name in names}
        layouts = {name: held.layouts[name] for name in names if name in held.layouts}
        try:
            return Chain(place[0], last, kit.stretch(chain, input_shape, own, layouts))
        except SpecError:
            if last == place[0]:
                raise
    raise AssertionError("the loop above returns or raises")
