"""Masks as a blob of their own, and what two sides that both hold them need not say again.

Between two changes of its masks a model travels as values and nothing else, down and up: the masks are one blob, which a
device fetches once, and everything else is written against the outline that follows from model and masks.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from wire.entries import Entry
from wire.errors import DigestMismatch, Malformed
from wire.masks import AnyMask, count, mask_digest
from wire.messages import BlobRef
from wire.outline import Outline
from wire.spec import ModelSpec, Structure, tensor_shapes
from wire.structure import masks_digest
from wire.tensor import Coding, open_blob, write_blob

KIND = "masks"
TOLD = "z/"
"""Stands before a tensor's name where an update tells something about it, such as how much its weights matter."""


@dataclass(frozen=True, slots=True)
class Held:
    """The masks of a structure, as both sides hold them.

    Attributes:
        masks: By tensor name; empty when every weight is kept. Those that were read are bits.
        outline: Of the structure's weights; None without masks.
    """

    masks: Mapping[str, AnyMask]
    outline: Outline | None

    @property
    def entries(self) -> tuple[Entry, ...]:
        """What the outline says of every tensor; nothing without masks."""
        return () if self.outline is None else self.outline.entries


WHOLE = Held({}, None)


def write_masks(path: Path, masks: Mapping[str, AnyMask]) -> BlobRef:
    """Write masks, each in its cheapest code and without values. The same masks give the same bytes. Not yet durable."""
    ones = {name: np.ones(count(mask), np.float32) for name, mask in masks.items()}
    return write_blob(path, KIND, ones, masks=masks, coding=Coding(form="ones"))


def read_masks(path: str, spec: ModelSpec, structure: Structure) -> Held:
    """Read the masks of a structure; those of the call before are not read again.

    A file is known by its name, its size and the digest of what was in it, not by its times: a bounded spool sets them to say
    that a blob is in use.

    Args:
        path: The blob; not looked at when the structure keeps every weight.
        spec: The model.
        structure: Says which masks they must be.

    Raises:
        Malformed: It is no blob of masks, or not there; or one is of another shape than its tensor; or the structure has
            counts without masks.
        DigestMismatch: They are not the masks of the structure, or do not keep as much as it says.
        SpecError: The model has no such structure.
    """
    if not structure.masks:
        _latest().clear()
        if structure.kept:
            raise Malformed("a structure says how much masks keep, and names no masks", "$.structures")
        return WHOLE
    try:
        status = Path(path or "nowhere/").stat()
    except OSError as error:
        raise Malformed(f"masks {Path(path).name!r}: {error.strerror}", "$.masks") from None
    shapes, latest = tensor_shapes(spec, structure), _latest()
    key = (path, status.st_size, tuple(shapes.items()), structure.masks)
    if key not in latest:
        latest.clear()  # before others are made
        held, digest = _read(path, shapes)
        if digest != structure.masks:
            raise DigestMismatch(f"masks {digest[:16]} where the structure names {structure.masks[:16]}")
        latest[key] = held
    held = latest[key]
    if {entry.name: entry.kept for entry in held.entries if entry.mask} != structure.kept:
        raise DigestMismatch(f"masks {structure.masks[:16]} do not keep what the structure says")
    return held


@functools.cache
def _latest() -> dict[tuple[object, ...], Held]:
    """Give where the masks that were read last are kept, and no others: they take a bit per weight."""
    return {}


def _read(path: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Held, str]:
    with open_blob(Path(path), elements_max=sum(map(prod, shapes.values()))) as blob:
        if blob.kind != KIND:
            raise Malformed(f"expected masks, got {blob.kind!r}", "$.kind")
        for name in blob.names:
            if shapes.get(name) != blob.entry(name).shape:
                raise Malformed(f"a mask of {blob.entry(name).shape} for tensor {name!r}", "$[0].tensors")
        masks = {name: blob.bits(name) for name in blob.names}
    return Held(masks, _outline(shapes, masks)), masks_digest(masks)


def outline_of_model(spec: ModelSpec, masks: Mapping[str, AnyMask], structure: Structure | None = None) -> Outline:
    """Describe the weights of a model, or of its structure, of which masks keep some.

    Cost: one pass over the masks, to name them.
    """
    return _outline(tensor_shapes(spec, structure or Structure()), masks)


def _outline(shapes: Mapping[str, tuple[int, ...]], masks: Mapping[str, AnyMask]) -> Outline:
    entries = []
    for index, (name, shape) in enumerate(shapes.items()):
        mask = masks.get(name)
        kept = prod(shape) if mask is None else count(mask)
        digest = "" if mask is None else mask_digest(mask)
        entries.append(Entry(name, "float32", shape, "dense" if mask is None else "values", (index,), kept, digest))
    return Outline(tuple(entries))
