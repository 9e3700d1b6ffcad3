"""The weights of an order, poured from its shell files straight into the arrays that need them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.engines.arrays import Floats
from wire.entries import Entry
from wire.errors import Malformed
from wire.maskfile import WHOLE, Held
from wire.norms import OWN, own_shapes
from wire.spec import ModelSpec, Structure, TensorSpec, group_sizes, parameter_count
from wire.structure import shell_blocks, views_of
from wire.tensor import Blob, open_blob

BYTES_MAPPED = 4 << 20
"""After so many bytes a shell is closed and opened again: what has been read of a mapped file counts as resident."""

Pour = Callable[[Floats, Floats], None]


class Received:
    """The weights of one width, in shells.

    A shell says in its meta which capacity it is (``capacity``); where it does not, its place in the list counts. With masks
    there is one shell, of values alone, and arrays are the kept values in C order. What a width has
    of its own of its norms, where its shell has any, stands in place of what the lines give (`wire.norms`).
    """

    def __init__(self, spec: ModelSpec, structure: Structure, shells: Sequence[str], held: Held = WHOLE) -> None:
        """Nothing is read yet.

        Raises:
            Malformed: A shell is no blob, or two are of one capacity.
        """
        self._held = held
        self._spec = spec
        self._structure = structure
        self._elements = parameter_count(spec, Structure())  # a shell may be of a wider one
        self._shells: dict[int, Path] = {}
        for place, path in enumerate(shells):
            with self._opened(Path(path)) as blob:
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
        for name, own in self.norms(self._structure.capacity).items():
            np.copyto(arrays[name], own)

    def norms(self, capacity: int) -> dict[str, Floats]:
        """Give copies of what a width has of its own of its norms; nothing where its shell has none.

        Raises:
            Malformed: They are not of this model's norms, or of another length than the structure says.
        """
        path = self._shells.get(capacity)
        if path is None or self._held.masks:
            return {}
        with self._opened(path) as blob:
            names = [name for name in blob.names if name.startswith(OWN)]
            shapes = own_shapes(self._spec, self._structure.narrowed(capacity)) if names else {}
            found = {}
            for name in names:
                entry, shape = blob.entry(name), shapes.get(name.removeprefix(OWN))
                if entry.shape != shape or entry.dtype != "float32" or entry.encoding != "dense":
                    said = f"{entry.encoding} {entry.dtype}{entry.shape}"
                    raise Malformed(f"a shell's tensor {name!r} is {said}, expected dense float32{shape}", "$.shells")
                found[name.removeprefix(OWN)] = blob.tensor(name).copy()
        return found

    def subtract_from(self, arrays: Mapping[str, Floats]) -> None:
        """Take the weights away from compact arrays, or lines of kept values, in place; same errors as `fill`."""
        if not self._held.masks:
            moves = {name: arrays[name] - own for name, own in self.norms(self._structure.capacity).items()}
            self._pour(arrays, _subtract)
            for name, move in moves.items():
                np.copyto(arrays[name], move)
            return
        for name, values in self.lines():
            np.subtract(arrays[name], values.reshape(arrays[name].shape), out=arrays[name])

    def lines(self) -> Iterator[tuple[str, Floats]]:
        """Yield every tensor's kept values in C order, read-only and one at a time; only where there are masks.

        Raises:
            Malformed: There is not one shell, a tensor is missing, or it is not what the masks keep.
        """
        wanted = self._held.entries
        if list(self._shells) != [0]:
            raise Malformed("masked weights come in one shell", "$.shells")
        path = self._shells[0]
        together = len(wanted) if path.stat().st_size <= BYTES_MAPPED else 1
        for start in range(0, len(wanted), together):
            with self._opened(path) as blob:
                if len(blob.names) != len(wanted):
                    raise Malformed(f"a shell of {len(blob.names)} tensors for {len(wanted)}", "$.shells")
                for entry in wanted[start : start + together]:
                    _check_kept(blob.entry(entry.name), entry)
                    yield entry.name, blob.values(entry.name)

    def _opened(self, path: Path) -> Blob:
        return open_blob(path, elements_max=self._elements, outline=self._held.outline)

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
                with self._opened(path) as blob:
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


def _check_kept(found: Entry, wanted: Entry) -> None:
    """Hold a shell that says itself what it has against the masks; one that is against their outline says the same."""
    for what in ("dtype", "shape", "encoding", "kept", "mask"):
        if getattr(found, what) != getattr(wanted, what):
            raise Malformed(f"a shell's tensor {wanted.name!r} is not what the masks keep: its {what}", "$.shells")


def _subtract(view: Floats, values: Floats) -> None:
    np.subtract(view, values, out=view)


def _capacity(blob: Blob, place: int) -> int:
    capacity = blob.meta.get("capacity", place)
    if type(capacity) is not int or not 0 <= capacity < 64:  # a bool is an int too
        raise Malformed(f"a shell's capacity is {capacity!r}", "$.meta.capacity")
    return capacity
