"""The personal model: what a device has trained itself, with everything that running it needs, in one blob."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edge_runtime.engines.arrays import Arrays
from wire.errors import Malformed
from wire.messages import BlobRef
from wire.schema import from_plain, to_plain
from wire.spec import ModelSpec, Structure, decode, encode, tensor_shapes
from wire.tensor import open_blob, write_blob

KIND = "keep"


@dataclass(frozen=True, slots=True)
class Personal:
    """A model that can be run.

    Attributes:
        spec: The whole model's graph.
        structure: The width that is held.
        arrays: Its weights, compact, in wire order.
    """

    spec: ModelSpec
    structure: Structure
    arrays: Arrays


def write(path: Path, personal: Personal) -> BlobRef:
    """Write the blob; not durable until its caller says so."""
    meta = {"spec": encode(personal.spec), "structure": to_plain(personal.structure)}
    return write_blob(path, KIND, personal.arrays, meta=meta)


def read(path: Path) -> Personal:
    """Read it back, weights copied to memory.

    Raises:
        Malformed: The file is no personal model, or its weights do not meet its own spec.
    """
    with open_blob(path) as blob:
        if blob.kind != KIND or not isinstance(blob.meta.get("spec"), bytes):
            raise Malformed(f"{path.name} is no personal model", "$.kind")
        spec = decode(blob.meta["spec"])
        structure = from_plain(Structure, blob.meta.get("structure"), path="$.meta.structure")
        arrays = {}
        for name, shape in tensor_shapes(spec, structure).items():
            arrays[name] = blob.tensor(name).copy()
            if arrays[name].shape != shape:
                raise Malformed(f"tensor {name!r} is {arrays[name].shape}, its spec says {shape}", "$.tensors")
    return Personal(spec, structure, arrays)
