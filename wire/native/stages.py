"""What a stretch of sparse layers does one after another, and the memory that it takes: for the engine and for predictions.

A stage is a layer with the ReLU and the pool behind it. What a layer makes that is then pooled, or moved into an image with a
halo, is not kept: it stands where the gradients will be, and of a pool the places of the maxima are kept, a byte each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from wire.errors import SpecError
from wire.spec import Node

Shape = tuple[int, ...]

CHUNK = 32
"""Samples that an evaluation runs at a time: two panels, whose sums are rounded as in any larger batch."""

OPS = frozenset({"linear", "conv2d", "relu", "max_pool2d", "flatten"})
"""What a stage may consist of."""

POOL_MAX = 16
"""Sides of a window whose places are said in a byte."""

READ_MAX, PLANE_MAX, CODES_MAX = 4, 1024, 512
"""Channels that a convolution reads, pixels of what it makes and kernels' weights, up to which it is pooled at once."""

_PANEL = 4  # samples
_FLOAT = 4
_LINE = 64  # bytes of a cache line, where every buffer begins


@dataclass(frozen=True, slots=True)
class Stage:
    """A layer and what follows it at once, or a ReLU or a pool that stands alone.

    Attributes:
        layer: Its node; None where there is none.
        shape: Of what it reads, and
        made: of what the layer makes, and
        out: of what comes out behind the pool.
        kernel: Of the pool; 1 for none.
        relu: Whether there is one.
        halo: Of the image that comes out.
    """

    layer: Node | None
    shape: Shape
    made: Shape
    out: Shape
    kernel: int = 1
    relu: bool = False
    halo: int = 0

    @property
    def conv(self) -> bool:
        """Whether its layer is a convolution."""
        return self.layer is not None and self.layer.op == "conv2d"

    @property
    def pools(self) -> bool:
        """Whether the pass behind the layer is one of its own; a ReLU alone is done on the way."""
        return self.layer is None or self.kernel > 1 or self.halo > 0

    @property
    def at_once(self) -> bool:
        """Whether the pool is done while what it is of is near, so that nowhere is all of that; nor of its gradient."""
        few = self.shape[0] <= READ_MAX and prod(self.made[1:]) <= PLANE_MAX
        if self.layer is None or not self.conv or self.kernel == 1 or not few:
            return False
        return self.shape[0] * int(self.layer.attrs["kernel"]) ** 2 <= CODES_MAX

    @property
    def padding(self) -> int:
        """Halo of the image that it reads."""
        return int(self.layer.attrs["padding"]) if self.layer is not None and self.conv else 0

    @property
    def back_halo(self) -> int:
        """Halo that the gradient of a convolution's output needs for that of its input."""
        if self.layer is None or not self.conv:
            return 0
        attrs = self.layer.attrs
        return max(0, int(attrs.get("dilation", 1)) * (int(attrs["kernel"]) - 1) - int(attrs["padding"]))


