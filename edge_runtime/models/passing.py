"""Lowering what has no weights and keeps the order of entries: activations, pools, dropout, sums, products, concat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from edge_runtime.models.calls import Call, refused
from edge_runtime.models.draft import Draft, Parts, Value
from edge_runtime.models.spaces import NEVER, Dim

SUMMANDS_MAX = 16
"""Inputs that an `add` or a `concat` takes."""


def single(draft: Draft, call: Call, value: Any) -> Value:
    """Give one value, concatenating parts if need be: then their channels are closed for cutting."""
    if isinstance(value, Value):
        return value
    if not isinstance(value, Parts):
        raise refused(call.path, call.op, "it reads a state or a tuple", "the outputs of a layer, or their last step")
    if value not in draft.joined:
        why = f"is concatenated for {call.op}, which is neither linear nor a convolution and cannot be split"
        draft.fix([part.dims[value.axis] for part in value.values], call, why)
        draft.joined[value] = concatenated(draft, call, value.values, value.axis)
    return draft.joined[value]


def concatenated(draft: Draft, call: Call, values: Sequence[Value], axis: int) -> Value:
    """Append the nodes that put values behind one another; their channels along the axis are never cut, the others are one."""
    for other in values[1:]:
        for place, (a, b) in enumerate(zip(values[0].dims, other.dims, strict=True)):
            if place != axis:
                draft.spaces.join(a, b, call.path)
    if len(values) > SUMMANDS_MAX:
        raise refused(call.path, call.op, f"{len(values)} parts", f"at most {SUMMANDS_MAX}")
    turned = [swapped(draft, call, value, 0, axis) for value in values]
    length = sum(value.dims[0].length for value in turned)
    whole = draft.add(call.name, "concat", turned, (Dim(length), *turned[0].dims[1:]))
    return swapped(draft, call, whole, 0, axis)


def swapped(draft: Draft, call: Call, value: Value, first: int, second: int) -> Value:
    """Append a transpose, unless both axes are one."""
    if first == second:
        return value
    dims = list(value.dims)
    dims[first], dims[second] = dims[second], dims[first]
    (low, high) = sorted((first, second))
    return draft.add(f"{call.name}.turn", "transpose", [value], dims, attrs={"first": low, "second": high})


def each(value: Any, act: Callable[[Value], Value], draft: Draft, call: Call) -> Value | Parts:
    """Do the same to a value, or to each of its parts: for what treats every channel by itself."""
    if isinstance(value, Parts):
        return replace(value, values=tuple(act(part) for part in value.values))
    return act(single(draft, call, value))


def channelled(draft: Draft, call: Call, value: Any) -> Any:
    """Give a value for what slides over all axes but the first; parts along another one than that as one."""
    return single(draft, call, value) if isinstance(value, Parts) and value.axis else value


def elementwise(op: str) -> Callable[[Draft, Call, list[Any]], Any]:
    """Lower an activation of one input."""

    def lower(draft: Draft, call: Call, inputs: list[Any]) -> Any:
        if call.options.get("approximate", "none") != "none":
            raise refused(call.path, call.op, f"approximate={call.options['approximate']!r}", 'approximate="none"')
        return each(inputs[0], lambda x: draft.add(name_of(call), op, [x], x.dims), draft, call)

    return lower


def name_of(call: Call) -> str:
    """Name a node: by its module; a step of the model's own forward by torch.fx's name."""
    return call.path if call.path and call.of_module else call.name


def dropout(draft: Draft, call: Call, inputs: list[Any]) -> Any:
    """Lower dropout, to a thousandth."""
    if call.options.get("training", True) is False:
        return inputs[0]
    permille = permille_of(draft, call, "p", float(call.options.get("p", 0.5)))
    if not permille:
        return inputs[0]
    return each(
        inputs[0], lambda x: draft.add(name_of(call), "dropout", [x], x.dims, attrs={"permille": permille}), draft, call
    )


def permille_of(draft: Draft, call: Call, name: str, p: float) -> int:
    """Read the share that a dropout drops, in thousandths; says so where it has to be rounded."""
    permille = round(1000 * p)
    if permille > 999:
        raise refused(call.path, call.op, f"{name}={p:g} drops everything", f"{name} up to 0.999")
    if abs(permille - 1000 * p) > 1e-6:
        draft.note(call.path, f"dropout of {p:g} is rounded to {permille / 1000:g}")
    return permille


def softmax(draft: Draft, call: Call, inputs: list[Any]) -> Any:
    """Lower a softmax over the last axis, whose entries are never cut."""
    x = single(draft, call, inputs[0])
    dim, rank = call.options.get("dim"), len(x.dims)
    if dim not in (-1, rank) or call.options.get("dtype") is not None:
        raise refused(
            call.path, call.op, f"dim={dim} of {rank + 1} axes", "dim=-1, with a transpose before and behind it"
        )
    draft.fix(x.dims[-1:], call, "feeds a softmax, whose sum runs over all of them")
    return draft.add(name_of(call), "softmax", [x], x.dims)


def pool(op: str, sides: int) -> Callable[[Draft, Call, list[Any]], Any]:
    """Lower a max or average pool."""

    def lower(draft: Draft, call: Call, inputs: list[Any]) -> Any:
        options = call.options
        kernel = square(call, "kernel_size", options["kernel_size"])
        stride = square(call, "stride", options.get("stride") or kernel)
        wanted = {"padding": 0, "dilation": 1, "return_indices": False, "divisor_override": None}
        for key, value in wanted.items():
            found = options.get(key, value)
            if found != value and found != (value,) * sides:
                raise refused(call.path, call.op, f"{key}={found}", f"{key}={value}")
        lengths = inputs[0].lengths if isinstance(inputs[0], (Value, Parts)) else ()
        if options.get("ceil_mode") and any((length - kernel) % stride for length in lengths[1:]):
            raise refused(call.path, call.op, "ceil_mode=True with a window over the edge", "ceil_mode=False")
        attrs, value = {"kernel": kernel, "stride": stride}, channelled(draft, call, inputs[0])
        return each(value, lambda x: _pooled(draft, call, x, op, attrs), draft, call)

    return lower


def _pooled(draft: Draft, call: Call, x: Value, op: str, attrs: dict[str, int]) -> Value:
    sides = 2 if op.endswith("2d") else 1
    if len(x.dims) != 1 + sides or call.shape is None or len(call.shape) != 1 + sides:
        raise refused(
            call.path, call.op, f"an input of shape {x.lengths}", f"channels and {sides} sides behind the batch"
        )
    draft.fix(x.dims[1:], call, "is a side that a pool slides over")
    return draft.add(name_of(call), op, [x], (x.dims[0], *map(Dim, call.shape[1:])), attrs=attrs)


def adaptive_pool(op: str) -> Callable[[Draft, Call, list[Any]], Any]:
    """Lower an adaptive pool; a max pool to a plain one, if its windows are all of one size."""

    def lower(draft: Draft, call: Call, inputs: list[Any]) -> Any:
        size = square(call, "output_size", call.options["output_size"])
        if size < 1:
            raise refused(call.path, call.op, f"output_size={size}", "a size of 1 or more")
        value = channelled(draft, call, inputs[0])
        if not op.startswith("max"):
            return each(value, lambda x: _pooled(draft, call, x, op, {"size": size}), draft, call)
        lengths = set(value.lengths[1:]) if isinstance(value, (Value, Parts)) else set()
        if len(lengths) != 1 or min(lengths) % size or call.options.get("return_indices"):
            raise refused(
                call.path, call.op, f"sides {sorted(lengths)} to {size}", "square pictures whose side is a multiple"
            )
        step = min(lengths) // size
        return each(value, lambda x: _pooled(draft, call, x, op, {"kernel": step, "stride": step}), draft, call)

    return lower


def square(call: Call, name: str, value: Any) -> int:
    """Read a number that may be given once for each side."""
    numbers = set(value) if isinstance(value, (tuple, list)) else {value}
    if len(numbers) != 1 or not all(isinstance(n, int) for n in numbers):
        raise refused(call.path, call.op, f"{name}={value}", f"one whole number as {name}, for all sides")
    (number,) = numbers
    return int(number)


def add(draft: Draft, call: Call, inputs: list[Any]) -> Any:
    """Lower a sum of two values of one shape; their channels are one from here on."""
    return _met(draft, call, _two(call, inputs), "add")


def mul(draft: Draft, call: Call, inputs: list[Any]) -> Any:
    """Lower a product of two values of one shape, or of a value and one number for each of its channels."""
    (one, other) = _two(call, inputs)
    if one.lengths == other.lengths:
        return _met(draft, call, (one, other), "mul")
    for value, gate in ((one, other), (other, one)):
        if gate.lengths == (value.lengths[0], *(1,) * (len(value.lengths) - 1)):
            first, second = single(draft, call, value), single(draft, call, gate)
            draft.join(first.dims[:1], second.dims[:1], call)
            return draft.add(name_of(call), "mul", [first, second], first.dims)
    problem = f"shapes {one.lengths} and {other.lengths}"
    raise refused(call.path, call.op, problem, "one shape, or (channels, 1, 1) for (channels, height, width)")


def _two(call: Call, inputs: list[Any]) -> tuple[Any, Any]:
    number = call.options.get("other", call.options.get("input"))
    if len(inputs) != 2 or call.options.get("alpha", 1) != 1:
        problem = f"with the number {number}" if number is not None else f"{len(inputs)} values, or a factor"
        raise refused(
            call.path, call.op, problem, f"{call.op} of two values; a number belongs into the weights before it"
        )
    if not all(isinstance(value, (Value, Parts)) for value in inputs):
        raise refused(call.path, call.op, "it reads a state or a tuple", "the outputs of a layer, or their last step")
    return inputs[0], inputs[1]


def _met(draft: Draft, call: Call, inputs: tuple[Any, Any], op: str) -> Any:
    """Append a node over two values of one shape, part by part if both have the same parts."""
    (one, other) = inputs
    if (
        isinstance(one, Parts)
        and isinstance(other, Parts)
        and one.axis == other.axis
        and one.slices() == other.slices()
    ):
        pairs = zip(one.values, other.values, strict=True)
        return replace(one, values=tuple(_met(draft, call, pair, op) for pair in pairs))
    (a, b) = (single(draft, call, value) for value in inputs)
    draft.join(a.dims, b.dims, call)
    dims = tuple(x if x.space != NEVER else y for x, y in zip(a.dims, b.dims, strict=True))
    return draft.add(name_of(call), op, [a, b], dims)


def cat(draft: Draft, call: Call, inputs: list[Any]) -> Any:
    """Lower a concat: to parts if any channel along its axis may be cut, else to a node."""
    values: list[Value] = []
    rank = len(call.shape or ())
    dim = int(call.options.get("dim", 0))
    axis = (dim if dim >= 0 else dim + rank + 1) - 1
    if axis < 0:
        raise refused(call.path, call.op, f"dim={dim} stacks samples", "a dim behind the batch")
    for value in inputs:
        parted = isinstance(value, Parts) and value.axis == axis
        values += value.values if parted else [single(draft, call, value)]
    if len(inputs) < 2:
        return inputs[0]
    if all(value.dims[axis].space == NEVER for value in values):
        return concatenated(draft, call, values, axis)
    return Parts(tuple(values), axis)
