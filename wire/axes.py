"""Which axis of which value follows which channels that can be cut: what `spec.check` holds a model to beside its shapes.

Sizes alone do not tell a model that may be cut from one that only seems so: a flatten that repeats channels on the wrong
side has the right length, and an average over an axis that follows channels has one whatever is cut. So every axis of every
value is followed through the graph. It is either whole in every width, or ``outer`` runs of all channels of one prunable
group, ``inner`` entries for each (see `spec.Axis`), and each op says here which of its axes must be the same as which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from wire.errors import SpecError

if TYPE_CHECKING:
    from wire.spec import Axis, ModelSpec, Node

Follows = tuple[str, int, int] | None
"""Group, inner and outer of an axis that is cut; None for one that is whole in every width."""

Line = tuple[Follows, ...]


@dataclass(frozen=True, slots=True)
class _Seen:
    """What an op is asked about: its node, and the axes of its inputs and of its params."""

    node: Node
    shapes: Sequence[tuple[int, ...]]
    inputs: Sequence[Line]
    params: Mapping[str, Line]


def check_axes(spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Follow every axis through a graph whose shapes meet. Cost: one walk.

    Args:
        spec: The model.
        shapes: Of ``input`` and of every node in the whole model.

    Raises:
        SpecError: Two axes that must be cut together are not, or where channels stand would matter; names the node.
    """
    prunable = {g.name for g in spec.groups if g.prunable}
    tensors = {t.name: tuple(_of(axis, prunable) for axis in t.axes) for t in spec.tensors}
    lines: dict[str, Line] = {"input": (None,) * len(spec.input_shape)}
    for node in spec.nodes:
        params = {role: tensors[name] for role, name in node.params.items()}
        seen = _Seen(node, [shapes[name] for name in node.inputs], [lines[name] for name in node.inputs], params)
        try:
            lines[node.name] = _RULES.get(node.op, _alike)(seen)
        except ValueError as error:
            raise SpecError(f"node {node.name!r} ({node.op}): {error}") from None
    if any(lines[spec.nodes[-1].name]):
        raise SpecError(f"the last node {spec.nodes[-1].name!r} gives channels that can be cut")


def _of(axis: Axis, prunable: set[str]) -> Follows:
    return (axis.group, axis.inner, axis.outer) if axis.group in prunable else None


def _meet(what: str, *axes: Follows) -> None:
    for axis in axes[1:]:
        if axis != axes[0]:
            raise ValueError(f"{what}: {_said(axis)} does not meet {_said(axes[0])}")


def _said(axis: Follows) -> str:
    if axis is None:
        return "what is never cut"
    return f"{axis[2]} times group {axis[0]!r} by {axis[1]}"


def _whole(what: str, *axes: Follows) -> None:
    if any(axes):
        raise ValueError(f"{what} must not be channels that can be cut")


def _alike(seen: _Seen) -> Line:
    """An op that goes entry by entry: all inputs are cut alike."""
    for line in seen.inputs[1:]:
        for place, axis in enumerate(line):
            _meet(f"axis {place}", seen.inputs[0][place], axis)
    return seen.inputs[0]


def _softmax(seen: _Seen) -> Line:
    _whole("what a softmax sums over", seen.inputs[0][-1])
    return seen.inputs[0]


def _mul(seen: _Seen) -> Line:
    (first, second) = seen.inputs
    if seen.shapes[0] == seen.shapes[1]:
        return _alike(seen)
    _meet("channels", first[0], second[0])
    return first


def _linear(seen: _Seen) -> Line:
    (out, width) = seen.params["weight"]
    _meet("inputs", seen.inputs[0][-1], width)
    _meet("outputs", out, *seen.params["bias"])
    return (*seen.inputs[0][:-1], out)


