"""What a blob's header says of its tensors, and every check of it against itself, before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Annotated

import numpy as np

from wire import forms, rice
from wire.coding import PARTS
from wire.errors import Malformed, TooLarge, Unsupported
from wire.gaps import longest
from wire.schema import Limit, Name, Natural

ELEMENTS_MAX = 1 << 28
SHAPE_MAX = 1 << 40
TENSORS_MAX = 16_384
DTYPES = {
    name: np.dtype(name).newbyteorder("<") for name in ("float32", "float64", "uint8", "int32", "int64", "uint32")
}


@dataclass(frozen=True, slots=True)
class Entry:
    """What the header says of one tensor.

    Attributes:
        name: Unique in the blob.
        dtype: One of `DTYPES`.
        shape: Of the whole tensor.
        encoding: One of `coding.PARTS`.
        parts: Indices of its bodies.
        kept: Number of values; all elements when dense.
        mask: Digest of the mask (``values``), or of the one that is changed (``delta``); else empty.
        packed: Bytes of its first part once that is unpacked; 0 when it is not packed.
        form: How its values are written, one of `forms.FORMS`.
        low: Low bits of a Rice code.
    """

    name: Annotated[str, Limit(1, 128, r"[A-Za-z0-9_./:-]+")]
    dtype: Annotated[str, Limit(1, 16)]
    shape: Annotated[tuple[Natural, ...], Limit(0, 8)]
    encoding: Annotated[str, Limit(1, 16)]
    parts: Annotated[tuple[Natural, ...], Limit(1, 3)]
    kept: Natural
    mask: Annotated[str, Limit(0, 64)] = ""
    packed: Natural = 0
    form: Annotated[str, Limit(0, 16)] = ""
    low: Annotated[int, Limit(0, rice.LOW_MAX)] = 0


@dataclass(frozen=True, slots=True)
class Head:
    """The part of a header that is the same for every kind."""

    kind: Name
    tensors: Annotated[tuple[Entry, ...], Limit(0, TENSORS_MAX)] = ()
    like: Annotated[bytes, Limit(0, 32)] = b""
    form: Annotated[str, Limit(0, 16)] = ""


def check_entries(entries: tuple[Entry, ...], lengths: list[int], elements_max: int) -> None:
    """Hold what the header says against the lengths of the bodies, before anything is allocated."""
    count = elements = 0
    for entry in entries:
        path = f"$[0].tensors.{entry.name}"
        if entry.dtype not in DTYPES or entry.encoding not in PARTS:
            raise Unsupported(f"tensor {entry.name!r} is {entry.encoding} of {entry.dtype}")
        parts = PARTS[entry.encoding]
        if entry.parts != tuple(range(count, count + parts)) or count + parts > len(lengths):
            raise Malformed(f"parts {entry.parts} of {len(lengths)} bodies, expected {parts} from {count} on", path)
        count += parts
        whole = prod(entry.shape)
        if prod(max(length, 1) for length in entry.shape) > SHAPE_MAX:
            raise TooLarge(f"tensor {entry.name!r} of shape {entry.shape}; the limit is {SHAPE_MAX} elements")
        forms.check(entry.form, entry.dtype, path)
        if entry.encoding != "dense" or entry.form:
            elements += whole
        if entry.kept > whole or (entry.encoding == "dense" and entry.kept != whole):
            raise Malformed(f"{entry.kept} values of {whole} elements", path)
        if lengths[entry.parts[-1]] != forms.size(entry.form, entry.kept, DTYPES[entry.dtype].itemsize):
            raise Malformed(f"{lengths[entry.parts[-1]]} bytes for {entry.kept} values of {entry.dtype}", path)
        if len(entry.mask) != (64 if entry.encoding in ("values", "delta") else 0):
            raise Malformed(f"encoding {entry.encoding!r} with mask {entry.mask!r}", path)
        _check_packed(entry, lengths[entry.parts[0]], whole, path)
    if count != len(lengths):
        raise Malformed(f"{len(lengths)} bodies, of which {count} are used", "$")
    if elements > elements_max:
        raise TooLarge(f"sparse tensors of {elements} elements; the limit is {elements_max}")


def _check_packed(entry: Entry, length: int, whole: int, path: str) -> None:
    """Bound what the first part unpacks to by what the shape allows."""
    if entry.encoding == "rice":
        most = rice.longest(whole, entry.kept, entry.low)
        if entry.packed or length > most or entry.kept > rice.KEPT_MAX:
            raise Malformed(f"a code of {length} bytes for {entry.kept} of {whole} elements", path)
    elif entry.encoding in ("gaps", "delta"):
        most = longest(whole, entry.kept if entry.encoding == "gaps" else whole)
        if (entry.packed or length) > most:
            raise Malformed(f"{entry.packed or length} bytes of gaps; {whole} elements need at most {most}", path)
    elif entry.packed and (entry.encoding != "bitmap" or entry.packed != -(-whole // 8)):
        raise Malformed(f"a part of {entry.packed} bytes is packed, encoding {entry.encoding!r}", path)
