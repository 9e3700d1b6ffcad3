"""What two sides both know of a blob's tensors, so that the next blob of the same ones is values and nothing else.

Between two changes of the masks an update says the same names, types, shapes and masks round after round. An outline names
all of that by one digest: a blob that is written against it has a header of some 80 bytes however many tensors it has, and
one body, in which the values of all tensors follow on each other without padding.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgpack
from numpy.typing import NDArray

from wire import forms
from wire.entries import DTYPES, Entry, Head
from wire.errors import Malformed, MaskUnknown
from wire.masks import AnyMask, count, mask_digest


@dataclass(frozen=True)
class Outline:
    """Names, types, shapes and masks of a blob's tensors, in their order.

    Attributes:
        entries: What a header would say: ``dense``, or ``values`` with the mask's digest.
    """

    entries: tuple[Entry, ...]

    @functools.cached_property
    def digest(self) -> bytes:
        """Name it: SHA-256 of the msgpack list of ``[name, dtype, shape, kept, mask]``, 32 bytes."""
        lines = [[e.name, e.dtype, list(e.shape), e.kept, e.mask] for e in self.entries]
        return hashlib.sha256(msgpack.packb(lines)).digest()


def outline_of(tensors: Mapping[str, NDArray[Any]], masks: Mapping[str, AnyMask]) -> Outline:
    """Describe tensors, or their kept values, and what is kept of them. Cost: one pass over the masks, to name them."""
    entries = []
    for index, (name, array) in enumerate(tensors.items()):
        mask = masks.get(name)
        shape = array.shape if mask is None else mask.shape
        entries.append(
            Entry(
                name=name,
                dtype=array.dtype.name,
                shape=shape,
                encoding="dense" if mask is None else "values",
                parts=(index,),
                kept=array.size if mask is None else count(mask),
                mask="" if mask is None else mask_digest(mask),
            )
        )
    return Outline(tuple(entries))


def outlined(head: Head, outline: Outline | None) -> tuple[Entry, ...]:
    """Give the entries that a header names by digest only.

    Raises:
        Malformed: It has tensors of its own as well, or neither.
        MaskUnknown: It needs another outline.
    """
    if len(head.like) != 32 or head.tensors:
        raise Malformed("a header has either tensors or the digest of an outline", "$[0].like")
    if outline is None or outline.digest != head.like:
        raise MaskUnknown(f"this blob needs outline {head.like.hex()}")
    if not head.form:
        return outline.entries
    return tuple(replace(entry, form=head.form if entry.dtype == "float32" else "") for entry in outline.entries)


def cut(bodies: list[tuple[int, int]], entries: tuple[Entry, ...]) -> list[tuple[int, int]]:
    """Cut the one body into the values of the tensors: start and length of each.

    Raises:
        Malformed: There is not one body, of that length.
    """
    if len(bodies) != 1:
        raise Malformed(f"{len(bodies)} bodies for an outline, expected 1", "$")
    start, length = bodies[0]
    places = []
    for entry in entries:
        forms.check(entry.form, entry.dtype, "$[0].form")
        size = forms.size(entry.form, entry.kept, DTYPES[entry.dtype].itemsize)
        places.append((start, size))
        start += size
    if start != bodies[0][0] + length:
        raise Malformed(f"{length} bytes for the values of an outline", "$[2]")
    return places
