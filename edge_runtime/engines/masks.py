"""What is the same in every engine about masks: which layers may have one, how they are held, and the chains they run in.

Nothing here imports an engine's package. What an engine does in its own way is its `Backend`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from edge_runtime.engines import Update
from edge_runtime.engines.arrays import Arrays, Floats
from edge_runtime.kernels import STRETCHABLE, Layout, Stretch, Watch
from edge_runtime.kernels.kits import Kit
from wire.errors import SpecError
from wire.masks import AnyMask, Bits, Mask, packed
from wire.spec import ModelSpec, Node, Structure, node_shapes

Shape = tuple[int, ...]
MakeDense = Callable[[Sequence[Node], Shape, Mapping[str, Floats], Mask], Stretch]
"""Makes a stretch of one masked layer that is held dense, and of what follows it: nodes, shape of one input, arrays by tensor
name (which stay the caller's; pruned weights are zero), and the mask."""


@dataclass(frozen=True, slots=True)
class Backend:
    """What an engine brings for masked layers.

    Attributes:
        name: The engine and the version of what does its dense work: timings are kept under it.
        kit: Opens what runs sparse weights, for so many threads.
        dense: Makes what runs one that is held dense.
        follows: Ops that may stand behind the layer in a stretch that `dense` makes.
    """

    name: str
    kit: Callable[[int], Kit]
    dense: MakeDense
    follows: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Held:
    """How the masked weights of a loaded model are held.

    Attributes:
        ways: Tensor name to ``dense`` or the name of a layout.
        layouts: Of the sparse ones.
        masks: Of the dense ones, as bools: beside weights of four bytes each.
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


def settle(stretch: Stretch, wires: Wires, dy: Floats, *, input_gradient: bool) -> Floats | None:
    """Run a stretch backward, into the update if there is one and into the gradients if not."""
    update = wires.update[0] if wires.update else None
    grads = wires.grads if update is None else None
    watch = wires.watch[0] if wires.watch else None
    return stretch.backward(dy, grads=grads, update=update, input_gradient=input_gradient, watch=watch)


def bits_of(masks: Mapping[str, AnyMask]) -> dict[str, Bits]:
    """Give masks as bits.

    Raises:
        SpecError: One is an array of something else than bools.
    """
    for name, mask in masks.items():
        if not isinstance(mask, Bits) and mask.dtype != np.bool_:
            raise SpecError(f"the mask of {name!r} is {mask.dtype}, expected bool")
    return {name: packed(mask) for name, mask in masks.items()}


def check_masks(spec: ModelSpec, shapes: Mapping[str, Shape], masks: Mapping[str, Bits]) -> dict[str, Node]:
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
        if mask.shape != shapes[name]:
            raise SpecError(f"the mask of {name!r} is of shape {mask.shape}, expected {shapes[name]}")
    return {name: layers[name] for name in masks}


def chains(
    spec: ModelSpec, shapes: Mapping[str, Shape], kits: tuple[Kit, Backend], held: Held, params: Mapping[str, Floats]
) -> Iterator[Chain]:
    """Give the stretches of a model, in order: as long as can be, each beginning with a masked layer.

    Args:
        spec: The model.
        shapes: Of every node's output.
        kits: What makes the sparse ones, and the dense ones.
        held: How weights are held.
        params: By tensor name.

    Raises:
        SpecError: The kit cannot run a layer that has a layout of its own making.
    """
    nodes, place = spec.nodes, 0
    kit, backend = kits
    readers = Counter(name for node in nodes for name in node.inputs)
    while place < len(nodes):
        node = nodes[place]
        weight = node.params.get("weight", "")
        chain = None
        last = place
        if weight in held.masks:
            while last + 1 < len(nodes) and _reads(nodes[last], nodes[last + 1], readers):
                if nodes[last + 1].op not in backend.follows:
                    break
                last += 1
            into = shapes[node.inputs[0]]
            chain = Chain(place, last, backend.dense(nodes[place : last + 1], into, params, held.masks[weight]))
        elif weight in held.layouts:
            while last + 1 < len(nodes) and _reads(nodes[last], nodes[last + 1], readers):
                if not _stretches(nodes[last + 1], held):
                    break
                last += 1
            chain = _longest(nodes, (place, last), shapes[node.inputs[0]], kit, (held, params))
        if chain is not None:
            yield chain
            place = chain.last
        place += 1


def _reads(node: Node, following: Node, readers: Mapping[str, int]) -> bool:
    return following.inputs == (node.name,) and readers[node.name] == 1


def _stretches(node: Node, held: Held) -> bool:
    if node.op in ("linear", "conv2d"):
        return node.params["weight"] in held.layouts
    return node.op in STRETCHABLE


def _longest(
    nodes: Sequence[Node],
    place: tuple[int, int],
    input_shape: Shape,
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
