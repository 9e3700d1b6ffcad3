"""From calls to a spec: one function per op, over values whose axes know which channels they follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edge_runtime.models import layers, passing, shaping
from edge_runtime.models.calls import Call, refused
from edge_runtime.models.draft import Draft, Exported, Value
from edge_runtime.models.spaces import Dim

Lower = Callable[[Draft, Call, list[Any]], Any]

LOWER: Mapping[str, Lower] = {
    "linear": layers.linear,
    "conv1d": layers.conv("conv1d", 1),
    "conv2d": layers.conv("conv2d", 2),
    "batch_norm": layers.batch_norm,
    "group_norm": layers.group_norm,
    "layer_norm": layers.layer_norm,
    "embedding": layers.embedding,
    "lstm": layers.recurrent("lstm", 4),
    "gru": layers.recurrent("gru", 3),
    "attention": layers.attention,
    "zeros": lambda _, __, ___: layers.ZEROS,
    **{
        op: passing.elementwise(op)
        for op in ("relu", "relu6", "gelu", "silu", "tanh", "sigmoid", "hard_sigmoid", "hard_swish")
    },
    "softmax": passing.softmax,
    "dropout": passing.dropout,
    **{
        f"{kind}_pool{sides}d": passing.pool(f"{kind}_pool{sides}d", sides)
        for kind in ("max", "avg")
        for sides in (1, 2)
    },
    "adaptive_avg_pool1d": passing.adaptive_pool("adaptive_avg_pool1d"),
    "adaptive_avg_pool2d": passing.adaptive_pool("adaptive_avg_pool2d"),
    "adaptive_max_pool1d": passing.adaptive_pool("max_pool1d"),
    "adaptive_max_pool2d": passing.adaptive_pool("max_pool2d"),
    "add": passing.add,
    "mul": passing.mul,
    "cat": passing.cat,
    "reshape": shaping.reshape,
    "transpose": shaping.transpose,
    "permute": shaping.permute,
    "mean": shaping.mean,
    "getitem": shaping.getitem,
}
"""By `Call.op`."""


def lowered(calls: Sequence[Call], name: str) -> Exported:
    """Turn a module's calls into a spec.

    Args:
        calls: As `edge_runtime.models.trace.calls_of` gives them.
        name: Of the model.

    Raises:
        SpecError: A call has no place in a spec; the text names the module's path, the op and the nearest supported form.
    """
    draft = Draft()
    values: dict[str, Any] = {}
    for call in calls:
        if call.op == "input":
            values[call.name] = Value("input", tuple(map(Dim, call.shape or ())))
            shape = call.shape or ()
        elif call.op == "output":
            return _closed(draft, call, values[call.inputs[0]], name, shape)
        else:
            values[call.name] = LOWER[call.op](draft, call, [values[name] for name in call.inputs])
            _check_shape(call, values[call.name])
    raise AssertionError("a trace ends with its output")


def _check_shape(call: Call, value: Any) -> None:
    """Hold what was lowered against what the module gave."""
    lengths = getattr(value, "lengths", None)
    if lengths is not None and lengths != call.shape:
        raise refused(
            call.path, call.op, f"it gives {call.shape}, its lowered form {lengths}", "samples on the first axis"
        )


def _closed(draft: Draft, call: Call, value: Any, name: str, shape: Sequence[int]) -> Exported:
    output = passing.single(draft, call, value)
    if len(output.dims) != 1 or output.name == "input":
        raise refused("", "output", f"it is of shape {output.lengths}", "one number for each class: (samples, classes)")
    draft.fix(output.dims, call, "are the classes")
    if draft.steps[output.name].op == "softmax":
        draft.note("", "it ends in a softmax, but the loss takes logits: training will take the softmax twice")
    return draft.finish(name, shape, output)
