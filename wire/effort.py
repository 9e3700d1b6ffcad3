"""How long a training step takes, from the model's data alone: multiplications, memory traffic, and what each pass costs.

It is there to order ways of doing the same step, not to tell the time. Its seconds are those of one core of the machine that
its constants were measured on; a device that has timed layers of its own (`edge_runtime.memory.speed`) scales them.

A step of B samples in passes of b takes ``sum over nodes of B * (work forward * runs) + ceil(B / b) * (what a pass costs)``:
small passes read all weights and add all gradients again, each time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from wire.segments import Cuts
from wire.spec import ModelSpec, Structure, node_shapes, parameter_count, tensor_shapes
from wire.work import products

MULTIPLICATIONS = 45e9
"""Of matrix products and convolutions, each with its addition, per second."""

TRAFFIC = 3e9
"""Bytes that ops without weights, norms and updates read and write per second."""

CALL = 50e-6
"""Seconds that one op costs whatever its size, forward or backward."""

_BACKWARD = 2.0
"""A backward pass is twice the work of a forward one: a gradient for weights and one for inputs."""

_TOUCHES = {
    "batch_norm": 2.0,
    "group_norm": 2.0,
    "layer_norm": 2.0,
    "max_pool2d": 2.0,
    "max_pool1d": 2.0,
    "dropout": 4.0,
}
"""How often an op goes through its values; 1 for the others, 0 for those that only see memory in another way."""
_VIEWS = ("flatten", "reshape", "transpose", "last")
_PER_PASS, _PER_STEP = 4.0, 3.0
"""How often a pass goes through all weights (the new gradient is written, read and added), and what ends a step does."""
_FLOAT = 4
UNIT = _FLOAT / TRAFFIC
"""Seconds to go through one weight."""


@dataclass(frozen=True, slots=True)
class Effort:
    """What one model takes, in seconds.

    Attributes:
        forward: Of each node for one sample.
        backward: The same for the way back.
        weights: To go through all weights once.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    weights: float

    def step(self, batch: int, micro_batch: int, cuts: Cuts = ()) -> float:
        """Give the seconds of a training step.

        Args:
            batch: Samples of the step.
            micro_batch: Samples that go through the model at once.
            cuts: Where it is cut into segments that run again.
        """
        again = cuts[-1] + 1 if cuts else 0
        passes = -(-batch // micro_batch)
        calls = 3 * len(self.forward) + again  # the way back has about two for each node
        samples = batch * (sum(self.forward) + sum(self.backward) + sum(self.forward[:again]))
        return samples + passes * (CALL * calls + _PER_PASS * self.weights) + _PER_STEP * self.weights


def effort(spec: ModelSpec, structure: Structure) -> Effort:
    """Measure out a model.

    Raises:
        SpecError: The model cannot be run.

    Cost: O(nodes + tensors).
    """
    shapes, tensors = node_shapes(spec, structure), tensor_shapes(spec, structure)
    forward: list[float] = []
    backward: list[float] = []
    for node in spec.nodes:
        values = prod(shapes[node.name]) + sum(prod(shapes[name]) for name in node.inputs)
        roles = {role: tensors[name] for role, name in node.params.items()}
        there, back = of_node(node.op, shapes[node.name], roles, values)
        forward += there
        backward += there if node.inputs == ("input",) else back  # nobody wants a gradient for samples
    return Effort(tuple(forward), tuple(backward), parameter_count(spec, structure) * UNIT)


def of_node(
    op: str, shape: tuple[int, ...], roles: Mapping[str, tuple[int, ...]], values: int
) -> tuple[tuple[float], tuple[float]]:
    """Give the seconds of one node and one sample, forward and backward.

    Args:
        op: What it does.
        shape: Of its output.
        roles: The shapes of its weights, as `wire.work.products` takes them.
        values: How many it reads and writes.
    """
    touches = 0.0 if op in _VIEWS else _TOUCHES.get(op, 1.0)
    multiplied = sum(size * places for _, size, places, _ in products(op, shape, roles))
    seconds = multiplied / MULTIPLICATIONS + touches * values * _FLOAT / TRAFFIC
    return (seconds,), (_BACKWARD * seconds,)
