"""The weights of an order, poured from its shell files straight into the arrays that need them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.engines.arrays import Floats
from wire.errors import Malformed
from wire.spec import ModelSpec, Structure, TensorSpec, group_sizes, parameter_count
from wire.structure import shell_blocks, views_of
from wire.tensor import Blob, open_blob

BYTES_MAPPED = 4 << 20
"""After so many bytes a shell is closed and opened again: what has been read of a mapped file counts as resident."""

Pour = Callable[[Floats, Floats], None]


class Received:
    """The weights of one width, in shells.

    A shell says in its meta which capacity it is (``capacity``); where it does not, its place in the list counts.
    """

    def __init__(self, spec: ModelSpec, structure: Structure, shells: Sequence[str]) -> None:
        """Nothing is read yet.

        Raises:
            Malformed: A shell is no blob, or two are of one capacity.
        """
        self._spec = spec
        self._structure = structure
        self._elements = parameter_count(spec, Structure())  # a shell may be of a wider one
        self._shells: dict[int, Path] = {}
        for place, path in enumerate(shells):
            with open_blob(Path(path), elements_max=self._elements) as blob:
                capacity = _capacity(blob, place)
            if capacity in self._shells:
                raise Malformed(f"two shells of capacity {capacity}", "$.meta.capacity")
            self._shells[capacity] = Path(path)

    def fill(self, arrays: Mapping[str, Floats]) -> None:
        """Write the weights into compact arrays of the right shapes.

        Raises:
            Malformed: A shell lacks a tensor, or has another length than the structure says.
        """
        self._pour(arrays, np.copyto)

    def subtract_from(self, arrays: Mapping[str, Floats]) -> None:
        """Take the weights away from compact arrays in place; same errors as `fill`."""
        self._pour(arrays, _subtract)

    def _pour(self, arrays: Mapping[str, Floats], pour: Pour) -> None:
        for capacity in range(self._structure.capacity + 1):
            outer = group_sizes(self._spec, self._structure.narrowed(capacity))
            inner = group_sizes(self._spec, self._structure.narrowed(capacity - 1)) if capacity else None
            waiting = [(tensor, shell_blocks(tensor, inner, outer)) for tensor in self._spec.tensors]
            path = self._shells.get(capacity)
            if path is None:
                for tensor, boxes in waiting:
                    views_of(tensor, arrays[tensor.name], None, boxes)  # nothing may be missing
                continue
            while waiting:
                with open_blob(path, elements_max=self._elements) as blob:
                    waiting = _pour_some(blob, arrays, waiting, pour)


Waiting = list[tuple[TensorSpec, list[Any]]]


def _pour_some(blob: Blob, arrays: Mapping[str, Floats], waiting: Waiting, pour: Pour) -> Waiting:
    """Pour tensors until enough of the file has been touched; give those that still wait."""
    touched = 0
    for done, (tensor, boxes) in enumerate(waiting):
        if touched >= BYTES_MAPPED:
            return waiting[done:]
        line = blob.tensor(tensor.name) if tensor.name in blob.names else None
        for view, values in views_of(tensor, arrays[tensor.name], line, boxes):
            pour(view, values)
        touched += line.nbytes if line is not None else 0
    return []


def _subtract(view: Floats, values: Floats) -> None:
    np.subtract(view, values, out=view)


def _capacity(blob: Blob, place: int) -> int:
    capacity = blob.meta.get("capacity", place)
    if type(capacity) is not int or not 0 <= capacity < 64:  # a bool is an int too
        raise Malformed(f"a shell's capacity is {capacity!r}", "$.meta.capacity")
    return capacity
