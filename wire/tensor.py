"""A blob: many tensors in one file, which is one msgpack document and can be used where it lies (see SPEC.md, section 5).

``[header, pad, body, pad, body, ...]``, where pads make every body start at a multiple of 64 bytes. Dense tensors are read
as views of the mapped file. Everything that a stranger says in the header is checked before anything is allocated for it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgpack
import numpy as np
from numpy.typing import NDArray

from wire import forms, gaps, layout, rice, zstd
from wire.coding import Coded, code_dense, code_masked
from wire.entries import DTYPES, ELEMENTS_MAX, TENSORS_MAX, Entry, Head, check_entries
from wire.errors import DigestMismatch, Malformed, MaskUnknown, NonFinite, StoreError, TooLarge, Unsupported
from wire.masks import (
    AnyMask,
    Bits,
    Mask,
    all_ones,
    bits_at,
    count,
    from_bits,
    from_indices,
    mask_digest,
    packed,
    unpacked,
)
from wire.messages import BlobRef
from wire.outline import Outline, cut, outline_of, outlined
from wire.schema import from_plain, shown

_VERSION = 1
_CHECKED_AT_ONCE = 1 << 16

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Coding:
    """How masked tensors are written.

    Attributes:
        known: Tensor name to the digest of its mask, where the reader holds that very mask: values only.
        bases: Tensor name to an older mask that the reader holds: what has changed is written where that is shorter.
        form: How float32 values are written, one of `forms.FORMS`.
        outline: What the reader knows of all tensors: values only, in one body.
        exact: Names of tensors that are written in their own type, whatever the form.
        pack: Whether masks may be coded by gaps and packed; without it only the encodings of the papers are used.
    """

    known: Mapping[str, str] = field(default_factory=dict)
    bases: Mapping[str, AnyMask] = field(default_factory=dict)
    form: str = ""
    outline: Outline | None = None
    exact: frozenset[str] = frozenset()
    pack: bool = True


PLAIN = Coding()


def write_blob(
    path: Path,
    kind: str,
    tensors: Mapping[str, Array],
    *,
    meta: Mapping[str, Any] | None = None,
    masks: Mapping[str, AnyMask] | None = None,
    coding: Coding = PLAIN,
) -> BlobRef:
    """Write a blob file, hashing on the way. The same input gives the same bytes. Not yet durable.

    Memory: dense values are written from where they lie; the masks and kept values of masked tensors, and values in another
    form, are held from the header's writing to their own.

    Args:
        path: The file; replaced if it is there.
        kind: What the blob is, one word.
        tensors: Name to array of one of `DTYPES`, in the order in which they are to stand.
        meta: Plain values for the header, which may have at most `layout.HEADER_BYTES` in all.
        masks: Tensor name to what is kept of it, of the tensor's shape; the cheapest encoding is chosen. Values that are
            not kept are lost; kept ones that are zero are not. A tensor may be given as its kept values alone, in C order.
        coding: What the reader is known to hold, and how values are written.

    Raises:
        Unsupported: An array's type, or a form, has no name here.
        TooLarge: The header or one body is beyond its limit.
        DigestMismatch: `coding` names another mask than `masks` has.
        NonFinite: A value cannot be said in this form.
        StoreError: The disk refuses.
    """
    masks = masks or {}
    if len(tensors) > TENSORS_MAX:
        raise TooLarge(f"a blob of {len(tensors)} tensors; the limit is {TENSORS_MAX}")
    head: dict[str, Any] = {"v": _VERSION, "kind": kind, "meta": dict(meta or {})}
    bodies: list[list[Array | bytes]] = []
    if coding.outline is not None:
        head |= {"like": coding.outline.digest, "form": coding.form}
        bodies = [_values_alone(tensors, masks, coding, coding.outline)]
    else:
        head["tensors"] = []
        for name, array in tensors.items():
            coded = _coded(name, array, masks.get(name), coding)
            parts = list(range(len(bodies), len(bodies) + len(coded.parts)))
            shape = masks[name].shape if name in masks else array.shape
            head["tensors"].append(_entry(name, (array.dtype.name, shape), coded, parts))
            bodies += [[part] for part in coded.parts]
    try:
        with path.open("wb") as file:
            out = layout.Writer(file, msgpack.packb(head), len(bodies))
            for body in bodies:
                out.body([part if isinstance(part, bytes) else part.reshape(-1).view(np.uint8).data for part in body])
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from error
    return BlobRef(out.digest.hexdigest(), out.size)


def _values_alone(
    tensors: Mapping[str, Array], masks: Mapping[str, AnyMask], coding: Coding, outline: Outline
) -> list[Array | bytes]:
    """Give the values of all tensors, one after another, once they are seen to be those of the outline.

    Where all come as kept values alone no mask is needed, and none is looked at.
    """
    wanted = {entry.name: (entry.dtype, entry.kept) for entry in outline.entries}
    if not masks and wanted == {name: (array.dtype.name, array.size) for name, array in tensors.items()}:
        return [forms.written(np.ravel(tensors[entry.name]), coding.form) for entry in outline.entries]
    if outline_of(tensors, masks) != outline:
        raise DigestMismatch("these are not the tensors and masks of the outline")
    known = {entry.name: entry.mask for entry in outline.entries}
    coding = replace(coding, known=known)
    return [_coded(name, array, masks.get(name), coding).parts[-1] for name, array in tensors.items()]


def _coded(name: str, array: Array, mask: AnyMask | None, coding: Coding) -> Coded:
    dtype = array.dtype.name
    if dtype not in DTYPES:
        raise Unsupported(f"tensor {name!r} is {dtype}; a blob holds {', '.join(DTYPES)}")
    array = array.astype(DTYPES[dtype], copy=False)
    form = coding.form if dtype == "float32" and name not in coding.exact else ""
    known, base = coding.known.get(name, ""), coding.bases.get(name)
    if mask is None:
        if known:
            raise Malformed(f"tensor {name!r} has the digest of a mask, but not the mask")
        return code_dense(array, form)
    alone = array.ndim == 1 and array.size == count(mask)
    for found, what in ((mask, "mask"), (base, "old mask")):
        shape = mask.shape if alone else array.shape
        kind = "bool" if found is None or isinstance(found, Bits) else found.dtype.name
        if found is not None and (found.shape, kind) != (shape, "bool"):
            raise Malformed(f"the {what} of tensor {name!r} is {kind}{found.shape}, expected bool{shape}")
    if known and mask_digest(mask) != known:
        raise DigestMismatch(f"the mask of tensor {name!r} is {mask_digest(mask)}, not {known}")
    return code_masked(array, mask, form=form, known=known, base=base, pack=coding.pack)


def _entry(name: str, what: tuple[str, tuple[int, ...]], coded: Coded, parts: list[int]) -> dict[str, Any]:
    entry = {
        "name": name,
        "dtype": what[0],
        "shape": list(what[1]),
        "encoding": coded.encoding,
        "parts": parts,
        "kept": coded.kept,
        "mask": coded.mask,
        "packed": coded.packed,
        "form": coded.form,
        "low": coded.low,
    }
    return {key: value for key, value in entry.items() if value or key not in ("mask", "packed", "form", "low")}


class Blob:
    """An open blob file. Use it as a context manager; views stay valid after it is closed."""

    __slots__ = ("_bodies", "_entries", "_map", "kind", "meta")

    def __init__(self, view: mmap.mmap, elements_max: int = ELEMENTS_MAX, outline: Outline | None = None) -> None:
        """Check everything that the file says of itself (see `open_blob`)."""
        self._map = view
        header, start = layout.read_header(view)
        version = header.get("v")
        if type(version) is not int or version != _VERSION:
            raise Unsupported(f"a blob of version {shown(version)}; this side reads {_VERSION}")
        head = from_plain(Head, header, path="$[0]")
        meta = header.get("meta")
        if not isinstance(meta, dict):
            raise Malformed("expected a map", "$[0].meta")
        self.kind: str = head.kind
        self.meta: dict[str, Any] = meta
        self._bodies = layout.find_bodies(view, start)
        entries = head.tensors
        if head.like or "tensors" not in header:
            entries = outlined(head, outline)
            self._bodies = cut(self._bodies, entries)
        self._entries = {entry.name: entry for entry in entries}
        if len(self._entries) != len(entries):
            raise Malformed("two tensors share a name", "$[0].tensors")
        check_entries(entries, [length for _, length in self._bodies], elements_max)

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

    def tensor(self, name: str, mask: AnyMask | None = None) -> Array:
        """Give a whole tensor, read-only: a view of the file when it is dense, else an array with zeros where nothing is kept.

        Args:
            name: Which one.
            mask: What is kept, where the blob has the values only; what was kept, where it has the changes.

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

    def sparse(self, name: str, mask: AnyMask | None = None) -> tuple[NDArray[np.int64], Array]:
        """Give positions in C order ``(kept,)``, ascending, and the values ``(kept,)`` there, without a dense array.

        Raises:
            Malformed, MaskUnknown, DigestMismatch: As `tensor` does.
        """
        entry = self.entry(name)
        where = np.arange(entry.kept) if entry.encoding == "dense" else self._where(entry, mask)
        if where.dtype == np.bool_:
            where = np.flatnonzero(where)
        return where.astype(np.int64, copy=False), self._values(entry)

    def values(self, name: str) -> Array:
        """Give the kept values alone ``(kept,)``, in C order and read-only; who knows the mask needs nothing else.

        Raises:
            Malformed: There is no such tensor.
        """
        return self._values(self.entry(name))

    def mask(self, name: str, mask: AnyMask | None = None) -> Mask:
        """Give what is kept of a tensor, in its shape; for a receiver that will be sent values only, or changes, later.

        Raises:
            Malformed, MaskUnknown, DigestMismatch: As `tensor` does.
        """
        return unpacked(self.bits(name, mask))

    def bits(self, name: str, mask: AnyMask | None = None) -> Bits:
        """Give the same without an array of a byte per element, where the blob says it by itself; same errors."""
        entry = self.entry(name)
        if entry.encoding == "dense":
            return all_ones(entry.shape)
        if entry.encoding == "bitmap":
            return from_bits(self._first(entry), entry.shape, entry.kept, _path(entry))
        if entry.encoding == "gaps":
            runs = gaps.runs_of(self._first(entry), prod(entry.shape), entry.kept, _path(entry))
            return bits_at(runs, entry.shape)
        if entry.encoding == "rice":
            runs = rice.runs_of(self._first(entry), prod(entry.shape), entry.kept, entry.low, _path(entry))
            return bits_at(runs, entry.shape)
        where = self._where(entry, mask)
        return packed(where.reshape(entry.shape)) if where.dtype == np.bool_ else bits_at([where], entry.shape)

    def require_finite(self) -> None:
        """Look at every value. Cost: one pass in small parts.

        Raises:
            NonFinite: One is a NaN or an infinity; the text names the tensor.
        """
        for entry in self._entries.values():
            if entry.dtype not in ("float32", "float64"):
                continue
            values = self._values(entry)
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
        if not entry.form:
            return self._body(entry.parts[-1], DTYPES[entry.dtype])
        values = forms.read(self._body(entry.parts[-1], DTYPES["uint8"]), entry.form, entry.kept)
        values.flags.writeable = False
        return values

    def _first(self, entry: Entry) -> NDArray[np.uint8]:
        """Give the bytes of a tensor's first part."""
        first = self._body(entry.parts[0], DTYPES["uint8"])
        if not entry.packed:
            return first
        return np.frombuffer(zstd.unpack(first.data, entry.packed, _path(entry)), np.uint8)

    def _where(self, entry: Entry, mask: AnyMask | None) -> Array:
        """Give what is kept: a mask in one line, or positions."""
        path, size, first = _path(entry), prod(entry.shape), self._first(entry)
        if entry.encoding == "bitmap":
            return np.ravel(unpacked(from_bits(first, entry.shape, entry.kept, path)))
        if entry.encoding == "gaps":
            return gaps.from_gaps(first, size, entry.kept, path)
        if entry.encoding == "rice":
            return rice.from_rice(first, size, entry.kept, entry.low, path)
        if entry.encoding == "index":
            return from_indices(first, self._body(entry.parts[1], DTYPES["uint8"]), entry.shape, entry.kept, path)
        if mask is None:
            raise MaskUnknown(f"tensor {entry.name!r} needs mask {entry.mask}")
        if mask.shape != entry.shape or mask_digest(mask) != entry.mask:
            raise DigestMismatch(f"tensor {entry.name!r} needs mask {entry.mask}, not {mask_digest(mask)}")
        found = np.ravel(unpacked(mask))
        if entry.encoding == "delta":
            found = found.copy()
            for run in gaps.runs_of(first, size, -1, path):
                found[run] ^= True
        if int(np.count_nonzero(found)) != entry.kept:
            raise Malformed(f"{entry.kept} values for mask {entry.mask}", path)
        return found


def _path(entry: Entry) -> str:
    return f"$[0].tensors.{entry.name}"


def open_blob(path: Path, *, elements_max: int = ELEMENTS_MAX, outline: Outline | None = None) -> Blob:
    """Open a blob file and check all of it except the values. Cost: linear in the header; bodies are not read.

    Args:
        path: The file; it must not be changed while it is open.
        elements_max: Most elements that its sparse tensors, and those in another form, may have in all when made dense.
        outline: What is known of its tensors, where it says no more than their values.

    Raises:
        StoreError: It cannot be read.
        Malformed: It is not one blob, exactly.
        TooLarge: It is beyond a limit.
        Unsupported: Its version, or a tensor's type, encoding or form, is not known here.
        MaskUnknown: It needs an outline, and this is not the one.
    """
    try:
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise Malformed(f"{path.name} is empty")
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from error
    try:
        return Blob(view, elements_max, outline)
    except Exception:
        view.close()
        raise
