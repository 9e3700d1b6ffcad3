"""A model as data: a graph over a closed list of ops, its tensors, and the axes that must be cut together.

A `ModelSpec` says everything that is needed to run, cut, ship and measure a model; it never holds code. Shapes leave the
batch axis out. Nodes stand in the order in which they run; the input of the model is the name ``input``.

**Axis groups.** Cutting a channel out of one layer cuts it out of every tensor that touches it. Axes that live and die
together share an `AxisGroup`. A tensor's dimension is ``outer * group size * inner`` long: ``inner`` is the repeat that a
flatten makes (channel-major), ``outer`` the repeat that gates make.

**Wire order.** A ranking gives every channel of a prunable group a level: the narrowest width that still has it. In wire
order channels stand sorted by (level, index), so that each width is a prefix and a narrower width is a view. A hidden
channel's position does not change what a network computes, so a device never needs the original order to train.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Annotated, Literal

import msgpack

from wire.axes import check_axes
from wire.errors import SpecError
from wire.ops import OPS, STATISTICS, check_form, group_count
from wire.schema import Limit, Name, Natural, Positive, from_plain, to_plain, unpack

Shape = tuple[Positive, ...]
Counts = Annotated[tuple[Positive, ...], Limit(1, 64)]
SPEC_BYTES = 1 << 20
NODES_MAX = 16_384
WEIGHTS_MAX = 1 << 31
VALUES_MAX = 1 << 40
"""Entries of one value of one sample, so that no line of a spec multiplies without end what the lines before it give."""

_STEP = 1_000_003
_TRIED_MAX = VALUES_MAX << 4 * 33
"""The same for the sizes by which `check` tries how a model is cut: each of at most four axes grows by less than 2 ** 33."""

NORM_EPSILON = 1e-5
"""What every norm adds to a variance before it takes the root."""


@dataclass(frozen=True, slots=True)
class AxisGroup:
    """Channels that are cut together.

    Attributes:
        name: Unique within the spec.
        size: Number of channels in the full model.
        prunable: False for what must stay whole, such as the classes.
    """

    name: Name
    size: Positive
    prunable: bool = True


@dataclass(frozen=True, slots=True)
class Axis:
    """How one dimension of a tensor follows a group: its length is ``outer * size of the group * inner``.

    Attributes:
        group: The group's name; empty for a dimension that is never cut (its length stands in ``inner``).
        inner: Consecutive entries per channel.
        outer: Repeats of the whole group.
    """

    group: Annotated[str, Limit(0, 64)] = ""
    inner: Positive = 1
    outer: Positive = 1


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One trainable array.

    Attributes:
        name: Unique within the spec, for example ``fc1.weight``.
        axes: One per dimension; the full shape follows from them.
        init: ``kaiming`` (uniform, bound ``sqrt(6 / fan_in)``), ``fan`` (uniform, bound ``1 / sqrt(fan_in)``), ``zeros``
            or ``ones``.
        fan_in: Inputs that feed one output, for `init`.
    """

    name: Name
    axes: Annotated[tuple[Axis, ...], Limit(1, 6)]
    init: Literal["kaiming", "fan", "zeros", "ones"] = "zeros"
    fan_in: Positive = 1


