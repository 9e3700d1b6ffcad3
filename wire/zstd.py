"""One zstandard frame in, one out, bounded: by the package `zstandard`, and from Python 3.14 on by the standard library.

A frame that states a size is given that much by both libraries, whatever limit they are told. So what it states is held
against what is expected before anything is unpacked.
"""

from __future__ import annotations

import importlib
from typing import Any

from wire.errors import Malformed, TooLarge

LEVEL = 1
WINDOW_LOG = 23

try:
    _package: Any = importlib.import_module("zstandard")
except ImportError:
    _package = None
    _standard: Any = importlib.import_module("compression.zstd")


def pack(data: bytes | memoryview) -> bytes:
    """Compress to one frame that states its size and has no checksum: the blob's digest is over all of it."""
    if _package is None:
        packed: bytes = _standard.compress(data, level=LEVEL)
    else:
        packed = _package.ZstdCompressor(level=LEVEL, write_checksum=False, write_content_size=True).compress(data)
    return packed


def unpack(data: bytes | memoryview, size: int, path: str) -> bytes:
    """Take exactly one frame of exactly `size` bytes apart. Memory: `size` and a window of at most 8 MiB.

    Raises:
        Malformed: It is no such frame, or bytes follow it.
        TooLarge: It states another size, none, or wants too large a window.
    """
    if not size:
        raise Malformed("a packed part of nothing", path)
    return (_unpack_standard if _package is None else _unpack_package)(bytes(data), size, path)


def _unpack_package(data: bytes, size: int, path: str) -> bytes:
    try:
        says = _package.get_frame_parameters(data)
        if says.content_size != size or says.window_size > 1 << WINDOW_LOG or says.dict_id:
            raise TooLarge(f"{path}: a frame of {says.content_size} bytes, window {says.window_size}, for {size} bytes")
        reader = _package.ZstdDecompressor(max_window_size=1 << WINDOW_LOG)
        found: bytes = reader.decompress(data, max_output_size=size, allow_extra_data=False)
    except _package.ZstdError as error:
        raise Malformed(f"not one zstandard frame: {error}", path) from None
    return found


def _unpack_standard(data: bytes, size: int, path: str) -> bytes:
    try:
        says = _standard.get_frame_info(data)
        if says.decompressed_size != size or says.dictionary_id:
            raise TooLarge(f"{path}: a frame of {says.decompressed_size} bytes for {size} bytes")
        reader = _standard.ZstdDecompressor(options={_standard.DecompressionParameter.window_log_max: WINDOW_LOG})
        found: bytes = reader.decompress(data)
    except _standard.ZstdError as error:
        raise Malformed(f"not one zstandard frame: {error}", path) from None
    if not reader.eof or reader.unused_data or len(found) != size:
        raise Malformed("not one zstandard frame: it is cut off, or bytes follow it", path)
    return found
