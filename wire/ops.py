"""The closed list of ops: what each takes, has and gives, one small entry per op.

A shape leaves the batch axis out. ``c`` are channels, the first axis of what convolutions and pools read; ``T`` are the
steps of a sequence, the first axis of what `lstm`, `gru` and `attention` read. An entry holds no arithmetic: that is an
engine's (`edge_runtime.engines.ops`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

Dims = tuple[int, ...]
Attrs = Mapping[str, int]
Roles = Mapping[str, Dims]
Give = Callable[[Attrs, Sequence[Dims], Roles], Dims]

SIDE_MAX = 1 << 16
"""The largest attribute of most kinds."""

RANK_MAX = 4
"""Axes that a `reshape` may give."""

_LEAST = {"padding": 0, "permille": 0, "first": 0, "second": 0}
_MOST = {"permille": 999, "first": RANK_MAX - 1, "second": RANK_MAX - 1}


@dataclass(frozen=True, slots=True)
class Op:
    """One op.

    Attributes:
        shape: Infers the output's shape from attributes, shapes of inputs and shapes of params; ValueError if they do not
            meet.
        roles: The params that a node has, all of them.
        attrs: The attributes that it has, all of them.
        free: Those that it may have.
        inputs: How many, at least and at most.
    """

    shape: Give
    roles: tuple[str, ...] = ()
    attrs: tuple[str, ...] = ()
    free: tuple[str, ...] = ()
    inputs: tuple[int, int] = (1, 1)


def check_form(op: str, inputs: int, roles: set[str], attrs: Attrs) -> None:
    """Hold what a node says against its op's entry.

    Raises:
        ValueError: It has another number of inputs, other params or attributes, or one out of bounds.
    """
    entry = OPS[op]
    for what, wanted, found in (("params", entry.roles, roles), ("attrs", entry.attrs, set(attrs) - set(entry.free))):
        if set(wanted) != found:
            raise ValueError(f"{what} {sorted(found)}, expected {sorted(wanted)}")
    if not entry.inputs[0] <= inputs <= entry.inputs[1]:
        raise ValueError(f"{inputs} inputs")
    for name, value in attrs.items():
        least, most = _LEAST.get(name, 1), _MOST.get(name, SIDE_MAX)
        if not least <= value <= most:
            raise ValueError(f"{name} {value}, expected {least} to {most}")
    if "padding" in attrs and attrs["padding"] >= attrs["kernel"]:
        raise ValueError(f"padding {attrs['padding']} is not below its kernel")


def group_count(attrs: Attrs, channels: int, each: int) -> int:
    """Count the groups of a convolution, within a structure too: they are cut whole, so as many as are left.

    Args:
        attrs: Of the convolution.
        channels: Of its input.
        each: Second dimension of its weight.
    """
    return channels // each if attrs.get("groups", 1) > 1 else 1


def _meet(found: Dims, wanted: Dims, what: str) -> None:
    if found != wanted:
        raise ValueError(f"{what} {found} does not meet {wanted}")


def _all_meet(params: Roles, wanted: Dims) -> None:
    for role, found in params.items():
        _meet(found, wanted, role)


def _rank(shape: Dims, wanted: int) -> Dims:
    if len(shape) != wanted:
        raise ValueError(f"an input of shape {shape}, expected {wanted} axes")
    return shape


def _same(_: Attrs, inputs: Sequence[Dims], __: Roles) -> Dims:
    return inputs[0]


def _linear(_: Attrs, inputs: Sequence[Dims], params: Roles) -> Dims:
    (out, width) = params["weight"]
    if not 1 <= len(inputs[0]) <= 2:
        raise ValueError(f"an input of shape {inputs[0]}, expected 1 or 2 axes")
    _meet(inputs[0][-1:], (width,), "input")
    _meet(params["bias"], (out,), "bias")
    return (*inputs[0][:-1], out)


def _conv(sides: int) -> Give:
    def give(attrs: Attrs, inputs: Sequence[Dims], params: Roles) -> Dims:
        (out, channels, *kernel) = params["weight"]
        (found, *lengths) = _rank(inputs[0], 1 + sides)
        groups = group_count(attrs, found, channels)
        _meet((found,), (channels * groups,), "input channels")
        if out % groups or (channels == 1 < groups and out != groups):
            raise ValueError(f"{out} outputs do not meet {groups} groups of {channels}")
        _meet(params["bias"], (out,), "bias")
        _meet(tuple(kernel), (attrs["kernel"],) * sides, "kernel")
        return (out, *(_slide(length, attrs) for length in lengths))

    return give


def _pool(sides: int) -> Give:
    def give(attrs: Attrs, inputs: Sequence[Dims], _: Roles) -> Dims:
        (channels, *lengths) = _rank(inputs[0], 1 + sides)
        return (channels, *(_slide(length, attrs) for length in lengths))

    return give


def _slide(length: int, attrs: Attrs) -> int:
    steps = (length + 2 * attrs.get("padding", 0) - attrs["kernel"]) // attrs["stride"] + 1
    if steps < 1:
        raise ValueError(f"kernel {attrs['kernel']} does not fit {length}")
    return steps


def _adaptive(sides: int) -> Give:
    return lambda attrs, inputs, _: (_rank(inputs[0], 1 + sides)[0], *(attrs["size"],) * sides)


def _channel_norm(_: Attrs, inputs: Sequence[Dims], params: Roles) -> Dims:
    _all_meet(params, inputs[0][:1])
    return inputs[0]


def _layer_norm(_: Attrs, inputs: Sequence[Dims], params: Roles) -> Dims:
    if not 1 <= len(inputs[0]) <= 2:
        raise ValueError(f"an input of shape {inputs[0]}, expected 1 or 2 axes")
    _all_meet(params, inputs[0][-1:])
    return inputs[0]


def _add(_: Attrs, inputs: Sequence[Dims], __: Roles) -> Dims:
    for other in inputs[1:]:
        _meet(other, inputs[0], "summands")
    return inputs[0]


def _mul(_: Attrs, inputs: Sequence[Dims], __: Roles) -> Dims:
    (first, second) = inputs
    if len(first) not in (2, 3) or second != (first[0], *(1,) * (len(first) - 1)):
        _meet(second, first, "factors")
    return first


def _concat(_: Attrs, inputs: Sequence[Dims], __: Roles) -> Dims:
    for other in inputs[1:]:
        _meet(other[1:], inputs[0][1:], "parts")
    return (sum(shape[0] for shape in inputs), *inputs[0][1:])


def _embedding(_: Attrs, inputs: Sequence[Dims], params: Roles) -> Dims:
    (steps,) = _rank(inputs[0], 1)
    return (steps, _rank(params["weight"], 2)[1])


def _transpose(attrs: Attrs, inputs: Sequence[Dims], _: Roles) -> Dims:
    shape = list(inputs[0])
    (first, second) = attrs["first"], attrs["second"]
    if max(first, second) >= len(shape):
        raise ValueError(f"axes {first} and {second} of an input of shape {inputs[0]}")
    shape[first], shape[second] = shape[second], shape[first]
    return tuple(shape)


def _reshape(attrs: Attrs, inputs: Sequence[Dims], _: Roles) -> Dims:
    wanted = tuple(f"d{axis}" for axis in range(len(attrs)))
    if set(wanted) != set(attrs):
        raise ValueError(f"attrs {sorted(attrs)}, expected {sorted(wanted)}")
    shape = tuple(attrs[name] for name in wanted)
    if prod(shape) != prod(inputs[0]):
        raise ValueError(f"{inputs[0]} does not fill {shape}")
    return shape


def _recurrent(gates: int) -> Give:
    def give(_: Attrs, inputs: Sequence[Dims], params: Roles) -> Dims:
        (steps, width) = _rank(inputs[0], 2)
        (rows, hidden) = _rank(params["weight_hh"], 2)
        _meet((rows,), (gates * hidden,), "weight_hh")
        _meet(params["weight_ih"], (rows, width), "weight_ih")
        _meet(params["bias_ih"], (rows,), "bias_ih")
        _meet(params["bias_hh"], (rows,), "bias_hh")
        return (steps, hidden)

    return give


def _last(_: Attrs, inputs: Sequence[Dims], __: Roles) -> Dims:
    return _rank(inputs[0], 2)[1:]


def _attention(attrs: Attrs, inputs: Sequence[Dims], params: Roles) -> Dims:
    (_, width) = _rank(inputs[0], 2)
    (out, inner) = _rank(params["weight_out"], 2)
    if inner % attrs["head"]:
        raise ValueError(f"{inner} values do not fall into heads of {attrs['head']}")
    _meet(params["weight_in"], (3 * inner, width), "weight_in")
    _meet(params["bias_in"], (3 * inner,), "bias_in")
    _meet((out,), (width,), "weight_out")
    _meet(params["bias_out"], (out,), "bias_out")
    return inputs[0]


_AFFINE = ("weight", "bias")
_GATES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
_WINDOW = ("kernel", "stride")

STATISTICS = ("mean", "variance")
"""The roles whose tensors no gradient moves: they follow what passes through in training."""

OPS: Mapping[str, Op] = {
    "linear": Op(_linear, _AFFINE),
    "conv2d": Op(_conv(2), _AFFINE, (*_WINDOW, "padding"), ("groups",)),
    "group_norm": Op(_channel_norm, _AFFINE, ("groups",)),
    "relu": Op(_same),
    "tanh": Op(_same),
    "sigmoid": Op(_same),
    "hard_sigmoid": Op(_same),
    "hard_swish": Op(_same),
    "max_pool2d": Op(_pool(2), (), _WINDOW),
    "avg_pool2d": Op(_pool(2), (), _WINDOW),
    "flatten": Op(lambda _, inputs, __: (prod(inputs[0]),)),
    "add": Op(_add, inputs=(2, 16)),
    "mul": Op(_mul, inputs=(2, 2)),
    "conv1d": Op(_conv(1), _AFFINE, (*_WINDOW, "padding"), ("groups",)),
    "max_pool1d": Op(_pool(1), (), _WINDOW),
    "avg_pool1d": Op(_pool(1), (), _WINDOW),
    "adaptive_avg_pool2d": Op(_adaptive(2), (), ("size",)),
    "adaptive_avg_pool1d": Op(_adaptive(1), (), ("size",)),
    "relu6": Op(_same),
    "gelu": Op(_same),
    "silu": Op(_same),
    "softmax": Op(_same),
    "dropout": Op(_same, (), ("permille",)),
    "batch_norm": Op(_channel_norm, (*_AFFINE, *STATISTICS)),
    "layer_norm": Op(_layer_norm, _AFFINE),
    "concat": Op(_concat, inputs=(2, 16)),
    "embedding": Op(_embedding, ("weight",)),
    "transpose": Op(_transpose, (), ("first", "second")),
    "reshape": Op(_reshape, (), ("d0",), tuple(f"d{axis}" for axis in range(1, RANK_MAX))),
    "lstm": Op(_recurrent(4), _GATES),
    "gru": Op(_recurrent(3), _GATES),
    "last": Op(_last),
    "attention": Op(_attention, ("weight_in", "bias_in", "weight_out", "bias_out"), ("head",)),
}
"""By name. What each computes stands in wire/SPEC.md, section 7."""
