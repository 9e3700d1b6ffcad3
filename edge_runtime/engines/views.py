"""A narrower width as views of a wider one, also where an axis has several runs of its channels.

A prefix of the channels of ``outer`` runs (the gates of an LSTM, the queries, keys and values of attention) is not a prefix of
the rows. Such an axis is seen as two, ``(outer, rest)``; then the prefix is a slice again, and a view. An op that wants the
compact matrix gets a copy of it, through which its gradient goes back into the view.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from wire.spec import TensorSpec

if TYPE_CHECKING:
    import torch

    from edge_runtime.engines.ops import Inputs, Run
    from wire.spec import Node

Dims = tuple[int, ...]


def opened(tensor: TensorSpec, shape: Dims) -> Dims:
    """Give a shape with every axis of several runs as two, ``(outer, rest)``; one that has them so already as it is."""
    if len(shape) != len(tensor.axes):
        return shape
    found: list[int] = []
    for axis, length in zip(tensor.axes, shape, strict=True):
        found += [length] if axis.outer == 1 else [axis.outer, length // axis.outer]
    return tuple(found)


def prefix(tensor: TensorSpec, shape: Dims) -> tuple[slice, ...]:
    """Give the slices that take the compact `shape` out of a wider opened array."""
    found: list[slice] = []
    for axis, length in zip(tensor.axes, shape, strict=True):
        found += [slice(length)] if axis.outer == 1 else [slice(None), slice(length // axis.outer)]
    return tuple(found)


def gathered(run: Run, shapes: Mapping[str, Dims]) -> Run:
    """Give an op whose params are brought from opened shapes into these, by role."""

    def compact(node: Node, inputs: Inputs, params: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return run(node, inputs, {role: _brought(value, shapes[role]) for role, value in params.items()})

    return compact


def _brought(value: torch.Tensor, shape: Dims) -> torch.Tensor:
    """Bring one param into a shape; torch's batch norm takes a weight whose entries lie apart for one whose do not."""
    found = value.reshape(shape)
    return found.contiguous() if found.requires_grad else found