@dataclass(frozen=True, slots=True)
class Node:
    """One step of the graph.

    Attributes:
        name: Unique; later nodes name it as their input.
        op: One of `ops.OPS`.
        inputs: Names of earlier nodes, or ``input``.
        params: Role (``weight``, ``bias``, ...) to tensor name.
        attrs: Whole numbers such as ``kernel``, ``stride``, ``padding``.
    """

    name: Name
    op: Name
    inputs: Annotated[tuple[Name, ...], Limit(1, 16)]
    params: Mapping[Name, Name] = field(default_factory=dict)
    attrs: Mapping[Name, Natural] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A whole model. The last node's output is the logits, one per class.

    Attributes:
        name: For people.
        input_shape: Of one sample, for example ``(1, 8, 8)``.
        classes: Length of the output.
        groups: All axis groups.
        tensors: All trainable arrays, in the order in which they travel.
        nodes: All steps, in the order in which they run.
    """

    name: Name
    input_shape: Annotated[Shape, Limit(1, 4)]
    classes: Positive
    groups: Annotated[tuple[AxisGroup, ...], Limit(1, 4096)]
    tensors: Annotated[tuple[TensorSpec, ...], Limit(1, 4096)]
    nodes: Annotated[tuple[Node, ...], Limit(1, NODES_MAX)]


@dataclass(frozen=True, slots=True)
class Structure:
    """Which part of a model: a width, that is a prefix of every axis group in wire order, then masks of its tensors.

    Empty means the whole model.

    Attributes:
        capacity: Index of the width, 0 being the narrowest.
        widths: Group name to the channel counts of all widths, ascending; a group that is not named is whole.
        ranking: Digest of the levels that define the wire order; empty when nothing is cut.
        masks: Digest of the masks (`structure.masks_digest`); empty when every weight is kept.
        kept: Name of each masked tensor to how many of its weights are kept.
    """

    capacity: Natural = 0
    widths: Mapping[Name, Counts] = field(default_factory=dict)
    ranking: Annotated[str, Limit(0, 64)] = ""
    masks: Annotated[str, Limit(0, 64)] = ""
    kept: Mapping[Name, Natural] = field(default_factory=dict)

    @property
    def called(self) -> str:
        """Name the part for people: ``whole``, ``2/5`` (the second narrowest width of five) or ``own`` (there is only one)."""
        count = max(map(len, self.widths.values()), default=0)
        width = "whole" if not count else "own" if count == 1 else f"{self.capacity + 1}/{count}"
        return f"{width} masked" if self.masks else width

    def narrowed(self, capacity: int) -> Structure:
        """Give the same ranking at another capacity."""
        return dataclasses.replace(self, capacity=capacity)


def group_sizes(spec: ModelSpec, structure: Structure) -> dict[str, int]:
    """Count the channels that each group has in this structure. Cost: one step per group.

    Raises:
        SpecError: The structure names a group that is not there or not prunable, or asks for more than it has.
    """
    sizes = {g.name: g.size for g in spec.groups}
    fixed = {g.name for g in spec.groups if not g.prunable}
    for name, counts in structure.widths.items():
        if name not in sizes or name in fixed:
            raise SpecError(f"model {spec.name!r} has no prunable axis group {name!r}")
        if structure.capacity >= len(counts):
            raise SpecError(f"capacity {structure.capacity} of group {name!r}, which has {len(counts)} widths")
        if list(counts) != sorted(counts) or counts[-1] > sizes[name]:
            raise SpecError(f"widths {counts} of group {name!r} must ascend to at most {sizes[name]}")
        sizes[name] = counts[structure.capacity]
    return sizes


def tensor_shape(tensor: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Give a tensor's shape for these group sizes (see `group_sizes`)."""
    return tuple(a.outer * sizes.get(a.group, 1) * a.inner for a in tensor.axes)


def tensor_shapes(spec: ModelSpec, structure: Structure) -> dict[str, tuple[int, ...]]:
    """Give every tensor's shape within a structure, in the spec's order."""
    sizes = group_sizes(spec, structure)
    return {t.name: tensor_shape(t, sizes) for t in spec.tensors}


def parameter_count(spec: ModelSpec, structure: Structure) -> int:
    """Count the weights of a structure."""
    return sum(prod(shape) for shape in tensor_shapes(spec, structure).values())


def node_shapes(spec: ModelSpec, structure: Structure) -> dict[str, tuple[int, ...]]:
    """Infer the output shape of ``input`` and of every node, batch axis left out, and check the whole graph on the way.

    Raises:
        SpecError: Naming the node and what is wrong: unknown op, forward reference, shapes that do not meet.

    Cost: one walk over the graph; of the same spec and sizes again, a copy.
    """
    return dict(_walked(Same(spec), tuple(group_sizes(spec, structure).items())))


