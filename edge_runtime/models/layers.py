"""Lowering what has weights: linear layers, convolutions, norms, embeddings, LSTM and GRU, attention.

A linear layer or a convolution over parts (see `draft.Parts`) is split by its inputs: ``f(concat(a, b)) = f_a(a) + f_b(b)``.
The first part has the layer's bias; the others have one of zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from edge_runtime.models.calls import Call, refused
from edge_runtime.models.draft import Draft, Parts, Start, Value, scaled
from edge_runtime.models.passing import SUMMANDS_MAX, name_of, permille_of, single, square
from edge_runtime.models.spaces import Dim
from wire.spec import NORM_EPSILON

_MOMENTUM = 0.1
_ONES = Start("ones")
_EVEN = Start("kaiming", 2)
"""Draws evenly with variance ``2 / fan_in``, here 1 as in torch's embedding."""


def linear(draft: Draft, call: Call, inputs: list[Any]) -> Any:
    """Lower a linear layer over the last axis."""
    rank = len(inputs[0].lengths) if isinstance(inputs[0], (Value, Parts)) else 0
    if not 1 <= rank <= 2:
        raise refused(
            call.path, call.op, f"an input of {rank} axes behind the batch", "(features) or (steps, features)"
        )
    out = draft.opened(call.options["out_features"], call.path)

    def layer(part: _Part) -> Value:
        params = _affine(draft, call, part, out, ((), call.options["in_features"]))
        return draft.add(part.name, "linear", [part.value], (*part.value.dims[:-1], out), params=params)

    return _summed(draft, call, inputs[0], rank - 1, layer)


def conv(op: str, sides: int) -> Callable[[Draft, Call, list[Any]], Any]:
    """Lower a convolution; by itself for every channel, in groups, or over all."""

    def lower(draft: Draft, call: Call, inputs: list[Any]) -> Any:
        attrs = _window(call)
        groups, channels = call.options["groups"], call.options["in_channels"]
        if call.shape is None or len(call.shape) != 1 + sides:
            raise refused(
                call.path, call.op, f"an output of shape {call.shape}", f"channels and {sides} sides behind the batch"
            )
        lengths = tuple(map(Dim, call.shape[1:]))
        kernel = (Dim(attrs["kernel"]),) * sides
        if groups > 1:
            return _grouped(draft, call, inputs[0], (op, attrs, (kernel, lengths)))
        out = draft.opened(call.options["out_channels"], call.path)

        def layer(part: _Part) -> Value:
            draft.fix(part.value.dims[1:], call, "is a side that a convolution slides over")
            fan_in = channels * prod(dim.length for dim in kernel)
            params = _affine(draft, call, part, out, (kernel, fan_in))
            return draft.add(part.name, op, [part.value], (out, *lengths), params=params, attrs=attrs)

        return _summed(draft, call, inputs[0], 0, layer)

    return lower


