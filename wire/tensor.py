"""A blob: many tensors in one file, which is one msgpack document and can be used where it lies (see SPEC.md, section 5).

``[header, pad, body, pad, body, ...]``, where pads make every body start at a multiple of 64 bytes. Dense tensors are read
as views of the mapped file. Everything that a stranger says in the header is checked before anything is allocated for it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self

import msgpack
import numpy as np
from numpy.typing import NDArray

from wire import layout
from wire.errors import DigestMismatch, Malformed, MaskUnknown, NonFinite, StoreError, TooLarge, Unsupported
from wire.masks import PARTS, Mask, cheapest, from_bits, from_indices, mask_digest, to_bits, to_indices
from wire.messages import BlobRef
from wire.schema import Limit, Name, Natural, from_plain

ELEMENTS_MAX = 1 << 28
SHAPE_MAX = 1 << 40
TENSORS_MAX = 16_384
DTYPES = {
    name: np.dtype(name).newbyteorder("<") for name in ("float32", "float64", "uint8", "int32", "int64", "uint32")
}
_VERSION = 1
_CHECKED_AT_ONCE = 1 << 16

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Entry:
    """What the header says of one tensor.

    Attributes:
        name: Unique in the blob.
        dtype: One of `DTYPES`.
        shape: Of the whole tensor.
        encoding: One of `masks.PARTS`.
        parts: Indices of its bodies.
        kept: Number of values; all elements when dense.
        mask: Digest of the mask, for the encoding ``values`` only.
    """

    name: Annotated[str, Limit(1, 128, r"[A-Za-z0-9_./:-]+")]
    dtype: Annotated[str, Limit(1, 16)]
    shape: Annotated[tuple[Natural, ...], Limit(0, 8)]
    encoding: Annotated[str, Limit(1, 16)]
    parts: Annotated[tuple[Natural, ...], Limit(1, 3)]
    kept: Natural
    mask: Annotated[str, Limit(0, 64)] = ""


@dataclass(frozen=True, slots=True)
class _Head:
    kind: Name
    tensors: Annotated[tuple[Entry, ...], Limit(0, TENSORS_MAX)]


def write_blob(
    path: Path,
    kind: str,
    tensors: Mapping[str, Array],
    *,
    meta: Mapping[str, Any] | None = None,
    masks: Mapping[str, Mask] | None = None,
    known_masks: Mapping[str, str] | None = None,
) -> BlobRef:
    """Write a blob file, one tensor at a time, hashing on the way. The same input gives the same bytes. Not yet durable.

    Args:
        path: The file; replaced if it is there.
        kind: What the blob is, one word.
        tensors: Name to array of one of `DTYPES`, in the order in which they are to stand.
        meta: Plain values for the header, which may have at most `layout.HEADER_BYTES` in all.
        masks: Tensor name to what is kept of it, of the tensor's shape; the cheapest encoding is chosen. Values that are
            not kept are lost; kept ones that are zero are not.
        known_masks: Tensor name to the digest of its mask (which stands in `masks` too), where the reader has that mask.

    Raises:
        Unsupported: An array's type has no name here.
        TooLarge: The header or one body is beyond its limit.
        DigestMismatch: `known_masks` names another mask than `masks` has.
        StoreError: The disk refuses.
    """
    masks, known_masks = masks or {}, known_masks or {}
    entries: list[dict[str, Any]] = []
    count = 0
    for name, array in tensors.items():
        entry = _entry(name, array, masks.get(name), known_masks.get(name, ""))
        parts = PARTS[entry["encoding"]]
        entry["parts"] = list(range(count, count + parts))
        entries.append(entry)
        count += parts
    header: bytes = msgpack.packb({"v": _VERSION, "kind": kind, "meta": dict(meta or {}), "tensors": entries})
    if len(entries) > TENSORS_MAX:
        raise TooLarge(f"a blob of {len(entries)} tensors; the limit is {TENSORS_MAX}")
    try:
        with path.open("wb") as file:
            out = layout.Writer(file, header, count)
            for entry in entries:
                name = entry["name"]
                for body in _bodies(entry, tensors[name], masks.get(name)):
                    out.body(body)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from error
    return BlobRef(out.digest.hexdigest(), out.size)


def _entry(name: str, array: Array, mask: Mask | None, known: str) -> dict[str, Any]:
    dtype = array.dtype.name
    if dtype not in DTYPES:
        raise Unsupported(f"tensor {name!r} is {dtype}; a blob holds {', '.join(DTYPES)}")
    entry = {"name": name, "dtype": dtype, "shape": list(array.shape), "encoding": "dense", "parts": []}
    if mask is None:
        if known:
            raise Malformed(f"tensor {name!r} has the digest of a mask, but not the mask")
        return {**entry, "kept": array.size}
    if mask.shape != array.shape or mask.dtype != np.bool_:
        raise Malformed(f"the mask of tensor {name!r} is {mask.dtype}{mask.shape}, expected bool{array.shape}")
    kept = int(np.count_nonzero(mask))
    if known:
        if mask_digest(mask) != known:
            raise DigestMismatch(f"the mask of tensor {name!r} is {mask_digest(mask)}, not {known}")
        return {**entry, "encoding": "values", "kept": kept, "mask": known}
    encoding = cheapest(array.shape, kept, array.dtype.itemsize)
    return {**entry, "encoding": encoding, "kept": array.size if encoding == "dense" else kept}


def _bodies(entry: Mapping[str, Any], array: Array, mask: Mask | None) -> Iterator[bytes | memoryview]:
    encoding = entry["encoding"]
    values = np.ascontiguousarray(array, DTYPES[entry["dtype"]])
    if mask is not None:
        # A dense body has zeros where nothing is kept: what the reader gets must not depend on the encoding.
        values = np.where(mask, values, values.dtype.type(0)) if encoding == "dense" else values[mask]
        if encoding == "bitmap":
            yield to_bits(mask).tobytes()
        elif encoding == "index":
            yield from to_indices(mask)
    yield values.reshape(-1).view(np.uint8).data


class Blob:
    """An open blob file. Use it as a context manager; views stay valid after it is closed."""

    __slots__ = ("_bodies", "_entries", "_map", "kind", "meta")

    def __init__(self, view: mmap.mmap, elements_max: int = ELEMENTS_MAX) -> None:
        """Check everything that the file says of itself (see `open_blob`)."""
        self._map = view
        header, start = layout.read_header(view)
        version = header.get("v")
        if type(version) is not int or version != _VERSION:
            raise Unsupported(f"a blob of version {repr(version)[:80]}; this side reads {_VERSION}")
        head = from_plain(_Head, header, path="$[0]")
        meta = header.get("meta")
        if not isinstance(meta, dict):
            raise Malformed("expected a map", "$[0].meta")
        self.kind: str = head.kind
        self.meta: dict[str, Any] = meta
        self._bodies = layout.find_bodies(view, start)
        self._entries = {entry.name: entry for entry in head.tensors}
        if len(self._entries) != len(head.tensors):
            raise Malformed("two tensors share a name", "$[0].tensors")
        _check_entries(head.tensors, [length for _, length in self._bodies], elements_max)

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors' names, in the order in which they stand."""
        return tuple(self._entries)

    def entry(self, name: str) -> Entry:
        """Give what the header says of a tensor: its type, shape and encoding, without touching its values.

        Raises:
            Malformed: There is no such tensor.
        """
        if name not in self._entries:
            raise Malformed(f"the blob has no tensor {name!r}", "$[0].tensors")
        return self._entries[name]

    def tensor(self, name: str, mask: Mask | None = None) -> Array:
        """Give a whole tensor, read-only: a view of the file when it is dense, else an array with zeros where nothing is kept.

        Args:
            name: Which one.
            mask: What is kept, where the blob has the values only.

        Raises:
            Malformed: There is no such tensor, or its parts contradict each other.
            MaskUnknown: The blob has the values only, and no mask was given.
            DigestMismatch: The mask is not the one that the blob names.
        """
        entry = self.entry(name)
        values = self._values(entry)
        if entry.encoding == "dense":
            return values.reshape(entry.shape)
        whole = np.zeros(prod(entry.shape), values.dtype)
        whole[self._where(entry, mask)] = values
        whole.flags.writeable = False
        return whole.reshape(entry.shape)

    def sparse(self, name: str, mask: Mask | None = None) -> tuple[NDArray[np.int64], Array]:
        """Give positions in C order ``(kept,)``, ascending, and the values ``(kept,)`` there, without a dense array.

        Raises:
            Malformed, MaskUnknown, DigestMismatch: As `tensor` does.
        """
        entry = self.entry(name)
        where = np.arange(entry.kept) if entry.encoding == "dense" else self._where(entry, mask)
        if where.dtype == np.bool_:
            where = np.flatnonzero(where)
        return where.astype(np.int64, copy=False), self._values(entry)

    def require_finite(self) -> None:
        """Look at every value. Cost: one pass in small parts.

        Raises:
            NonFinite: One is a NaN or an infinity; the text names the tensor.
        """
        for entry in self._entries.values():
            values = self._values(entry)
            if values.dtype.kind != "f":
                continue
            for start in range(0, len(values), _CHECKED_AT_ONCE):
                if not np.isfinite(values[start : start + _CHECKED_AT_ONCE]).all():
                    raise NonFinite(f"tensor {entry.name!r} holds a value that is not finite")

    def close(self) -> None:
        """Give the file back as soon as no view needs it any more."""
        with contextlib.suppress(BufferError):  # views are still in use; the mapping goes with the last of them
            self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _body(self, index: int, dtype: np.dtype[Any]) -> Array:
        start, length = self._bodies[index]
        if not length:
            return np.frombuffer(b"", dtype)
        return np.frombuffer(self._map, dtype, length // dtype.itemsize, start)

    def _values(self, entry: Entry) -> Array:
        return self._body(entry.parts[-1], DTYPES[entry.dtype])

    def _where(self, entry: Entry, mask: Mask | None) -> Array:
        """Give what is kept: a mask in one line, or positions."""
        path = f"$[0].tensors.{entry.name}"
        if entry.encoding == "bitmap":
            return from_bits(self._body(entry.parts[0], DTYPES["uint8"]), prod(entry.shape), entry.kept, path)
        if entry.encoding == "index":
            rows, columns = (self._body(part, DTYPES["uint8"]) for part in entry.parts[:2])
            return from_indices(rows, columns, entry.shape, entry.kept, path)
        if mask is None:
            raise MaskUnknown(f"tensor {entry.name!r} needs mask {entry.mask}")
        if mask.shape != entry.shape or mask_digest(mask) != entry.mask:
            raise DigestMismatch(f"tensor {entry.name!r} needs mask {entry.mask}, not {mask_digest(mask)}")
        if int(np.count_nonzero(mask)) != entry.kept:
            raise Malformed(f"{entry.kept} values for mask {entry.mask}", path)
        return np.ravel(mask)


def open_blob(path: Path, *, elements_max: int = ELEMENTS_MAX) -> Blob:
    """Open a blob file and check all of it except the values. Cost: linear in the header; bodies are not read.

    Args:
        path: The file; it must not be changed while it is open.
        elements_max: Most elements that its sparse tensors may have in all when they are made dense.

    Raises:
        StoreError: It cannot be read.
        Malformed: It is not one blob, exactly.
        TooLarge: It is beyond a limit.
        Unsupported: Its version, or a tensor's type or encoding, is not known here.
    """
    try:
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise Malformed(f"{path.name} is empty")
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from error
    try:
        return Blob(view, elements_max)
    except Exception:
        view.close()
        raise


def _check_entries(entries: tuple[Entry, ...], lengths: list[int], elements_max: int) -> None:
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
        if entry.encoding != "dense":
            elements += whole
        if entry.kept > whole or (entry.encoding == "dense" and entry.kept != whole):
            raise Malformed(f"{entry.kept} values of {whole} elements", path)
        if lengths[entry.parts[-1]] != entry.kept * DTYPES[entry.dtype].itemsize:
            raise Malformed(f"{lengths[entry.parts[-1]]} bytes for {entry.kept} values of {entry.dtype}", path)
        if (len(entry.mask) == 64) != (entry.encoding == "values"):
            raise Malformed(f"encoding {entry.encoding!r} with mask {entry.mask!r}", path)
    if count != len(lengths):
        raise Malformed(f"{len(lengths)} bodies, of which {count} are used", "$")
    if elements > elements_max:
        raise TooLarge(f"sparse tensors of {elements} elements; the limit is {elements_max}")