class Same:
    """A spec as a key of what is remembered: itself and no equal one, whose comparison would take as long as a walk."""

    __slots__ = ("spec",)

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.spec is self.spec

    def __hash__(self) -> int:
        return id(self.spec)


@functools.lru_cache(maxsize=16)
def _walked(same: Same, sizes: tuple[tuple[str, int], ...]) -> dict[str, tuple[int, ...]]:
    return _walk(same.spec, dict(sizes))


def _walk(spec: ModelSpec, sizes: Mapping[str, int], most: int = VALUES_MAX) -> dict[str, tuple[int, ...]]:
    tensors = {t.name: tensor_shape(t, sizes) for t in spec.tensors}
    shapes: dict[str, tuple[int, ...]] = {"input": tuple(spec.input_shape)}
    if prod(spec.input_shape) > most:
        raise SpecError(f"an input of {prod(spec.input_shape)} entries; the limit is {most}")
    for node in spec.nodes:
        if node.name in shapes:
            raise SpecError(f"node {node.name!r} stands twice")
        if node.op not in OPS:
            raise SpecError(f"node {node.name!r}: op {node.op!r} is not one of {', '.join(OPS)}")
        try:
            check_form(node.op, len(node.inputs), set(node.params), node.attrs)
        except ValueError as error:
            raise SpecError(f"node {node.name!r} ({node.op}): {error}") from None
        try:
            inputs = [shapes[name] for name in node.inputs]
            params = {role: tensors[name] for role, name in node.params.items()}
        except KeyError as error:
            raise SpecError(f"node {node.name!r} uses {error.args[0]!r}, which is not there yet") from None
        try:
            shapes[node.name] = OPS[node.op].shape(node.attrs, inputs, params)
        except ValueError as error:
            raise SpecError(f"node {node.name!r} ({node.op}): {error}") from None
        if (count := prod(shapes[node.name])) > most:
            raise SpecError(f"node {node.name!r} ({node.op}): it gives {count} entries; the limit is {most}")
    last = shapes[spec.nodes[-1].name]
    if last != (spec.classes,):
        raise SpecError(f"the last node gives {last}, but the model has {spec.classes} classes")
    return shapes


def conv_groups(node: Node, channels: int, each: int) -> int:
    """Count the groups of a convolution, within a structure too (see `ops.group_count`)."""
    return group_count(node.attrs, channels, each)