def _grouped(
    draft: Draft, call: Call, value: Any, form: tuple[str, dict[str, int], tuple[tuple[Dim, ...], tuple[Dim, ...]]]
) -> Any:
    """Lower a convolution in groups: these are cut whole; one filter per channel lives and dies with it."""
    (op, attrs, (kernel, lengths)) = form
    groups, channels, outputs = (call.options[key] for key in ("groups", "in_channels", "out_channels"))
    fan_in = channels // groups * prod(dim.length for dim in kernel)
    if groups == channels:
        if outputs != groups:
            problem = f"{outputs // groups} filters for each of {groups} channels"
            raise refused(call.path, call.op, problem, "one filter for each channel, then a convolution of kernel 1")

        def filters(x: Value, where: slice) -> Value:
            draft.fix(x.dims[1:], call, "is a side that a convolution slides over")
            if x.dims[0].length == 1:
                draft.fix(x.dims[:1], call, "is one channel alone, whose filter is a convolution of all channels")
            weight = draft.weigh(call, "weight", (x.dims[0], Dim(1), *kernel), Start("fan", fan_in), (0, where))
            bias = draft.weigh(call, "bias", x.dims[:1], _bias(call, fan_in), (0, where))
            own = attrs | {"groups": x.dims[0].length}
            params = {"weight": weight, "bias": bias}
            return draft.add(name_of(call), op, [x], (x.dims[0], *lengths), params=params, attrs=own)

        return _by_channel(draft, call, value, filters)
    x = single(draft, call, value)
    draft.fix(x.dims[1:], call, "is a side that a convolution slides over")
    runs = _runs(draft, call, x.dims[0], groups)
    out = Dim(outputs, runs, outputs // groups)
    dims = (out, Dim(channels // groups), *kernel)
    params = {
        "weight": draft.weigh(call, "weight", dims, Start("fan", fan_in)),
        "bias": draft.weigh(call, "bias", (out,), _bias(call, fan_in)),
    }
    return draft.add(name_of(call), op, [x], (out, *lengths), params=params, attrs=attrs | {"groups": groups})


def _runs(draft: Draft, call: Call, channels: Dim, groups: int) -> int:
    """Open a space of groups, each of which lives and dies with its run of channels."""
    runs = draft.opened(groups, call.path).space
    draft.join([channels], [Dim(channels.length, runs, channels.length // groups)], call)
    return runs


def _window(call: Call) -> dict[str, int]:
    kernel = square(call, "kernel_size", call.options["kernel_size"])
    stride = square(call, "stride", call.options["stride"])
    padding = call.options["padding"]
    if square(call, "dilation", call.options["dilation"]) != 1:
        raise refused(call.path, call.op, f"dilation={call.options['dilation']}", "dilation=1 and a larger kernel")
    if call.options["padding_mode"] != "zeros":
        raise refused(call.path, call.op, f"padding_mode={call.options['padding_mode']!r}", 'padding_mode="zeros"')
    if padding == "same" and kernel % 2 == 0:
        raise refused(
            call.path, call.op, f"padding='same' of kernel {kernel}, which is not even on both sides", "an odd kernel"
        )
    padding = {"same": kernel // 2, "valid": 0}.get(padding, padding)
    padding = square(call, "padding", padding)
    if padding >= kernel:
        raise refused(call.path, call.op, f"padding {padding} of kernel {kernel}", "padding below the kernel")
    return {"kernel": kernel, "stride": stride, "padding": padding}


class _Part:
    """One part of a layer's input.

    Attributes:
        value: What the part reads.
        where: Its place among the layer's inputs.
        first: Whether it has the layer's bias.
        name: Of its node.
    """

    __slots__ = ("first", "name", "value", "where")

    def __init__(self, value: Value, where: slice, first: bool, name: str) -> None:
        self.value, self.where, self.first, self.name = value, where, first, name


def _summed(draft: Draft, call: Call, value: Any, axis: int, layer: Callable[[_Part], Value]) -> Value:
    """Run a layer over a value, or the sum of its slices over the parts of one."""
    name = name_of(call)
    if not (isinstance(value, Parts) and value.axis == axis):
        return layer(_Part(single(draft, call, value), slice(None), True, name))
    text = f"it is split by its {len(value.values)} inputs, so that each of them can be cut"
    draft.note(call.path, f"{text}; each but the first has a bias of zeros, which is trained")
    outputs = [
        layer(_Part(part, where, place == 0, f"{name}.{place}"))
        for place, (part, where) in enumerate(zip(value.values, value.slices(), strict=True))
    ]
    for output in outputs[1:]:
        draft.join(outputs[0].dims, output.dims, call)
    while len(outputs) > 1:
        some, outputs = outputs[:SUMMANDS_MAX], outputs[SUMMANDS_MAX:]
        outputs.append(draft.add(name, "add", some, some[0].dims))
    return outputs[0]


def _affine(draft: Draft, call: Call, part: _Part, out: Dim, window: tuple[tuple[Dim, ...], int]) -> dict[str, str]:
    """Make weight and bias of a layer over a part of its input; `window` is its kernel, and the inputs of one output."""
    (kernel, fan_in) = window
    dims = (out, part.value.dims[0 if kernel else -1], *kernel)
    weight = draft.weigh(call, "weight", dims, Start("fan", fan_in), (1, part.where))
    if part.first:
        return {"weight": weight, "bias": draft.weigh(call, "bias", (out,), _bias(call, fan_in))}
    path = call.params["weight"].path.removesuffix("weight")
    own = replace(call, path=f"{path}{part.where.start}", params={}, options={})
    return {"weight": weight, "bias": draft.weigh(own, "bias", (out,), Start("zeros"))}


def _bias(call: Call, fan_in: int) -> Start:
    """Say how a bias starts: as torch draws it, or as zeros where the layer has none."""
    return Start("fan", fan_in) if "bias" in call.params else Start("zeros")


def _by_channel(draft: Draft, call: Call, value: Any, layer: Callable[[Value, slice], Value]) -> Any:
    """Run a layer that treats every channel by itself over a value, or over parts along the first axis."""
    if isinstance(value, Parts) and value.axis == 0:
        made = [layer(part, where) for part, where in zip(value.values, value.slices(), strict=True)]
        return replace(value, values=tuple(made))
    return layer(single(draft, call, value), slice(None))


def batch_norm(draft: Draft, call: Call, inputs: list[Any]) -> Any:
    """Lower a batch norm; its channels are the first axis."""
    _epsilon(call)
    if "running_mean" not in call.params:
        raise refused(call.path, call.op, "track_running_stats=False", "track_running_stats=True, or a GroupNorm")
    if call.options["momentum"] != _MOMENTUM:
        draft.note(call.path, f"its momentum is {call.options['momentum']}; here statistics follow with {_MOMENTUM}")
    roles = {"weight": _ONES, "bias": Start(), "running_mean": Start(), "running_var": _ONES}

    def norm(x: Value, where: slice) -> Value:
        draft.fix(x.dims[1:], call, "is what a batch norm averages over")
        made = [draft.weigh(call, role, x.dims[:1], start, (0, where)) for role, start in roles.items()]
        params = dict(zip(("weight", "bias", "mean", "variance"), made, strict=True))
        return draft.add(name_of(call), "batch_norm", [x], x.dims, params=params)

    return _by_channel(draft, call, inputs[0], norm)


def group_norm(draft: Draft, call: Call, inputs: list[Any]) -> Any:
    """Lower a group norm; more than one group of it is cut whole."""
    _epsilon(call)
    x, groups = single(draft, call, inputs[0]), call.options["num_groups"]
    draft.fix(x.dims[1:], call, "is what a group norm averages over")
    if groups > 1:
        _runs(draft, call, x.dims[0], groups)
    params = {
        "weight": draft.weigh(call, "weight", x.dims[:1], _ONES),
        "bias": draft.weigh(call, "bias", x.dims[:1], Start()),
    }
    return draft.add(name_of(call), "group_norm", [x], x.dims, params=params, attrs={"groups": groups})


def layer_norm(draft: Draft, call: Call, inputs: list[Any]) -> Any:
    """Lower a layer norm over the last axis."""
    _epsilon(call)
    x, over = single(draft, call, inputs[0]), tuple(call.options["normalized_shape"])
    if over != x.lengths[-1:] or len(x.dims) > 2:
        problem = f"over axes {over} of {x.lengths}"
        raise refused(call.path, call.op, problem, "the last of one or two axes; GroupNorm(1, channels) for pictures")
    params = {
        "weight": draft.weigh(call, "weight", x.dims[-1:], _ONES),
        "bias": draft.weigh(call, "bias", x.dims[-1:], Start()),
    }
    return draft.add(name_of(call), "layer_norm", [x], x.dims, params=params)


def _epsilon(call: Call) -> None:
    found = call.options["eps"]
    if found != NORM_EPSILON:
        raise refused(call.path, call.op, f"eps={found}", f"eps={NORM_EPSILON:g}")


def embedding(draft: Draft, call: Call, inputs: list[Any]) -> Any:
    """Lower an embedding of the input's words."""
    wanted = {"padding_idx": None, "max_norm": None, "scale_grad_by_freq": False, "sparse": False}
    for key, value in wanted.items():
        if call.options[key] != value:
            raise refused(call.path, call.op, f"{key}={call.options[key]}", f"{key}={value}")
    x = single(draft, call, inputs[0])
    if x.name != "input" or len(x.dims) != 1:
        raise refused(call.path, call.op, f"it reads {x.name!r} of shape {x.lengths}", "the input, a line of words")
    (words, size) = call.params["weight"].array.shape
    out = draft.opened(size, call.path)
    dims = (Dim(words), out)
    params = {"weight": draft.weigh(call, "weight", dims, _EVEN)}
    return draft.add(name_of(call), "embedding", [x], (x.dims[0], out), params=params)


def attention(draft: Draft, call: Call, inputs: list[Any]) -> Any:
    """Lower self-attention: heads are cut whole; inputs and outputs are of one space."""
    problems = {
        "query, key and value are not one": len(inputs) != 3 or len({id(v) for v in inputs}) != 1,
        "batch_first=False": not call.options["batch_first"],
        f"dropout={call.options['dropout']} of its weights": call.options["dropout"] != 0,
        "a mask": any(call.options.get(k) is not None for k in ("key_padding_mask", "attn_mask")),
        "causal": bool(call.options.get("is_causal")),
        "keys and values of their own sizes, or biases of their own": not {"in_proj_weight"} <= set(call.params),
        "bias_k and bias_v": "bias_k" in call.params,
        "add_zero_attn": bool(call.options["add_zero_attn"]),
    }
    for problem, found in problems.items():
        if found:
            near = "MultiheadAttention(size, heads, batch_first=True)(x, x, x, need_weights=False), a Dropout behind it"
            raise refused(call.path, call.op, problem, near)
    x = single(draft, call, inputs[0])
    if len(x.dims) != 2:
        raise refused(call.path, call.op, f"an input of shape {x.lengths}", "(steps, features) behind the batch")
    draft.fix(x.dims[:1], call, "is a step that attention weighs")
    (size, count), width = (call.options[key] for key in ("embed_dim", "num_heads")), x.dims[-1]
    heads = Dim(size, draft.opened(count, f"{call.path}.heads").space, size // count)
    rows = scaled(heads, 3)
    params = {
        "weight_in": draft.weigh(call, "in_proj_weight", (rows, width), Start("kaiming", 4 * size)),
        "bias_in": draft.weigh(call, "in_proj_bias", (rows,), Start()),
        "weight_out": draft.weigh(call, "out_proj.weight", (width, heads), Start("fan", size)),
        "bias_out": draft.weigh(call, "out_proj.bias", (width,), Start()),
    }
    made = draft.add(name_of(call), "attention", [x], x.dims, params=params, attrs={"head": size // count})
    return (made, None)


def recurrent(op: str, gates: int) -> Callable[[Draft, Call, list[Any]], Any]:
    """Lower an LSTM or a GRU, one node per layer."""

    def lower(draft: Draft, call: Call, inputs: list[Any]) -> Any:
        wanted = {"batch_first": True, "bidirectional": False, "proj_size": 0}
        for key, value in wanted.items():
            found = call.options[key] or type(value)()
            if found != value:
                raise refused(call.path, call.op, f"{key}={found}", f"{key}={value}")
        if any(state != ZEROS for state in inputs[1:]):
            raise refused(call.path, call.op, "a first state that is not torch.zeros", "no first state")
        x = single(draft, call, inputs[0])
        if len(x.dims) != 2:
            raise refused(call.path, call.op, f"an input of shape {x.lengths}", "(steps, features) behind the batch")
        draft.fix(x.dims[:1], call, "is a step of a sequence")
        layers = call.options["num_layers"]
        for place in range(layers):
            if place and call.options["dropout"]:
                x = _dropped(draft, call, x)
            x = _gated(draft, call, x, (op, gates), place)
        last = Final(x, layers)
        return (x, (last, None) if op == "lstm" else last)

    return lower


class _Zeros:
    """A first state of zeros, which is what there is anyway."""


ZEROS = _Zeros()


class Final:
    """The last states of all layers of an LSTM or GRU, of which only the last layer's is in the spec.

    Attributes:
        steps: Outputs of the last layer.
        layers: How many there are.
    """

    __slots__ = ("layers", "steps")

    def __init__(self, steps: Value, layers: int) -> None:
        self.steps, self.layers = steps, layers


def _dropped(draft: Draft, call: Call, x: Value) -> Value:
    permille = permille_of(draft, call, "dropout", float(call.options["dropout"]))
    if not permille:
        return x
    return draft.add(f"{name_of(call)}.dropout", "dropout", [x], x.dims, attrs={"permille": permille})


def _gated(draft: Draft, call: Call, x: Value, form: tuple[str, int], place: int) -> Value:
    """Append one layer of an LSTM or GRU."""
    (op, gates) = form
    many = call.options["num_layers"] > 1
    name = f"{name_of(call)}.{place}" if many else name_of(call)
    hidden = draft.opened(call.options["hidden_size"], f"{call.path}.{place}" if many else call.path)
    rows, fan_in = scaled(hidden, gates), hidden.length
    biased = f"bias_ih_l{place}" in call.params
    shapes: dict[str, Sequence[Dim]] = {
        "weight_ih": (rows, x.dims[-1]),
        "weight_hh": (rows, hidden),
        "bias_ih": (rows,),
        "bias_hh": (rows,),
    }
    params = {}
    for role, dims in shapes.items():
        start = Start("fan", fan_in) if biased or role.startswith("weight") else Start()
        params[role] = draft.weigh(call, f"{role}_l{place}", dims, start)
    return draft.add(name, op, [x], (x.dims[0], hidden), params=params)
