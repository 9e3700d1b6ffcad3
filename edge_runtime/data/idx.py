"""IDX files, as MNIST, Fashion-MNIST and EMNIST come: big-endian, with or without gzip.

Form of a file: two zero bytes, a type byte, the number of axes, each axis as uint32, then the values
(Y. LeCun, C. Cortes, C. Burges: *The MNIST database*). QMNIST's extended labels (eight int32 a sample) are recognised,
and their third column tells the writer.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from edge_runtime.data import Source
from edge_runtime.data.parts import Raw, bounded
from wire.errors import DataError

_TYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
_TEST = ("t10k", "test")


def read(path: Path, source: Source) -> Raw:
    """Read a folder of IDX files, or one file of images with the labels beside it.

    Raises:
        DataError: A file is missing or is not what its name promises.
    """
    if path.is_dir():
        train = [p for p in _named(path, "images", "idx3") if not _is_test(p)]
        test = [p for p in _named(path, "images", "idx3") if _is_test(p)]
    else:
        train, test = [path], []
    if len(train) != 1 or len(test) > 1:
        raise DataError(
            f"{path}: wanted are one file like train-images-idx3-ubyte[.gz] and at most one like "
            f"t10k-images-idx3-ubyte[.gz]; found {[p.name for p in [*train, *test]]}"
        )
    x, y = _pair(train[0], source)
    scale = 255.0 if x.dtype == np.uint8 else 1.0
    return Raw(
        name=path.name if path.is_dir() else train[0].name,
        x=x,
        y=y,
        scale=scale,
        test=_pair(test[0], source) if test else None,
        ids=_writers(train[0], source),
    )


def values(path: Path, source: Source) -> NDArray[Any]:
    """Read one IDX file.

    Raises:
        DataError: It is not one, is cut short, goes on after its end, or is too large.
    """
    opener = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rb") as opened:
            stream = cast("IO[bytes]", opened)
            head = stream.read(4)
            if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _TYPES or not 1 <= head[3] <= 4:
                raise DataError(f"{path}: not an IDX file (it starts with {head.hex()})")
            axes = stream.read(4 * head[3])
            if len(axes) < 4 * head[3]:
                raise DataError(f"{path}: cut short: get the file again")
            shape = tuple(int(n) for n in np.frombuffer(axes, ">u4"))
            dtype = np.dtype(_TYPES[head[2]])
            bounded(str(path), shape, source)
            body = stream.read(math.prod(shape) * dtype.itemsize + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error}): get the file again") from error
    if len(body) != math.prod(shape) * dtype.itemsize:
        raise DataError(f"{path}: its length does not fit the shape {shape} that it claims: get the file again")
    return np.frombuffer(body, dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def _pair(images: Path, source: Source) -> tuple[NDArray[Any], NDArray[Any]]:
    labels = _beside(images, "labels-idx1")
    if labels is None:
        wanted = images.name.replace("images-idx3", "labels-idx1")
        raise DataError(f"{images.parent}: {wanted} is missing; {images.name} needs its labels beside it")
    x = values(images, source)
    return (x[:, None] if x.ndim == 3 else x), values(labels, source)


def _writers(images: Path, source: Source) -> NDArray[Any] | None:
    part = "test" if _is_test(images) else "train"
    for path in sorted(images.parent.glob(f"*{part}-labels-idx2-int*")):
        table = values(path, source)
        if table.ndim == 2 and table.shape[1] > 2:
            return table[:, 2]
    return None


def _beside(images: Path, kind: str) -> Path | None:
    stem = images.name.removesuffix(".gz").replace("images-idx3", kind)
    return next((p for p in (images.with_name(stem), images.with_name(stem + ".gz")) if p.exists()), None)


def _named(folder: Path, *words: str) -> list[Path]:
    found = sorted(p for p in folder.iterdir() if all(word in p.name for word in words))
    unpacked = {p.name for p in found}
    return [p for p in found if not (p.name.endswith(".gz") and p.name.removesuffix(".gz") in unpacked)]


def _is_test(path: Path) -> bool:
    return any(word in path.name for word in _TEST)
