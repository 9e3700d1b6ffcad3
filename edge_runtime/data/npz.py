"""NumPy files: arrays `x` and `y`, and if they are there `x_test` and `y_test`, `classes`, `labels` and `ids`.

Nothing in the file is trusted: headers are read and bounded before an array is allocated, and a pickle is never read.
"""

from __future__ import annotations

import io
import math
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from edge_runtime.data import Source
from edge_runtime.data.parts import Raw, bounded
from wire.errors import DataError

_PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""What numpy writes; other ways of packing may take any memory to unpack."""

_HEADER_BYTES = 10_000
_LENGTH_MAX = 1 << 48

_KEYS = ("x", "y", "x_test", "y_test", "classes", "labels", "ids")


def read(path: Path, source: Source) -> Raw:
    """Read samples from a NumPy file.

    Raises:
        DataError: It is not such a file, x or y is missing, or an array is of a kind that is not read.
    """
    found = arrays(path, _KEYS, source)
    for key in ("x", "y"):
        if key not in found:
            raise DataError(f"{path}: has no array {key!r}; write it with numpy.savez(path, x=samples, y=classes)")
    if ("x_test" in found) != ("y_test" in found):
        raise DataError(f"{path}: x_test and y_test come together or not at all")
    x = found["x"]
    names = found.get("labels")
    return Raw(
        name=path.name,
        x=x,
        y=found["y"],
        scale=255.0 if x.dtype == np.uint8 else 1.0,
        classes=_count(path, found),
        labels=() if names is None else tuple(str(name) for name in names.ravel()),
        test=(found["x_test"], found["y_test"]) if "x_test" in found else None,
        ids=found.get("ids"),
    )


def arrays(path: Path, keys: Sequence[str], source: Source) -> dict[str, NDArray[Any]]:
    """Read those of the named arrays that a file holds.

    Raises:
        DataError: The file is damaged, too large, or holds objects.
    """
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = set(archive.namelist())
            for key in keys:
                if f"{key}.npy" in members:
                    if archive.getinfo(f"{key}.npy").compress_type not in _PACKED:
                        raise DataError(f"{path}: array {key!r} is packed in a way that is not read")
                    with archive.open(f"{key}.npy") as stream:
                        _bound(path, key, stream, source)
                    with archive.open(f"{key}.npy") as stream:
                        found[key] = npy.read_array(stream, allow_pickle=False)
    except (OSError, zipfile.BadZipFile, zlib.error, ValueError, EOFError, RuntimeError) as error:
        raise DataError(f"{path}: not a readable .npz file ({error}); write it with numpy.savez") from error
    return found


def _bound(path: Path, key: str, stream: IO[bytes], source: Source) -> None:
    shape, dtype = _header(path, key, stream)
    wanted = "U" if key == "labels" else "biuf"
    if dtype.kind not in wanted:
        raise DataError(f"{path}: array {key!r} holds {dtype}; numbers are read{', and text' * (key == 'labels')}")
    if not all(0 <= n < _LENGTH_MAX for n in shape):
        raise DataError(f"{path}: array {key!r} claims the shape {shape}")
    bounded(f"{path}: {key}", shape, source)
    if math.prod(shape) * dtype.itemsize > 2 * source.bytes_max:
        raise DataError(f"{path}: array {key!r} takes more than twice data.bytes_max in the file")


def _header(path: Path, key: str, stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Read shape and type of an array, whose header is bounded before it is read.

    Raises:
        DataError: It is not one; numpy's reader raises whatever Python's own parser does.
    """
    version = npy.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise DataError(f"{path}: array {key!r} is of npy version {version}; versions 1 and 2 are read")
    size = stream.read(2 if version == (1, 0) else 4)
    length = int.from_bytes(size, "little")
    if length > _HEADER_BYTES:
        raise DataError(f"{path}: the header of array {key!r} would take {length} bytes; the limit is {_HEADER_BYTES}")
    head = io.BytesIO(size + stream.read(length))
    try:
        found = npy.read_array_header_1_0(head) if version == (1, 0) else npy.read_array_header_2_0(head)
    except (ValueError, TypeError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError) as error:
        raise DataError(f"{path}: the header of array {key!r} cannot be read ({type(error).__name__})") from error
    return found[0], found[2]


def _count(path: Path, found: Mapping[str, NDArray[Any]]) -> int:
    classes = found.get("classes")
    if classes is None:
        return 0
    if classes.size != 1 or classes.dtype.kind not in "iu" or int(classes.ravel()[0]) < 1:
        raise DataError(f"{path}: classes must be one whole number, how many classes there are")
    return int(classes.ravel()[0])
