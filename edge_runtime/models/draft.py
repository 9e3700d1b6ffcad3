"""A spec while it is being lowered: nodes, tensors and channel spaces, and what has to be said about them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import prod
from typing import Literal

import numpy as np

from edge_runtime.models.calls import Call, Floats, refused
from edge_runtime.models.spaces import NEVER, Dim, Reason, Spaces
from wire.errors import PeerError, SpecError
from wire.spec import Axis, AxisGroup, ModelSpec, Node, TensorSpec, decode, encode

Cut = tuple[int, slice]
WHOLE: Cut = (0, slice(None))
_NAME_MAX = 64
_CLASSES = "classes"


@dataclass(frozen=True, slots=True)
class Value:
    """What one node gives.

    Attributes:
        name: Of the node, or ``input``.
        dims: Its axes, without the batch.
    """

    name: str
    dims: tuple[Dim, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Its shape in the whole model."""
        return tuple(dim.length for dim in self.dims)


@dataclass(frozen=True, slots=True)
class Parts:
    """Values that stand behind one another along an axis, as a concat leaves them: no node yet.

    Channels that can be cut cannot be concatenated, because each width would have to be a prefix of the whole. But a layer
    over all of them is the sum of layers over each, so they are kept apart until something needs them as one.

    Attributes:
        values: Two or more.
        axis: Along which they stand.
    """

    values: tuple[Value, ...]
    axis: int

    @property
    def lengths(self) -> tuple[int, ...]:
        """The shape of all together."""
        shape = list(self.values[0].lengths)
        shape[self.axis] = sum(value.lengths[self.axis] for value in self.values)
        return tuple(shape)

    def slices(self) -> list[slice]:
        """Say where each part stands."""
        ends = np.cumsum([0, *(value.lengths[self.axis] for value in self.values)])
        return [slice(int(start), int(end)) for start, end in pairwise(ends)]


@dataclass(frozen=True, slots=True)
class Source:
    """Where an array of a spec stands in the module: a parameter, or a slice of one along an axis.

    Attributes:
        path: The parameter's name in ``state_dict``.
        axis: Of the slice.
        start: First entry of the slice.
        stop: The one behind its last; 0 for the whole parameter.
    """

    path: str
    axis: int = 0
    start: int = 0
    stop: int = 0

    def crosses(self, other: Source) -> bool:
        """Whether two that are not the same have entries in common."""
        if self.path != other.path or self == other:
            return False
        apart = self.axis == other.axis and (0 < self.stop <= other.start or 0 < other.stop <= self.start)
        return not apart


@dataclass(frozen=True, slots=True)
class Start:
    """How a tensor starts: as `wire.spec.TensorSpec` says it."""

    init: Literal["kaiming", "fan", "zeros", "ones"] = "zeros"
    fan_in: int = 1


@dataclass(frozen=True, slots=True)
class Weight:
    """An array that is to become a tensor of the spec."""

    dims: tuple[Dim, ...]
    array: Floats
    start: Start
    source: Source | None


@dataclass(frozen=True, slots=True)
class Step:
    """A node that is to be: as `wire.spec.Node`, and the axes of what it gives."""

    op: str
    inputs: tuple[str, ...]
    dims: tuple[Dim, ...]
    params: Mapping[str, str]
    attrs: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Exported:
    """A module as a spec.

    Attributes:
        spec: The model.
        arrays: The module's own weights, by the spec's tensor names, float32 in the spec's whole shapes.
        sources: Where each comes from; a tensor that the module lacks, such as the bias of a layer without one, is left out.
        fixed: Group to why it is not cut; the classes are left out.
        notes: What else is not as in the module, one sentence each.
    """

    spec: ModelSpec
    arrays: dict[str, Floats]
    sources: dict[str, Source]
    fixed: dict[str, Reason]
    notes: tuple[str, ...]


