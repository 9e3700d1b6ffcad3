"""What a model multiplies: the one counter, for planning, for what rounds take and for the tables of simulated runs.

A layer of ``n`` weights, ``k`` of them kept, that is used at ``p`` places of a sample takes, for every sample, ``2 k p`` for
its outputs, ``2 k p`` for the gradient of its inputs (not for a layer that nothing trained stands before) and ``2 k p`` for
the gradient of its kept weights, or ``2 n p`` in a step whose rule reads the gradient of all weights: multiplications and
additions, one each. For a layer of ``ni`` inputs and ``no`` outputs, density ``d`` and batch ``B`` that is ``6 d B ni no``, or
``(2 + 4 d) B ni no`` with the dense gradient (PruneFL, on complexity); dense it is ``6 B ni no``. A recurrent layer uses its
weights at every step. Attention over ``T`` steps of ``E`` values also multiplies queries with keys and odds with values,
``4 T^2 E`` forward and twice that back. What is element by element (activations, norms, pools, the update itself) is not
counted, nor what is looked up: an embedding multiplies nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from wire.spec import ModelSpec, Same, Structure, group_sizes, node_shapes, tensor_shapes

WEIGHTED: Mapping[str, tuple[tuple[str, bool], ...]] = {
    "linear": (("weight", False),),
    "conv2d": (("weight", False),),
    "conv1d": (("weight", False),),
    "lstm": (("weight_ih", False), ("weight_hh", True)),
    "gru": (("weight_ih", False), ("weight_hh", True)),
    "attention": (("weight_in", False), ("weight_out", True)),
}
"""The ops that are counted: the roles of their weights, and whether what these read is made within the op itself."""


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one layer.

    Attributes:
        tensor: Their name; of attention's products, which have no weights, the node's.
        weights: How many there are.
        kept: How many of them are kept.
        places: At how many places of a sample they are used: the output's pixels in a convolution, the steps of a sequence, 1
            otherwise.
        first: Whether nothing trained stands before it, so that nobody asks for the gradient of its inputs.
    """

    tensor: str
    weights: int
    kept: int
    places: int
    first: bool

    def flops(self, *, backward: bool, dense_gradient: bool) -> int:
        """Count for one sample."""
        if not backward:
            return 2 * self.places * self.kept
        gradient = self.weights if dense_gradient else self.kept
        return 2 * self.places * (self.kept * (1 if self.first else 2) + gradient)


def products(
    op: str, output: tuple[int, ...], roles: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, int, int, bool]]:
    """Yield what one node multiplies.

    Args:
        op: What it does.
        output: Its shape.
        roles: The shapes of its weights by role; those of one dimension, which are added, may be left out.

    Yields:
        The role (empty for what has no weights), how many weights, at how many places, and whether what they read is made
        within the op itself.
    """
    places = prod(output[1:]) if op in ("conv2d", "conv1d") else prod(output[:-1])
    for role, inside in WEIGHTED.get(op, ()):
        yield role, prod(roles[role]), places, inside
    if op == "attention":
        yield "", 2 * places * roles["weight_out"][1], places, True


def layers(spec: ModelSpec, structure: Structure) -> tuple[Layer, ...]:
    """List what is counted, in the order in which it runs.

    Raises:
        SpecError: The model cannot be run.

    Cost: one walk over the graph; of the same spec, widths and kept weights again, a look.
    """
    sizes = group_sizes(spec, structure)
    widths = tuple((group.name, (sizes[group.name],)) for group in spec.groups if group.prunable)
    return _layers(Same(spec), widths, tuple(structure.kept.items()))


@functools.lru_cache(maxsize=64)
def _layers(
    same: Same, widths: tuple[tuple[str, tuple[int]], ...], counts: tuple[tuple[str, int], ...]
) -> tuple[Layer, ...]:
    spec, structure = same.spec, Structure(0, dict(widths), kept=dict(counts))
    shapes, tensors = node_shapes(spec, structure), tensor_shapes(spec, structure)
    trained: set[str] = set()
    found = []
    for node in spec.nodes:
        first = trained.isdisjoint(node.inputs)
        if node.params or not first:
            trained.add(node.name)
        roles = {role: tensors[name] for role, name in node.params.items()}
        for role, size, places, inside in products(node.op, shapes[node.name], roles):
            name = node.params[role] if role else node.name
            kept = structure.kept.get(name, size) if role else size
            found.append(Layer(name, size, kept, places, first and not inside))
    return tuple(found)


def per_sample(spec: ModelSpec, structure: Structure, *, backward: bool = True, dense_gradient: bool = False) -> int:
    """Count what one sample takes in one step, or in evaluation without `backward`."""
    return sum(layer.flops(backward=backward, dense_gradient=dense_gradient) for layer in layers(spec, structure))


def multiplications(spec: ModelSpec, structure: Structure) -> int:
    """Count those of one sample's forward pass: half of its operations."""
    return sum(layer.places * layer.kept for layer in layers(spec, structure))
