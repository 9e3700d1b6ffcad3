"""Lowering what moves axes: flatten and reshape, transpose, means, picking the last step of a sequence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from edge_runtime.models.calls import Call, refused
from edge_runtime.models.draft import Draft, Parts, Step, Value
from edge_runtime.models.layers import Final
from edge_runtime.models.passing import each, name_of, single, swapped
from edge_runtime.models.spaces import Dim, flattened
from wire.ops import RANK_MAX

_ALONG = frozenset(
    (
        "relu",
        "relu6",
        "gelu",
        "silu",
        "tanh",
        "sigmoid",
        "hard_sigmoid",
        "hard_swish",
        "dropout",
        "batch_norm",
        "linear",
    )
)
"""Ops over single features that stay what they are when features stand upright, as channels of pictures of one entry."""


def reshape(draft: Draft, call: Call, inputs: list[Any]) -> Any:
    """Lower a change of shape: to nothing, a flatten, channels that stand upright, or a literal shape."""
    if isinstance(inputs[0], Final):
        return _of_final(draft, call, inputs[0], "squeeze")
    if call.shape is None:
        raise refused(call.path, call.op, "it takes the batch axis from its place", "samples on the first axis")
    wanted = call.shape
    found = inputs[0].lengths if isinstance(inputs[0], (Value, Parts)) else None
    if found == wanted:
        return inputs[0]
    if len(wanted) == 1 and (not isinstance(inputs[0], Parts) or inputs[0].axis == 0):
        return each(inputs[0], lambda x: flat(draft, call, x), draft, call)
    x = single(draft, call, inputs[0])
    if len(wanted) == 1:
        return flat(draft, call, x)
    if len(x.dims) == 1 and wanted == (*x.lengths, *(1,) * (len(wanted) - 1)) and len(wanted) <= 3:
        stands = upright(draft, x.name, len(wanted) - 1)
        if stands is not None:
            return stands
    if not 1 <= len(wanted) <= RANK_MAX:
        raise refused(call.path, call.op, f"to shape {wanted}", f"1 to {RANK_MAX} axes behind the batch")
    draft.fix(x.dims, call, f"is brought into the literal shape {wanted}")
    sizes = {f"d{place}": length for place, length in enumerate(wanted)}
    return draft.add(name_of(call), "reshape", [x], tuple(map(Dim, wanted)), attrs=sizes)


def flat(draft: Draft, call: Call, x: Value) -> Value:
    """Append a flatten, unless there is one axis already."""
    if len(x.dims) == 1:
        return x
    (dim, lost) = flattened(x.dims)
    draft.fix(lost, call, "is flattened together with another axis that can be cut")
    return draft.add(name_of(call), "flatten", [x], (dim,))


def upright(draft: Draft, name: str, ones: int) -> Value | None:
    """Let features stand as channels of one entry: what made them, back to a flatten of such channels, is done on these.

    A reshape has literal sizes, so that nothing that can be cut may pass one. But where a mean was flattened for linear layers
    and is now to become channels again (squeeze and excite), convolutions of kernel 1 do the same without either.

    Args:
        draft: The draft; steps that are read as features too stay, as a flatten of what stands upright.
        name: Of the step.
        ones: Axes of length 1 behind the channels.

    Returns:
        None if the features come from elsewhere.
    """
    chain: list[str] = []
    at = name
    while at in draft.steps and draft.steps[at].op in _ALONG and len(draft.steps[at].dims) == 1:
        readers = [
            step for step in draft.steps.values() if set(step.params.values()) & set(draft.steps[at].params.values())
        ]
        if len(readers) > 1:
            return None
        chain.append(at)
        (at,) = draft.steps[at].inputs
    source = draft.steps.get(at)
    if source is None or source.op != "flatten":
        return None
    stands = draft.value(source.inputs[0]) if source.inputs[0] in draft.steps else None
    if stands is None or stands.lengths[1:] != (1,) * ones:
        return None
    for step in reversed(chain):
        stands = _stood(draft, step, stands, ones)
    return stands


def _stood(draft: Draft, name: str, stands: Value, ones: int) -> Value:
    """Put an upright step before one over features, and make that a flatten of it."""
    old = draft.steps[name]
    (op, attrs) = (old.op, dict(old.attrs))
    dims = (old.dims[0], *(Dim(1),) * ones)
    if op == "linear":
        op, attrs = f"conv{ones}d", {"kernel": 1, "stride": 1, "padding": 0}
        weight = draft.weights[old.params["weight"]]
        array = weight.array.reshape(*weight.array.shape, *(1,) * ones)
        draft.weights[old.params["weight"]] = replace(weight, dims=(*weight.dims, *(Dim(1),) * ones), array=array)
    made = draft.add(f"{name}.up", op, [stands], dims, params=old.params, attrs=attrs)
    order = list(draft.steps)
    order.remove(made.name)
    order.insert(order.index(name), made.name)
    draft.steps[name] = Step("flatten", (made.name,), old.dims, {}, {})
    steps = {step: draft.steps[step] for step in order}
    draft.steps.clear()
    draft.steps.update(steps)
    return made


def transpose(draft: Draft, call: Call, inputs: list[Any]) -> Any:
    """Lower a swap of two axes behind the batch."""
    if isinstance(inputs[0], (Value, Parts)):
        rank = len(inputs[0].lengths)
        axes = [call.options[key] for key in ("dim0", "dim1")]
        (first, second) = ((dim if dim >= 0 else dim + rank + 1) - 1 for dim in axes)
        if min(first, second) >= 0:
            return _turned(draft, call, inputs[0], first, second)
    raise refused(call.path, call.op, "it takes the batch axis from its place", "samples on the first axis")


def _turned(draft: Draft, call: Call, value: Any, first: int, second: int) -> Any:
    moved = each(value, lambda x: swapped(draft, call, x, first, second), draft, call)
    if isinstance(moved, Parts):
        return replace(moved, axis={first: second, second: first}.get(moved.axis, moved.axis))
    return moved


def permute(draft: Draft, call: Call, inputs: list[Any]) -> Any:
    """Lower an order of axes as swaps."""
    value = inputs[0]
    dims = call.options["dims"]
    dims = list(dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims)
    rank = len(value.lengths) if isinstance(value, (Value, Parts)) else 0
    wanted = [(dim if dim >= 0 else dim + rank + 1) - 1 for dim in dims]
    if not wanted or wanted[0] != -1 or rank == 0:
        raise refused(call.path, call.op, f"to the order {tuple(dims)}", "samples on the first axis")
    now = list(range(rank))
    for place, axis in enumerate(wanted[1:]):
        at = now.index(axis)
        value = _turned(draft, call, value, place, at)
        now[place], now[at] = now[at], now[place]
    return value


def mean(draft: Draft, call: Call, inputs: list[Any]) -> Any:
    """Lower a mean over both sides of pictures, the length of a line, or the steps of a sequence."""
    value, dims = inputs[0], call.options.get("dim")
    rank = len(value.lengths) if isinstance(value, (Value, Parts)) else 0
    wanted = {(d if d >= 0 else d + rank + 1) - 1 for d in (dims if isinstance(dims, (tuple, list)) else [dims or 0])}
    if isinstance(value, Parts) and value.axis in wanted:
        value = single(draft, call, value)
    if wanted == {0} and rank == 2:
        made = _mean(draft, call, _turned(draft, call, value, 0, 1), 1)
        made = _turned(draft, call, made, 0, 1) if call.options.get("keepdim") else made
    elif rank in (2, 3) and wanted == set(range(1, rank)):
        made = _mean(draft, call, value, rank - 1)
    else:
        raise refused(
            call.path,
            call.op,
            f"over dim={dims} of {rank + 1} axes",
            "both sides of pictures, or one axis of a sequence",
        )
    if call.options.get("keepdim"):
        return made
    return each(made, lambda x: flat(draft, call, x), draft, call)


def _mean(draft: Draft, call: Call, value: Any, sides: int) -> Any:
    def act(x: Value) -> Value:
        draft.fix(x.dims[1:], call, "is what a mean runs over")
        return draft.add(
            name_of(call), f"adaptive_avg_pool{sides}d", [x], (x.dims[0], *(Dim(1),) * sides), attrs={"size": 1}
        )

    return each(value, act, draft, call)


def getitem(draft: Draft, call: Call, inputs: list[Any]) -> Any:
    """Lower picking one result of several, or the last step of a sequence."""
    value, index = inputs[0], call.options.get("index")
    if isinstance(value, tuple):
        picked = value[index] if isinstance(index, int) and -len(value) <= index < len(value) else None
        if picked is None:
            problem = f"result {index} is a cell state or a weight of attention"
            raise refused(call.path, call.op, problem, "the outputs, or the last hidden state")
        return picked
    if isinstance(value, Final):
        return _of_final(draft, call, value, index)
    parts = list(index) if isinstance(index, tuple) else [index]
    while len(parts) > 2 and parts[-1] in (slice(None), ...):
        parts.pop()
    lengths = value.lengths if isinstance(value, (Value, Parts)) else ()
    if len(lengths) == 2 and len(parts) == 2 and parts[0] == slice(None) and parts[1] in (-1, lengths[0] - 1):
        return _last(draft, call, value)
    raise refused(
        call.path,
        call.op,
        f"index {index} of shape {lengths}",
        "[:, -1], the last step; or mean",
    )


def _last(draft: Draft, call: Call, value: Any) -> Any:
    if isinstance(value, Parts) and value.axis == 0:
        value = single(draft, call, value)

    def act(x: Value) -> Value:
        draft.fix(x.dims[:1], call, "is a step of a sequence")
        return draft.add(name_of(call), "last", [x], x.dims[1:])

    made = each(value, act, draft, call)
    return replace(made, axis=0) if isinstance(made, Parts) else made


def _of_final(draft: Draft, call: Call, final: Final, index: Any) -> Any:
    if index in (-1, final.layers - 1) or (index == "squeeze" and final.layers == 1 and call.shape is not None):
        return _last(draft, call, final.steps)
    raise refused(call.path, call.op, f"{index} of the last hidden states", "[-1], the last layer's")
