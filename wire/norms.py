"""Statistics of norms by width: where they stand in shells and in what devices observe.

The activations of a narrow width have other means and variances than the same channels have within a wider one, so that a
prefix of a wide width's running statistics is wrong for a narrow one. Weights are shared by all widths; these are not: each
width has a set of its own (Yu et al., "Slimmable Neural Networks", ICLR 2019). A shell carries the set of its own capacity,
whole and not as a difference, beside what it adds to the narrower widths.
"""

from __future__ import annotations

import dataclasses

from wire.spec import ModelSpec, Structure, statistics, tensor_shapes

OWN = "n/"
"""Stands before a tensor's name in a shell, and before capacity, slash and name in an update that says what was observed."""

Shapes = dict[str, tuple[int, ...]]


def pairs(spec: ModelSpec) -> list[tuple[str, str]]:
    """Name the running mean and variance of each norm; of norms that share one, the last one's stand."""
    of = {node.params["variance"]: node.params["mean"] for node in spec.nodes if "variance" in node.params}
    return [(mean, variance) for variance, mean in of.items()]


def measured(spec: ModelSpec) -> ModelSpec:
    """Give a model's spec with its running statistics alone, to cut and paste nothing else; it cannot be run."""
    names = statistics(spec)
    return dataclasses.replace(spec, tensors=tuple(t for t in spec.tensors if t.name in names))


def learnt(spec: ModelSpec) -> ModelSpec:
    """Give a model's spec without its running statistics, for whoever takes lengths and angles of what was learnt."""
    names = statistics(spec)
    return dataclasses.replace(spec, tensors=tuple(t for t in spec.tensors if t.name not in names)) if names else spec


def own_shapes(spec: ModelSpec, structure: Structure) -> Shapes:
    """Give the shape of each running statistic of a width, by tensor name. Cost: one step per node and tensor."""
    names = statistics(spec)
    if not names:
        return {}
    return {name: shape for name, shape in tensor_shapes(spec, structure).items() if name in names}


def observed_shapes(spec: ModelSpec, structure: Structure) -> Shapes:
    """Give the shape of all that an order to calibrate observes, of this width and narrower ones, by name in the update."""
    if not statistics(spec):
        return {}
    return {
        f"{OWN}{capacity}/{name}": shape
        for capacity in range(structure.capacity + 1)
        for name, shape in own_shapes(spec, structure.narrowed(capacity)).items()
    }