def _conv(seen: _Seen) -> Line:
    (out, each, *kernel) = seen.params["weight"]
    (channels, *sides) = seen.inputs[0]
    _whole("the sides of a convolution", *sides, *kernel)
    _meet("outputs", out, *seen.params["bias"])
    groups = seen.node.attrs.get("groups", 1)
    if groups == 1:
        _meet("input channels", channels, each)
    else:
        _whole("the inputs of one group", each)
        _in_runs(channels, seen.shapes[0][0] // groups)
        if channels is None or out is None or (channels[0], channels[2]) != (out[0], out[2]):
            _meet("the groups' channels", channels, out)
    return (out, *sides)


def _in_runs(channels: Follows, each: int) -> None:
    """Let whatever is cut out of channels be whole runs of `each`."""
    if channels is not None and channels[1] % each:
        raise ValueError(f"{_said(channels)} cuts groups of {each} channels apart")


def _channel_norm(seen: _Seen) -> Line:
    _meet("channels", seen.inputs[0][0], *(axis for line in seen.params.values() for axis in line))
    groups = seen.node.attrs.get("groups", 1)
    if groups > 1:
        _in_runs(seen.inputs[0][0], seen.shapes[0][0] // groups)
    return seen.inputs[0]


def _layer_norm(seen: _Seen) -> Line:
    _meet("channels", seen.inputs[0][-1], *(axis for line in seen.params.values() for axis in line))
    return seen.inputs[0]


def _pool(seen: _Seen) -> Line:
    _whole("the sides of a pool", *seen.inputs[0][1:])
    return seen.inputs[0]


def _flatten(seen: _Seen) -> Line:
    (line, shape) = seen.inputs[0], seen.shapes[0]
    cut = [place for place, axis in enumerate(line) if axis is not None]
    if len(cut) > 1:
        raise ValueError("two axes that can be cut do not make one")
    for place in cut:
        (group, inner, outer) = line[place] or ("", 1, 1)
        return ((group, inner * prod(shape[place + 1 :]), prod(shape[:place]) * outer),)
    return (None,)


def _concat(seen: _Seen) -> Line:
    _whole("what stands behind one another", *(line[0] for line in seen.inputs))
    return _alike(seen)


def _embedding(seen: _Seen) -> Line:
    _whole("the words of an embedding", *seen.inputs[0], seen.params["weight"][0])
    return (None, seen.params["weight"][1])


def _transpose(seen: _Seen) -> Line:
    line = list(seen.inputs[0])
    (first, second) = seen.node.attrs["first"], seen.node.attrs["second"]
    line[first], line[second] = line[second], line[first]
    return tuple(line)


def _reshape(seen: _Seen) -> Line:
    _whole("what is brought into a literal shape", *seen.inputs[0])
    return (None,) * len(seen.node.attrs)


def _recurrent(gates: int) -> Callable[[_Seen], Line]:
    def follow(seen: _Seen) -> Line:
        (steps, width) = seen.inputs[0]
        (rows, hidden) = seen.params["weight_hh"]
        _whole("steps", steps)
        _meet("inputs", width, seen.params["weight_ih"][1])
        _meet("gates", _times(hidden, gates), rows, seen.params["weight_ih"][0])
        _meet("gates", rows, *seen.params["bias_ih"], *seen.params["bias_hh"])
        return (steps, hidden)

    return follow


def _times(axis: Follows, runs: int) -> Follows:
    if axis is None:
        return None
    (group, inner, outer) = axis
    if outer != 1:
        raise ValueError(f"{_said(axis)} cannot be repeated")
    return (group, inner, runs)


def _last(seen: _Seen) -> Line:
    _whole("steps", seen.inputs[0][0])
    return seen.inputs[0][1:]


def _attention(seen: _Seen) -> Line:
    (steps, width) = seen.inputs[0]
    (out, inner) = seen.params["weight_out"]
    (rows, columns) = seen.params["weight_in"]
    _whole("steps", steps)
    _meet("inputs", width, columns)
    _meet("heads", _times(inner, 3), rows, *seen.params["bias_in"])
    _meet("outputs", out, width, *seen.params["bias_out"])
    if inner is not None and inner[1] % seen.node.attrs["head"]:
        raise ValueError(f"channels of {inner[1]} entries cut heads of {seen.node.attrs['head']} apart")
    return (steps, out)


_RULES: Mapping[str, Callable[[_Seen], Line]] = {
    "softmax": _softmax,
    "mul": _mul,
    "linear": _linear,
    **dict.fromkeys(("conv1d", "conv2d"), _conv),
    **dict.fromkeys(("group_norm", "batch_norm"), _channel_norm),
    "layer_norm": _layer_norm,
    **dict.fromkeys(("max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d"), _pool),
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d"), _pool),
    "flatten": _flatten,
    "concat": _concat,
    "embedding": _embedding,
    "transpose": _transpose,
    "reshape": _reshape,
    "lstm": _recurrent(4),
    "gru": _recurrent(3),
    "last": _last,
    "attention": _attention,
}
"""By op; an op that is not here goes entry by entry."""