@dataclass(slots=True)
class Draft:
    """See the module."""

    spaces: Spaces = field(default_factory=Spaces)
    steps: dict[str, Step] = field(default_factory=dict)
    weights: dict[str, Weight] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)
    joined: dict[Parts, Value] = field(default_factory=dict)

    def note(self, path: str, text: str) -> None:
        """Say something in the report, once."""
        self.notes[f"{path or 'the model itself'}: {text}"] = None

    def opened(self, size: int, path: str) -> Dim:
        """Open a space for the channels that a layer makes."""
        return Dim(size, self.spaces.open(size, path))

    def value(self, name: str) -> Value:
        """Give what a step gives."""
        return Value(name, self.steps[name].dims)

    def add(
        self,
        name: str,
        op: str,
        inputs: Sequence[Value],
        dims: Sequence[Dim],
        *,
        params: Mapping[str, str] | None = None,
        attrs: Mapping[str, int] | None = None,
    ) -> Value:
        """Append a node and give what it gives; a name that is taken gets a number."""
        wanted = fitting(name or op)
        free, count = wanted, 1
        while free in self.steps or free == "input":
            count += 1
            free = fitting(f"{wanted}.{count}")
        names = tuple(value.name for value in inputs)
        self.steps[free] = Step(op, names, tuple(dims), params or {}, attrs or {})
        return self.value(free)

    def weigh(self, call: Call, role: str, dims: Sequence[Dim], start: Start, part: Cut = WHOLE) -> str:
        """Make a tensor of one of a call's arrays.

        Args:
            call: The call.
            role: Of the array; if the call lacks it the tensor is all zeros or ones, as `start` says, and that is noted.
            dims: Axes of the tensor; the array's entries are brought into their shape.
            start: How it starts where the module's own weights are not used.
            part: An axis and a slice along it, to take only these entries of the array.

        Returns:
            The tensor's name. An array that stands in the spec already is used again, with its axes joined to these.
        """
        param = call.params.get(role)
        (axis, where) = part
        suffix = "" if where == slice(None) else f".{where.start}"
        if param is None:
            shape = tuple(dim.length for dim in dims)
            name = fitting(f"{call.path}.{role}{suffix}".lstrip("."))
            array = np.ones(shape, np.float32) if start.init == "ones" else np.zeros(shape, np.float32)
            if call.options:
                self.note(call.path, f"it has no {role}, so the spec has one of {start.init}, which is trained")
            return self._placed(call, name, Weight(tuple(dims), array, start, None))
        source = Source(param.path, axis, where.start, where.stop) if suffix else Source(param.path)
        array = param.array[(slice(None),) * axis + (where,)].reshape([dim.length for dim in dims])
        name = fitting(param.path + suffix)
        return self._placed(call, name, Weight(tuple(dims), np.ascontiguousarray(array), start, source))

    def _placed(self, call: Call, name: str, weight: Weight) -> str:
        """Take a tensor into the spec; if it is there, as one that several calls share."""
        path = weight.source.path if weight.source else ""
        if any(
            known.source and weight.source and known.source.crosses(weight.source) for known in self.weights.values()
        ):
            problem = f"its array {path!r} is used again, in another part"
            raise refused(call.path, call.op, problem, "a layer of its own for each use")
        known = self.weights.setdefault(name, weight)
        if known is weight:
            return name
        if known.source != weight.source or len(known.dims) != len(weight.dims):
            raise refused(
                call.path, call.op, f"its array {path!r} is used in two ways", "a layer of its own for each use"
            )
        for one, other in zip(known.dims, weight.dims, strict=True):
            self.spaces.join(one, other, call.path)
        return name

    def fix(self, dims: Sequence[Dim], call: Call, why: str) -> None:
        """Close axes for cutting."""
        for dim in dims:
            self.spaces.fix(dim, call.path, why)

    def join(self, one: Sequence[Dim], other: Sequence[Dim], call: Call) -> None:
        """Let the axes of two values live and die together, one by one."""
        if len(one) != len(other) or any(a.length != b.length for a, b in zip(one, other, strict=True)):
            shapes = [tuple(dim.length for dim in dims) for dims in (one, other)]
            raise refused(
                call.path, call.op, f"shapes {shapes[0]} and {shapes[1]} are not the same", "values of one shape"
            )
        for a, b in zip(one, other, strict=True):
            self.spaces.join(a, b, call.path)

    def finish(self, name: str, input_shape: Sequence[int], output: Value) -> Exported:
        """Close the spec: leave out what its output does not need, name the groups, and check it.

        Raises:
            SpecError: It breaks a limit of the format.
        """
        names = self._live(output.name)
        steps = {step: self.steps[step] for step in self.steps if step in names}
        used = {tensor for step in steps.values() for tensor in step.params.values()}
        weights = {tensor: weight for tensor, weight in self.weights.items() if tensor in used}
        groups = self._groups(weights, output)
        tensors = tuple(
            TensorSpec(tensor, tuple(self._axis(dim, groups) for dim in w.dims), w.start.init, w.start.fan_in)
            for tensor, w in weights.items()
        )
        nodes = tuple(Node(step, s.op, s.inputs, s.params, s.attrs) for step, s in steps.items())
        closed = {root: reason for root, reason in self.spaces.fixed.items() if root in groups}
        spec = ModelSpec(
            fitting(name),
            tuple(input_shape),
            prod(output.lengths),
            tuple(AxisGroup(group, self.spaces.units[root], root not in closed) for root, group in groups.items()),
            tensors,
            nodes,
        )
        if not tensors:
            raise refused("", "output", "nothing in it can be trained", "a model with a layer that has weights")
        try:
            spec = decode(encode(spec))  # which checks it
        except PeerError as error:
            raise SpecError(f"the format of models has no room for it: {error}") from error
        fixed = {groups[root]: reason for root, reason in closed.items() if groups[root] != _CLASSES}
        sources = {tensor: w.source for tensor, w in weights.items() if w.source}
        arrays = {tensor: w.array for tensor, w in weights.items()}
        return Exported(spec, arrays, sources, fixed, tuple(self.notes))

    def _live(self, last: str) -> set[str]:
        names: set[str] = set()
        waiting = [last]
        while waiting:
            name = waiting.pop()
            if name not in names and name in self.steps:
                names.add(name)
                waiting += self.steps[name].inputs
        return names

    def _groups(self, weights: Mapping[str, Weight], output: Value) -> dict[int, str]:
        """Name every root space that a tensor follows, by the layer that opened it."""
        (end,) = (self.spaces.root(dim.space) if dim.space != NEVER else NEVER for dim in output.dims)
        groups: dict[int, str] = {}
        for weight in weights.values():
            for dim in weight.dims:
                root = self.spaces.root(dim.space) if dim.space != NEVER else NEVER
                if root not in groups and root != NEVER:
                    wanted = _CLASSES if root == end else fitting(self.spaces.names[root])
                    count = 1
                    free = wanted
                    while free in groups.values():
                        count += 1
                        free = fitting(f"{wanted}.{count}")
                    groups[root] = free
        return groups

    def _axis(self, dim: Dim, groups: Mapping[int, str]) -> Axis:
        if dim.space == NEVER:
            return Axis("", dim.length)
        root = self.spaces.root(dim.space)
        return Axis(groups[root], dim.inner * self.spaces.sizes[dim.space] // self.spaces.units[root], dim.outer)


def fitting(name: str) -> str:
    """Bring a name into the letters and the length that the format allows; a long one keeps its end and gets a digest."""
    plain = re.sub(r"[^A-Za-z0-9_.-]", "_", name) or "model"
    if len(plain) <= _NAME_MAX:
        return plain
    return f"{hashlib.sha256(plain.encode()).hexdigest()[:8]}-{plain[9 - _NAME_MAX :]}"


def scaled(dim: Dim, outer: int) -> Dim:
    """Repeat an axis as gates do."""
    return replace(dim, length=dim.length * outer, outer=dim.outer * outer)
