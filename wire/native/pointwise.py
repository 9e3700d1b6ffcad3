"""What linear layers, activations and dropouts of the native engine hold.

Gradients are made in blocks, so that no mask and no product is as large as what passes through.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from wire.native.needs import Dims, Facts, Needs, Say

BLOCK = 1 << 15
"""Values of an activation's gradient that are made at a time; one row at least where rows belong together."""

ROWS = 1 << 17
"""Values of a weight's gradient that are made at a time, or a 32nd of them all if that is more; one row at least."""

TURNED = 64
"""Up to so many rows of inputs, the product of a larger linear layer is made the other way around, and turned."""

SERIES = 1 << 14
"""Values of a `gelu` that are summed up at a time, in several arrays."""


def entries(facts: Facts) -> int:
    """Count the values that go out at once."""
    return facts.batch * prod(facts.output)


def _block(facts: Facts, most: int = BLOCK) -> Dims:
    return (min(entries(facts), most),)


def _linear(facts: Facts) -> Needs:
    out, width = facts.params["weight"]
    rows = facts.batch * prod(facts.inputs[0][:-1])
    most = max(1, max(ROWS, out * width >> 5) // width)
    gradient = max(min(out, most) * width, out)  # the bias's finds room there too
    turned = min(out * min(rows, TURNED), max(BLOCK, TURNED))
    return Needs(forward={"turned": (turned,)}, backward={"gradient": (gradient,)}, reads_input=True)


def _by_output(limits: int = 0) -> Say:
    def say(facts: Facts) -> Needs:
        forward = {"limits": (limits, *_block(facts))} if limits else {}
        return Needs(forward=forward, backward={"block": _block(facts)}, reads_output=True, over=True, over_back=True)

    return say


def _silu(facts: Facts) -> Needs:
    return Needs(backward={"blocks": (2, *_block(facts))}, reads_input=True, over_back=True)


def _hard_swish(facts: Facts) -> Needs:
    forward, backward = {"limits": (2, *_block(facts))}, {"blocks": (4, *_block(facts))}
    return Needs(forward=forward, backward=backward, reads_input=True, over_back=True)


def _gelu(facts: Facts) -> Needs:
    blocks = (3, *_block(facts, SERIES))
    return Needs(forward={"blocks": blocks}, backward={"blocks": blocks}, reads_input=True, over_back=True)


def _softmax(facts: Facts) -> Needs:
    width = facts.output[-1]
    rows = min(entries(facts) // width, max(1, BLOCK // width))
    forward, backward = {"rows": (rows,)}, {"rows": (rows,), "block": (rows, width)}
    return Needs(forward=forward, backward=backward, reads_output=True, over=True, over_back=True)


def _dropout(facts: Facts) -> Needs:
    if not facts.node.attrs["permille"]:
        return Needs(view=True)
    block = {"block": _block(facts)}  # what is dropped is drawn again rather than kept
    return Needs(forward=block, backward=block, over=True, over_back=True)


NEEDS: Mapping[str, Say] = {
    "linear": _linear,
    "relu": _by_output(1),
    "relu6": _by_output(2),
    "tanh": _by_output(),
    "sigmoid": _by_output(),
    "hard_sigmoid": _by_output(2),
    "hard_swish": _hard_swish,
    "silu": _silu,
    "gelu": _gelu,
    "softmax": _softmax,
    "dropout": _dropout,
}
"""By op."""
