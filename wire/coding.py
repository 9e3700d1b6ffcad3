"""One masked tensor as bytes: every encoding, what each costs, and which one is chosen (see SPEC.md, section 6).

========== ==================== ==================================================================
encoding   parts                bytes of n elements, k of them kept, each value w bytes long
========== ==================== ==================================================================
dense      values               ``n w``
bitmap     bits, values         ``ceil(n / 8) + k w``; the bits may be packed
index      rows, columns,       ``k (r + c + w)``; r, c = 0, 2 or 4 by the length of that side
           values
gaps       gaps, values         at most ``k + n // 255 + k w``; the gaps may be packed
rice       code, values         about ``k (H(k / n) n / k + 0.1) / 8 + k w``; for small masks
values     values               ``k w``; the reader has the mask
delta      gaps, values         gaps of what has changed since a mask that the reader has
========== ==================== ==================================================================

For float32 and sides of 2 to 65536 dense, bitmap and index cross at densities 31/32 and 1/32 exactly (PruneFL, section 5);
packed bits and packed gaps are shorter than both wherever a mask is longer than some tens of bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log2, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wire import forms, zstd
from wire.gaps import gather, to_gaps
from wire.masks import AnyMask, count, index_bytes, mask_digest, packed, positions, to_indices, unpacked
from wire.rice import KEPT_MAX, to_rice

PARTS: dict[str, int] = {"dense": 1, "bitmap": 2, "index": 3, "gaps": 2, "rice": 2, "values": 1, "delta": 2}

_PACK_FROM = 48
"""A shorter part is not packed: the frame alone takes 10 bytes or so."""
_GAPS_BELOW = 0.17
"""Below this density gaps are the shorter code of a random mask, above it bits (measured crossing: 0.15 to 0.2)."""
_REGULAR = 0.97
"""A code shorter than this part of a random mask's entropy has found a pattern; the other code may have found more of it."""

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Coded:
    """A tensor, ready to be written.

    Attributes:
        encoding: One of `PARTS`.
        parts: Its bodies.
        kept: Number of values.
        packed: Bytes of the first part before it was packed; 0 when it was not.
        mask: Digest of the mask that the reader needs; empty when it needs none.
        form: How the values are written.
        low: Low bits of a Rice code.
    """

    encoding: str
    parts: list[Array | bytes]
    kept: int
    packed: int = 0
    mask: str = ""
    form: str = ""
    low: int = 0


def code_dense(array: Array, form: str) -> Coded:
    """Write all values."""
    flat = np.ravel(array)
    return Coded("dense", [forms.written(flat, form)], array.size, form=form)


def code_masked(array: Array, mask: AnyMask, *, form: str, known: str, base: AnyMask | None, pack: bool) -> Coded:
    """Write what a mask keeps, in the cheapest encoding that the reader can read.

    Args:
        array: Values of the mask's shape, or the kept ones alone in C order.
        mask: What is kept.
        form: How the values are written.
        known: Digest of `mask` when the reader holds it.
        base: An older mask that the reader holds.
        pack: Whether gaps and packing may be used.

    Cost: one pass over the mask and its values (two where bits and gaps are both tried); the kept values and the coded mask.
    """
    kept = count(mask)
    flat = np.ravel(array) if array.shape == mask.shape else None
    if known:
        values = gather(mask, flat) if flat is not None else array
        return Coded("values", [forms.written(values, form)], kept, mask=known, form=form)
    sized = forms.size(form, kept, array.itemsize)
    dense = forms.size(form, mask.size, array.itemsize)
    best, gathered = _mask_code(flat, mask, kept, pack=pack)
    if base is not None and pack:
        changes = _packed("delta", to_gaps(unpacked(mask) ^ unpacked(base))[0], kept)
        if cost(changes) < cost(best):
            best = changes
    if dense <= cost(best) + sized and form != "ones":
        whole = np.zeros(mask.size, array.dtype)  # what is not kept is lost here too
        where = np.ravel(unpacked(mask))
        whole[where] = array if flat is None else flat[where]
        return code_dense(whole, form)
    values = array if flat is None else gathered if gathered is not None else gather(mask, flat)
    digest = mask_digest(base) if best.encoding == "delta" and base is not None else ""
    return replace(best, parts=[*best.parts, forms.written(values, form)], mask=digest, form=form)


def cost(coded: Coded) -> int:
    """Count the bytes of the parts."""
    return sum(len(part) if isinstance(part, bytes) else part.nbytes for part in coded.parts)


def _mask_code(flat: Array | None, mask: AnyMask, kept: int, *, pack: bool) -> tuple[Coded, Array | None]:
    """Code a mask alone, and gather its values, if they are given, where that costs no pass of its own."""
    bitmap, index = -(-mask.size // 8), index_bytes(mask.shape, kept)
    if not pack and bitmap <= index:
        return Coded("bitmap", [packed(mask).line], kept), None
    if not pack:
        return Coded("index", list(to_indices(mask)), kept), None
    tried: list[Coded] = []
    gathered = None
    density = kept / max(mask.size, 1)
    limit = entropy(density) * mask.size / 8
    for code in ("gaps", "bits") if density < _GAPS_BELOW else ("bits", "gaps"):
        if tried and cost(tried[0]) > _REGULAR * limit:
            break
        if code == "gaps":
            data, gathered = to_gaps(mask, flat)
            tried.append(_packed("gaps", data, kept))
        else:
            tried.append(_packed("bitmap", packed(mask).line.tobytes(), kept))
    if 0 < kept <= KEPT_MAX:
        data, low = to_rice(positions(mask))
        tried.append(Coded("rice", [data], kept, low=low))
    chosen = min(tried, key=cost)
    if index < cost(chosen):
        chosen = Coded("index", list(to_indices(mask)), kept)
    return chosen, gathered


def _packed(encoding: str, data: bytes, kept: int) -> Coded:
    short = zstd.pack(data) if len(data) >= _PACK_FROM else data
    if len(short) < len(data):
        return Coded(encoding, [short], kept, len(data))
    return Coded(encoding, [data], kept)


def entropy(density: float) -> float:
    """Give the bits per element that a random mask of this density cannot do without."""
    if not 0 < density < 1:
        return 0.0
    return -(density * log2(density) + (1 - density) * log2(1 - density))


def plain_cost(encoding: str, shape: Sequence[int], kept: int, itemsize: int) -> int:
    """Count the bytes of an encoding of the papers (dense, bitmap, index), as in the table above."""
    if encoding == "dense":
        return prod(shape) * itemsize
    return (-(-prod(shape) // 8) if encoding == "bitmap" else index_bytes(shape, kept)) + kept * itemsize
