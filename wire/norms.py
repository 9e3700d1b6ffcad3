"""Norms by width: where what a width has of its own stands in shells and in updates.

The activations of a narrow width have other means and variances than the same channels have within a wider one, so that a
prefix of a wide width's running statistics is wrong for a narrow one. Weights are shared by all widths; statistics are not,
and weights and biases of norms need not be: each width has a set of its own (Yu et al., "Slimmable Neural Networks", ICLR
2019). A shell carries the set of its own capacity, whole and not as a difference, beside what it adds to narrower widths.
"""

from __future__ import annotations

import dataclasses
from math import prod

from wire.ops import STATISTICS
from wire.spec import ModelSpec, Structure, statistics, tensor_shapes

OWN = "n/"
"""Stands before a tensor's name in a shell, and before capacity, slash and name in an update that is about several widths."""

APART = "norms"
"""Knob of a recipe, 0 or 1: with 1 a narrower width that is trained beside the order's own moves weights and biases of norms
that are its own."""

NORMS = ("batch_norm", "group_norm", "layer_norm")
"""Ops that have a weight and a bias for each channel."""

Shapes = dict[str, tuple[int, ...]]


def pairs(spec: ModelSpec) -> list[tuple[str, str]]:
    """Name the running mean and variance of each norm; of norms that share one, the last one's stand."""
    of = {node.params["variance"]: node.params["mean"] for node in spec.nodes if "variance" in node.params}
    return [(mean, variance) for variance, mean in of.items()]


def affines(spec: ModelSpec) -> frozenset[str]:
    """Name the weights and biases of norms, those aside that anything else reads as well. Cost: one step per node."""
    found: set[str] = set()
    others: set[str] = set()
    for node in spec.nodes:
        learnt = {name for role, name in node.params.items() if role not in STATISTICS}
        (found if node.op in NORMS else others).update(learnt)
    return frozenset(found - others)


def measured(spec: ModelSpec) -> ModelSpec:
    """Give a model's spec with its running statistics alone, to cut and paste nothing else; it cannot be run."""
    return _only(spec, statistics(spec))


def affine(spec: ModelSpec) -> ModelSpec:
    """Give a model's spec with the weights and biases of its norms alone; it cannot be run."""
    return _only(spec, affines(spec))


def learnt(spec: ModelSpec) -> ModelSpec:
    """Give a model's spec without its running statistics, for whoever takes lengths and angles of what was learnt."""
    names = statistics(spec)
    return dataclasses.replace(spec, tensors=tuple(t for t in spec.tensors if t.name not in names)) if names else spec


def own_shapes(spec: ModelSpec, structure: Structure) -> Shapes:
    """Give the shape of all that a width may have of its own, by tensor name. Cost: one step per node and tensor."""
    return _shapes(spec, structure, statistics(spec) | affines(spec))


def observed_shapes(spec: ModelSpec, structure: Structure) -> Shapes:
    """Give the shape of all that an order says of several widths, by name in the update.

    That is what an order to calibrate observes of its width and of narrower ones, and how training has moved weights and
    biases of narrower ones' norms.
    """
    found = {}
    for capacity in range(structure.capacity + 1):
        names = statistics(spec) | (affines(spec) if capacity < structure.capacity else frozenset())
        shapes = _shapes(spec, structure.narrowed(capacity), names)
        found.update({f"{OWN}{capacity}/{name}": shape for name, shape in shapes.items()})
    return found


def affine_counts(spec: ModelSpec, structure: Structure) -> list[int]:
    """Count the weights and biases of norms in each width narrower than a structure, narrowest first."""
    names = affines(spec)
    return [
        sum(prod(shape) for shape in _shapes(spec, structure.narrowed(capacity), names).values())
        for capacity in range(structure.capacity)
    ]


def _shapes(spec: ModelSpec, structure: Structure, names: frozenset[str]) -> Shapes:
    if not names:
        return {}
    return {name: shape for name, shape in tensor_shapes(spec, structure).items() if name in names}


def _only(spec: ModelSpec, names: frozenset[str]) -> ModelSpec:
    return dataclasses.replace(spec, tensors=tuple(t for t in spec.tensors if t.name in names))
