"""The layer that makes the logits: both sides speak of its rows, one per class."""

from __future__ import annotations

from wire.errors import SpecError
from wire.spec import ModelSpec, Node


def head_of(spec: ModelSpec) -> Node:
    """Give the last linear layer, whose first axis is the classes.

    Raises:
        SpecError: Something else makes the logits, or another layer uses the same weights.
    """
    last = spec.nodes[-1]
    if last.op != "linear":
        raise SpecError(
            f"model {spec.name!r} ends with {last.op!r}, not with a linear layer whose rows are its classes"
        )
    others = {tensor for node in spec.nodes[:-1] for tensor in node.params.values()}
    if shared := others.intersection(last.params.values()):
        raise SpecError(f"model {spec.name!r} uses {min(shared)!r} in its last layer and in another one")
    return last
