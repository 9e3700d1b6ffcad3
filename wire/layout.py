"""The container of a blob: one msgpack document ``[header, pad, body, pad, body, ...]`` whose bodies are aligned.

Every length is a 32-bit one, so that a writer knows where it is before it writes, and a reader walks from mark to mark
without looking at what lies between. What the header and the bodies mean is the business of `tensor`.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from collections.abc import Sequence
from typing import IO, Any

import msgpack

from wire.errors import Malformed, TooLarge
from wire.schema import maybe_costly, refuse_costly, unique

HEADER_BYTES = 1 << 20
BODY_BYTES = (1 << 32) - 1
BODIES_MAX = 49_152
ALIGNMENT = 64
_MARK = struct.Struct(">BI")  # msgpack's array32 and bin32: a byte, then the length
_ARRAY32, _BIN32 = 0xDD, 0xC6
_STEP = 1 << 12
_ITEMS_MAX = 16_384


class Writer:
    """A container that is being written and hashed."""

    __slots__ = ("_file", "digest", "size")

    def __init__(self, file: IO[bytes], header: bytes, bodies: int) -> None:
        """Write the header; exactly so many bodies must follow.

        Raises:
            TooLarge: The header, or the number of bodies, is beyond its limit.
        """
        if len(header) > HEADER_BYTES or bodies > BODIES_MAX:
            problem = f"a blob's header of {len(header)} bytes with {bodies} bodies"
            raise TooLarge(f"{problem}; the limits are {HEADER_BYTES} and {BODIES_MAX}")
        self._file = file
        self.digest = hashlib.sha256()
        self.size = 0
        self._write(_MARK.pack(_ARRAY32, 1 + 2 * bodies) + header)

    def body(self, parts: Sequence[bytes | memoryview]) -> None:
        """Write the next body, which is these parts one after another.

        Raises:
            TooLarge: It is longer than `BODY_BYTES`.
        """
        length = sum(len(part) for part in parts)
        if length > BODY_BYTES:
            raise TooLarge(f"a body of {length} bytes; the limit is {BODY_BYTES}")
        pad = -(self.size + 2 * _MARK.size) % ALIGNMENT
        self._write(_MARK.pack(_BIN32, pad) + bytes(pad) + _MARK.pack(_BIN32, length))
        for part in parts:
            self._write(part)

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self.digest.update(data)
        self.size += len(data)


def read_header(view: mmap.mmap) -> tuple[dict[str, Any], int]:
    """Read the array's mark and the header; gives the header and where it ends. Cost: linear in the header.

    Raises:
        Malformed: This is no container, or its header is no map.
        TooLarge: The header is longer than `HEADER_BYTES`, or there are more than `BODIES_MAX` bodies.
    """
    if len(view) < _MARK.size or view[0] != _ARRAY32:
        raise Malformed("a blob is one msgpack array of 32-bit length")
    (_, items) = _MARK.unpack_from(view)
    if items % 2 == 0:
        raise Malformed(f"an array of {items} items, expected an odd number")
    if items > 1 + 2 * BODIES_MAX:
        raise TooLarge(f"{items // 2} bodies; the limit is {BODIES_MAX}")
    reader = msgpack.Unpacker(
        object_pairs_hook=unique,
        read_size=_STEP,
        max_buffer_size=HEADER_BYTES,
        max_array_len=_ITEMS_MAX,
        max_map_len=8_192,
        max_ext_len=0,
    )
    start = end = _MARK.size
    surveyed = False
    step = _STEP
    while True:
        part = view[end : min(end + step, start + HEADER_BYTES)]
        if not part and end == len(view):
            raise Malformed("the header is cut off", "$[0]")
        if not part:
            raise TooLarge(f"the header is longer than {HEADER_BYTES}")
        end += len(part)
        if not surveyed and maybe_costly(view[start:end], _ITEMS_MAX):
            refuse_costly(view[start : start + HEADER_BYTES])
            surveyed = True
        reader.feed(part)
        step *= 2
        try:
            header = reader.unpack()
            break
        except msgpack.OutOfData:
            continue
        except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
            raise Malformed(f"not a msgpack header: {error or type(error).__name__}", "$[0]") from None
    if not isinstance(header, dict):
        raise Malformed(f"expected a map, got {type(header).__name__}", "$[0]")
    return header, start + reader.tell()


def find_bodies(view: mmap.mmap, place: int) -> list[tuple[int, int]]:
    """Walk from mark to mark, from the end of the header on; gives (start, length) of every body. Bodies are not read.

    Raises:
        Malformed: The file ends too early or too late, or padding is not as it must be.
    """
    (_, items) = _MARK.unpack_from(view)
    size = len(view)
    bodies = []
    for item in range(1, items):
        if place + _MARK.size > size:
            raise Malformed("the file ends too early", f"$[{item}]")
        (mark, length) = _MARK.unpack_from(view, place)
        place += _MARK.size
        if mark != _BIN32 or place + length > size:
            raise Malformed(
                f"expected bytes with a 32-bit length that fits the file, got {mark:#x}, {length}", f"$[{item}]"
            )
        if item % 2 == 0:
            bodies.append((place, length))
        elif length != -(place + _MARK.size) % ALIGNMENT or any(view[place : place + length]):
            raise Malformed("padding must be as short as can be, and 0", f"$[{item}]")
        place += length
    if place != size:
        raise Malformed(f"{size - place} bytes too many at the end")
    return bodies
