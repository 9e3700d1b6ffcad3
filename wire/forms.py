"""Values in fewer bits. What is lost a sender adds to its next update (error feedback), so that nothing is lost for good.

========== ==================== ===========================================================================
form       bytes of k values    what it is
========== ==================== ===========================================================================
(empty)    ``k w``              the tensor's own type
bfloat16   ``2 k``              the upper half of a float32, rounded to nearest, ties to even
float16    ``2 k``              IEEE 754 binary16, rounded likewise; beyond its range the largest finite value
int8       ``4 ceil(k/256) +    per block of 256 values a float32 scale s, all of them first; then a code of
           k``                  -127..127 per value, which stands for code times s
ones       0                    every kept value is 1: a tensor that is its mask
========== ==================== ===========================================================================
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from wire.errors import Malformed, NonFinite, Unsupported

FORMS = ("", "bfloat16", "float16", "int8", "ones")
BLOCK = 256
_AT_ONCE = 1 << 17  # values; a multiple of BLOCK
_HALF_MAX = 65504.0

Floats = NDArray[np.float32]


def size(form: str, kept: int, itemsize: int) -> int:
    """Count the bytes of so many values."""
    if form == "int8":
        return 4 * -(-kept // BLOCK) + kept
    if form == "ones":
        return 0
    return kept * (2 if form else itemsize)


def written(values: Floats, form: str) -> NDArray[Any]:
    """Write float32 values in a form; gives one line of bytes or of the form's own numbers. Cost: one pass, its own output.

    Raises:
        NonFinite: int8 cannot say NaN or infinity.
        Unsupported: There is no such form.
    """
    if form == "":
        return values
    if form == "bfloat16":
        return _upper_half(values)
    if form == "float16":
        result = np.empty(len(values), "<f2")
        for start in range(0, len(values), _AT_ONCE):
            result[start : start + _AT_ONCE] = np.clip(values[start : start + _AT_ONCE], -_HALF_MAX, _HALF_MAX)
        return result
    if form == "int8":
        return _blocks(values)
    if form == "ones":
        return np.empty(0, np.uint8)
    raise Unsupported(f"values cannot be written as {form!r}; known: {', '.join(FORMS[1:])}")


def read(data: NDArray[np.uint8], form: str, kept: int) -> Floats:
    """Read so many values as float32. Cost: one pass, its own output."""
    if form == "bfloat16":
        bits: NDArray[np.uint32] = np.left_shift(data.view("<u2"), np.uint32(16), dtype=np.uint32)
        return np.asarray(bits.view(np.float32))
    if form == "float16":
        return data.view("<f2").astype(np.float32)
    if form == "ones":
        return np.ones(kept, np.float32)
    if form != "int8":
        raise Unsupported(f"values in the form {form!r}")
    blocks = -(-kept // BLOCK)
    scales, codes = data[: 4 * blocks].view("<f4"), data[4 * blocks :].view(np.int8)
    values = codes.astype(np.float32)
    whole = kept - kept % BLOCK
    values[:whole].reshape(-1, BLOCK)[:] *= scales[: whole // BLOCK, None]
    values[whole:] *= scales[-1] if kept % BLOCK else np.float32(1)
    return values


def lost(values: Floats, form: str) -> Floats:
    """Give what a form does not carry of some values: what error feedback adds to the next ones. Memory: its own output."""
    flat = np.ravel(values)
    result = np.zeros_like(flat)
    for start in range(0, len(flat) if form else 0, _AT_ONCE):
        part = flat[start : start + _AT_ONCE]
        np.subtract(
            part, read(written(part, form).view(np.uint8), form, len(part)), out=result[start : start + _AT_ONCE]
        )
    return result.reshape(values.shape)


def check(form: str, dtype: str, path: str) -> None:
    """Hold a form against a tensor's type.

    Raises:
        Unsupported: There is no such form.
        Malformed: It is a form of float32, and this is something else.
    """
    if form not in FORMS:
        raise Unsupported(f"{path}: values in the form {form[:16]!r}")
    if form and dtype != "float32":
        raise Malformed(f"values of {dtype} in the form {form!r}, which is one of float32", path)


def _upper_half(values: Floats) -> NDArray[np.uint16]:
    result = np.empty(len(values), "<u2")
    for start in range(0, len(values), _AT_ONCE):
        part = values[start : start + _AT_ONCE]
        bits = part.astype(np.float32, copy=False).view(np.uint32)
        rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
        # a NaN must stay one: rounding could carry it over into infinity, or beyond
        result[start : start + _AT_ONCE] = np.where(np.isnan(part), (bits >> 16) | np.uint32(0x40), rounded)
    return result


def _blocks(values: Floats) -> NDArray[np.uint8]:
    count = len(values)
    blocks = -(-count // BLOCK)
    result = np.empty(4 * blocks + count, np.uint8)
    scales, codes = result[: 4 * blocks].view("<f4"), result[4 * blocks :].view(np.int8)
    for start in range(0, count, _AT_ONCE):
        part = values[start : start + _AT_ONCE]
        edges = np.arange(0, len(part), BLOCK)
        highest = np.maximum.reduceat(np.abs(part), edges)
        if not np.isfinite(highest).all():
            raise NonFinite("int8 values must be finite")
        scale = (highest / np.float32(127)).astype(np.float32)
        first = start // BLOCK
        scales[first : first + len(scale)] = scale
        steps = np.repeat(np.where(scale > 0, scale, np.float32(1)), BLOCK)[: len(part)]
        codes[start : start + len(part)] = np.clip(np.rint(part / steps), -127, 127)
    return result