def regrouped(node: Node, before: int, after: int) -> Node:
    """Give a node with so many groups as are left of its own where `after` of `before` runs of channels are."""
    groups = node.attrs.get("groups", 1)
    return node if groups == 1 else dataclasses.replace(node, attrs={**node.attrs, "groups": groups * after // before})


def nodes_within(spec: ModelSpec, structure: Structure) -> tuple[Node, ...]:
    """Give a model's nodes as a structure runs them: a `group_norm` has as many groups as are left.

    Of a convolution the shape of its weight says it (`conv_groups`). Cost: one step per tensor and node.
    """
    groups = {g.name: g.size for g in spec.groups}
    first = {t.name: t.axes[0].group for t in spec.tensors}
    sizes = group_sizes(spec, structure)
    found = list(spec.nodes)
    for place, node in enumerate(found):
        if node.op == "group_norm" and (group := first[node.params["weight"]]):
            found[place] = regrouped(node, groups[group], sizes[group])
    return tuple(found)


def statistics(spec: ModelSpec) -> frozenset[str]:
    """Name the tensors that no gradient moves: the running means and variances of batch norms. Cost: one step per node."""
    return frozenset(node.params[role] for node in spec.nodes for role in STATISTICS if role in node.params)


def check(spec: ModelSpec) -> ModelSpec:
    """Refuse a spec that cannot be run, or that falls apart when it is cut. Cost: three walks over the graph.

    Names must be unique, groups and inputs must be there, shapes must meet, every tensor must be used. And cutting any
    prunable group must leave shapes that meet: this is tried once, with sizes that no two groups share. Where channels stand
    must not matter if they can be cut, so that a `group_norm` and a convolution lose whole groups of these; every axis that is
    cut is followed through the graph (`wire.axes`).

    Raises:
        SpecError: Naming the place.
    """
    for what, names in (("group", [g.name for g in spec.groups]), ("tensor", [t.name for t in spec.tensors])):
        if len(set(names)) != len(names):
            raise SpecError(f"two {what}s of model {spec.name!r} share a name")
    groups = {g.name for g in spec.groups}
    for tensor in spec.tensors:
        for axis in tensor.axes:
            if axis.group and axis.group not in groups:
                raise SpecError(f"tensor {tensor.name!r} follows group {axis.group!r}, which is not there")
    # Not `node_shapes`: of what may be refused yet nothing is to be remembered.
    shapes = _walk(spec, {group.name: group.size for group in spec.groups})
    _check_groups(spec, shapes)
    _check_statistics(spec)
    unused = {t.name for t in spec.tensors}.difference(*(node.params.values() for node in spec.nodes))
    if unused:
        raise SpecError(f"tensor {min(unused)!r} is not used by any node")
    count = parameter_count(spec, Structure())
    if count > WEIGHTS_MAX:
        raise SpecError(f"model {spec.name!r} has {count} weights; the limit is {WEIGHTS_MAX}")
    try:
        tried = {g.name: g.size + _STEP * place * g.prunable for place, g in enumerate(spec.groups, 1)}
        _walk(spec, tried, _TRIED_MAX)
    except SpecError as error:
        raise SpecError(f"model {spec.name!r} falls apart when an axis group is cut: {error}") from None
    check_axes(spec, shapes)
    return spec


def _check_statistics(spec: ModelSpec) -> None:
    """Let nothing be a running statistic and something else: no gradient moves it. Two norms may share it."""
    found = {node.params[role]: role for node in spec.nodes for role in STATISTICS if role in node.params}
    for node in spec.nodes:
        for role, name in node.params.items():
            if found.get(name, role) != role:
                raise SpecError(
                    f"tensor {name!r} is a running {found[name]} of a batch norm, and the {role} of node {node.name!r} as well"
                )


def _check_groups(spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Hold what a node says of groups against the whole model."""
    tensors = tensor_shapes(spec, Structure())
    for node in spec.nodes:
        groups = node.attrs.get("groups", 1)
        if groups == 1:
            continue
        channels = shapes[node.inputs[0]][0]
        conv = node.op in ("conv1d", "conv2d")
        if conv and tensors[node.params["weight"]][1] * groups != channels:
            raise SpecError(f"node {node.name!r} ({node.op}): {channels} input channels do not meet {groups} groups")
        if channels % groups:
            raise SpecError(f"node {node.name!r} ({node.op}): {channels} channels do not fall into {groups} groups")


def digest(spec: ModelSpec) -> str:
    """Name a spec by its content: SHA-256 (hex) of its canonical msgpack form."""
    return hashlib.sha256(encode(spec)).hexdigest()


def encode(spec: ModelSpec) -> bytes:
    """Give the canonical msgpack form: fields in declared order, shortest integers."""
    packed: bytes = msgpack.packb(to_plain(spec))
    return packed


def decode(data: bytes) -> ModelSpec:
    """Read and check a spec. Time and memory are linear in `data`, which is bounded first.

    Raises:
        TooLarge: `data` is longer than `SPEC_BYTES`.
        Malformed: It is not one msgpack map, or a field is missing, mistyped or out of bounds.
        SpecError: The graph cannot be run.
    """
    return check(from_plain(ModelSpec, unpack(data, SPEC_BYTES, NODES_MAX)))
