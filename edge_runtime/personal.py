"""The personal model: what a device has trained itself, with everything that running it needs, in one blob."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from edge_runtime.engines.arrays import Arrays, Floats
from wire.errors import Malformed, NestlingError
from wire.masks import AnyMask
from wire.messages import BlobRef
from wire.schema import from_plain, to_plain
from wire.spec import ModelSpec, Structure, decode, encode, tensor_shapes
from wire.tensor import Blob, Coding, open_blob, write_blob

KIND = "keep"
WHOLE = Structure()
_CARRIED = "carried/"
_OWN = "own/"
VALUES_MAPPED = 1 << 20
_LETTERS_MAX = 1 << 16
_CODING = Coding(pack=False)
"""What stays here is written for speed, not for size."""


@dataclass(frozen=True, slots=True)
class Personal:
    """A model that can be run.

    Attributes:
        spec: The whole model's graph.
        structure: The width that is held.
        arrays: Its weights, compact, in wire order; of masked tensors the kept values alone where that is said.
        masks: What is kept of which weights.
        labels: What the data that it was trained on call the classes; empty when they are numbers only.
    """

    spec: ModelSpec
    structure: Structure
    arrays: Arrays
    masks: Mapping[str, AnyMask] = field(default_factory=dict)
    labels: tuple[str, ...] = ()


def write(
    path: Path,
    personal: Personal,
    run: str,
    carried: Mapping[str, Floats] | None = None,
    own: Mapping[str, Floats] | None = None,
) -> BlobRef:
    """Write the blob; not durable until its caller says so.

    Args:
        path: The file.
        personal: The model.
        run: The coordinator's run that it was trained in; what stands beside the weights is of use in that one alone.
        carried: What the last update's form did not carry, by tensor; stands beside the weights.
        own: What the rule keeps, by names of its own.
    """
    labels = personal.labels if sum(map(len, personal.labels)) <= _LETTERS_MAX else ()
    meta = {"run": run, "spec": encode(personal.spec), "structure": to_plain(personal.structure), "labels": labels}
    beside = {_CARRIED + name: array for name, array in (carried or {}).items()}
    beside |= {_OWN + name: array for name, array in (own or {}).items()}
    return write_blob(path, KIND, {**personal.arrays, **beside}, meta=meta, masks=personal.masks, coding=_CODING)


def own(path: str, run: str, spec: ModelSpec, structure: Structure = WHOLE) -> dict[str, Floats]:
    """Give copies of what the rule kept; nothing where no state is held or it cannot be read.

    Nothing of another run either, whose weights were others from the beginning, nor of another model or width, in which a
    place in a tensor is another weight. Masks may be others.
    """
    if not path:
        return {}
    try:
        with open_blob(Path(path)) as blob:
            if not _is_of(blob, run) or blob.meta.get("spec") != encode(spec):
                return {}
            held = from_plain(Structure, blob.meta.get("structure"), path="$.meta.structure")
            if _width(held) != _width(structure):
                return {}
            names = [name for name in blob.names if name.startswith(_OWN)]
        return {name.removeprefix(_OWN): _copied(Path(path), name) for name in names}
    except NestlingError:
        return {}


def _is_of(blob: Blob, run: str) -> bool:
    return blob.kind == KIND and blob.meta.get("run") == run


def _copied(path: Path, name: str) -> Floats:
    """Copy a dense tensor, of which a few megabytes at a time are mapped: they count as resident."""
    copy = np.empty(0, np.float32)
    start = 0
    while not start or start < copy.size:
        with open_blob(path) as blob:
            found = blob.tensor(name)
            copy = copy if start else np.empty(found.shape, np.float32)
            part = slice(start, start + VALUES_MAPPED)
            copy.reshape(-1)[part] = found.reshape(-1)[part]
            start = part.stop
            del found  # lest the mapping outlive the blob
    return copy


def _width(structure: Structure) -> Structure:
    return replace(structure, masks="", kept={})


def add_carried(path: str, run: str, structure: Structure, update: Mapping[str, Floats]) -> None:
    """Add to an update what earlier ones did not carry, in place; nothing where no state is held.

    What was lost of a width is carried over to the same width of the same ranking in the same run only: in another ranking a
    place in a tensor is another channel, and another run's weights never lacked it. A state that cannot be read is no reason
    to fail an order: it is as if nothing had been lost.
    """
    if not path:
        return
    try:
        with open_blob(Path(path)) as blob:
            held = from_plain(Structure, blob.meta.get("structure"), path="$.meta.structure")
            if held != structure or not _is_of(blob, run):
                return
            for name, array in update.items():
                if _CARRIED + name in blob.names and blob.entry(_CARRIED + name).shape == array.shape:
                    np.add(array, blob.tensor(_CARRIED + name), out=array)
    except NestlingError:
        return


def read(path: Path) -> Personal:
    """Read it back, weights copied to memory; what is not kept is zero.

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
        labels = blob.meta.get("labels", ())
    return Personal(spec, structure, arrays, labels=tuple(map(str, labels)) if isinstance(labels, list | tuple) else ())
