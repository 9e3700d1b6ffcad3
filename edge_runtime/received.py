"""The weights of an order, put together from its shells one tensor at a time, so that they are never all held twice."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from edge_runtime.engines.arrays import Floats
from wire.errors import Malformed
from wire.spec import ModelSpec, Structure
from wire.structure import assemble
from wire.tensor import Blob, open_blob


class Received:
    """Tensor name to weights ``(compact shape)``, read from the shell files at every look-up.

    A shell says in its meta which capacity it is (``capacity``); where it does not, its place in the list counts.
    """

    def __init__(self, spec: ModelSpec, structure: Structure, shells: Sequence[str]) -> None:
        self._spec = spec
        self._structure = structure
        self._shells = tuple(Path(path) for path in shells)
        self._tensors = {tensor.name: tensor for tensor in spec.tensors}

    def __getitem__(self, name: str) -> Floats:
        """Read, check and join one tensor's parts.

        Raises:
            Malformed: A shell is no blob of this model, or repeats a capacity.
        """
        parts: list[dict[str, Floats]] = [{} for _ in range(self._structure.capacity + 1)]
        with ExitStack() as stack:
            for place, path in enumerate(self._shells):
                blob = stack.enter_context(open_blob(path))
                capacity = _capacity(blob, place)
                if capacity > self._structure.capacity or name not in blob.names:
                    continue
                if name in parts[capacity]:
                    raise Malformed(f"two shells of capacity {capacity}", "$.meta.capacity")
                parts[capacity][name] = blob.tensor(name)
            joined: Floats = assemble(replace(self._spec, tensors=(self._tensors[name],)), self._structure, parts)[name]
            del parts, blob
        return joined


def _capacity(blob: Blob, place: int) -> int:
    capacity = blob.meta.get("capacity", place)
    if type(capacity) is not int or not 0 <= capacity < 64:  # a bool is an int too
        raise Malformed(f"a shell's capacity is {capacity!r}", "$.meta.capacity")
    return capacity