@dataclass(slots=True)
class Sizes:
    """What a pass holds, in entries.

    Attributes:
        first: Of the input's panels.
        outs: Of what comes out of each stage.
        places: Of each stage's pool: bytes.
        pair: Of two places that hold gradients in turns, and what a layer makes for a pool meanwhile.
        roles: Which of the pair holds the gradient of each stage's output.
    """

    first: int
    outs: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    pair: list[int] = field(default_factory=lambda: [0, 0])
    roles: list[int] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Bytes of all, each beginning with a cache line."""
        return sum(_FLOAT * length + _LINE for length in (self.first, *self.outs, *self.pair)) + sum(self.places)


def samples(batch: int) -> int:
    """Give how many samples the panels of a batch hold."""
    return -(-batch // _PANEL) * _PANEL


def entries(shape: Shape, batch: int, halo: int = 0) -> int:
    """Give the length of a panelled buffer of values of this shape, ``(channels, height, width)`` or ``(features,)``."""
    sides = [length + 2 * halo for length in (shape[1:] if len(shape) == 3 else (1, 1))]
    return shape[0] * prod(sides) * samples(batch)


def stages_of(nodes: Sequence[Node], shape: Shape, weights: Mapping[str, Shape]) -> tuple[tuple[Stage, ...], Shape]:
    """Give the stages of a chain of nodes and the shape of what comes out.

    Args:
        nodes: The chain, each reading the one before.
        shape: Of one input.
        weights: Shape of each weight, dense; a layer without one cannot be run.

    Raises:
        SpecError: A node cannot be run, does not read the one before, or meets weights of another shape.
    """
    stages: list[Stage] = []
    for place, node in enumerate(nodes):
        if node.op not in OPS:
            raise SpecError(f"node {node.name!r}: a stretch has no {node.op}")
        if place and node.inputs != (nodes[place - 1].name,):
            raise SpecError(f"node {node.name!r} does not read the one before it")
        latest = stages[-1] if stages else None
        if node.op == "flatten":
            shape = (prod(shape),)
        elif node.op in ("linear", "conv2d"):
            stage = _layer(node, shape, weights)
            if latest is not None:
                stages[-1] = replace(latest, halo=stage.padding)
            stages.append(stage)
            shape = stage.out
        elif node.op == "relu":
            if latest is not None and latest.out == shape:
                stages[-1] = replace(latest, relu=True)  # behind a pool as good as before it
            else:
                stages.append(Stage(None, shape, shape, shape, relu=True))
        else:
            pooled = _pooled(node, shape)
            kernel = int(node.attrs["kernel"])
            if latest is not None and latest.kernel == 1 and latest.conv:
                stages[-1] = replace(latest, kernel=kernel, out=pooled)
            else:
                stages.append(Stage(None, shape, shape, pooled, kernel=kernel))
            shape = pooled
    if not stages:
        raise SpecError("a stretch without a layer")
    return tuple(stages), shape


def _layer(node: Node, shape: Shape, weights: Mapping[str, Shape]) -> Stage:
    weight = weights.get(node.params["weight"])
    if weight is None:
        raise SpecError(f"node {node.name!r}: its weight {node.params['weight']!r} is held in no layout")
    sides: tuple[int, ...] = ()
    fits = len(weight) == 2 and shape == weight[1:]
    if node.op == "conv2d":
        stride, padding, dilation = node.attrs["stride"], node.attrs["padding"], node.attrs.get("dilation", 1)
        fits = len(weight) == 4 and len(shape) == 3 and shape[0] == weight[1]
        reach = dilation * (weight[-1] - 1) + 1 - 2 * padding
        sides = tuple((length - reach) // stride + 1 for length in shape[1:]) if fits else (0,)
    if not fits or min(sides, default=1) < 1:
        raise SpecError(f"node {node.name!r}: weights of {weight} do not meet an input of {shape}")
    made = (weight[0], *sides)
    return Stage(node, shape, made, made)


def _pooled(node: Node, shape: Shape) -> Shape:
    kernel = int(node.attrs["kernel"])
    if node.attrs["stride"] != kernel or kernel > POOL_MAX or len(shape) != 3 or min(shape[1:]) < kernel:
        raise SpecError(f"node {node.name!r}: a stretch pools {shape} in small windows side by side only")
    return shape[0], shape[1] // kernel, shape[2] // kernel


def sizes(
    stages: Sequence[Stage], batch: int, *, train: bool, input_gradient: bool = False, watched: bool = False
) -> Sizes:
    """Count a pass over stages.

    Args:
        stages: As `stages_of` gives them.
        batch: Samples.
        train: Whether a backward pass follows.
        input_gradient: Whether that of the input is wanted.
        watched: Whether somebody is shown the gradients of what layers made.
    """
    found = Sizes(entries(stages[0].shape, batch, stages[0].padding))
    for stage in stages:
        found.outs.append(entries(stage.out, batch, stage.halo if stage.pools else 0))
        pooled = train and stage.kernel > 1
        found.places.append(prod(stage.out) * samples(batch) if pooled else 0)
    role = 0
    for place in reversed(range(len(stages)) if train else ()):
        stage, wanted = stages[place], input_gradient or place > 0
        found.roles.append(role)
        _raise(found.pair, role, entries(stage.out, batch))
        if stage.layer is None:
            role = 1 - role
            _raise(found.pair, role, entries(stage.made, batch))
        elif stage.conv and (wanted or watched or not stage.at_once):
            _raise(found.pair, 1 - role, entries(stage.made, batch, stage.back_halo if wanted else 0))
            _raise(found.pair, role, entries(stage.shape, batch) if wanted else 0)
        elif wanted and not stage.conv:
            role = 1 - role
            _raise(found.pair, role, entries(stage.shape, batch))
    found.roles.reverse()
    apart = (stage for stage in stages if stage.layer is not None and stage.pools and not stage.at_once)
    made = [entries(stage.made, batch) for stage in apart]
    _raise(found.pair, int(found.pair[1] > found.pair[0]), max(made, default=0))
    return found


def _raise(pair: list[int], role: int, least: int) -> None:
    pair[role] = max(pair[role], least)
