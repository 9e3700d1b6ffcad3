"""A folder with one sub-folder of pictures per class; folders `train` and `test` above them are used when they exist.

An empty sub-folder still is a class: with it, a device that has no sample of a class numbers the others as all devices
do. Needs Pillow (the `images` extra).
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.data import Source
from edge_runtime.data.parts import Raw, bounded, numbered
from edge_runtime.data.resolve import is_picture
from wire.errors import DataError

_FORMATS = ("PNG", "JPEG", "BMP", "PPM")
_PIXELS_MAX = 2**25


def read(path: Path, source: Source) -> Raw:
    """Read all pictures as bytes [n, channels, height, width].

    Raises:
        DataError: Pillow is missing, there is no class folder, or a picture cannot be read or is of another size.
    """
    if not path.is_dir():
        raise DataError(f"{path}: not a folder; images are read from a folder with one sub-folder per class")
    root = path / "train" if (path / "train").is_dir() else path
    names = source.labels or _classes(root)
    files = list(_files(root, names, source))
    if not files:
        raise DataError(f"{root}: holds no picture in any class folder ({', '.join(names[:10])})")
    shape = source.shape or _shape(files[0][0])
    x, words = _stack(files, shape, source)
    y, labels = _numbered(root, words, names)
    test = None
    if root != path and (path / "test").is_dir():
        kept = list(_files(path / "test", names, source))
        if kept:
            x_test, words = _stack(kept, shape, source)
            test = (x_test, _numbered(path / "test", words, names)[0])
    classes = len(labels) or 1 + max(int(name) for name in names)
    guessed = bool(labels) and not source.labels
    return Raw(path.name, x, y, scale=255.0, classes=classes, labels=labels, guessed=guessed, test=test)


def picture(path: Path, shape: tuple[int, ...] = ()) -> NDArray[np.uint8]:
    """Read one picture.

    Args:
        path: The file.
        shape: (channels, height, width) to bring it to; empty for its own size.

    Returns:
        Bytes [channels, height, width]; grey has one channel, colour three.

    Raises:
        DataError: Pillow is missing, or the file is not a picture.
    """
    image_module, operations = _pillow()
    if shape and (len(shape) != 3 or shape[0] not in {1, 3}):
        raise DataError(f"data.shape {list(shape)}: a picture is [1 or 3 channels, height, width]")
    try:
        with warnings.catch_warnings():
            # What stands beside the pixels may be broken: a date that is none makes no picture unreadable.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", image_module.DecompressionBombWarning)
            with image_module.open(path, formats=_FORMATS) as opened:
                if opened.width * opened.height > _PIXELS_MAX:
                    problem = f"{path}: {opened.width} x {opened.height} pixels are too many: make it smaller"
                    raise DataError(problem)  # noqa: TRY301 - only an open picture says its size
                grey = shape[0] == 1 if shape else opened.mode in {"1", "L", "I", "I;16", "F", "LA"}
                turned = operations.exif_transpose(opened)
                if turned.mode.startswith("I"):  # sixteen bits: Pillow would make 255 of all that is above it
                    turned = image_module.fromarray((np.asarray(turned) >> 8).astype(np.uint8))
                turned = turned.convert("L" if grey else "RGB")
                if shape and turned.size != (shape[2], shape[1]):
                    turned = turned.resize((shape[2], shape[1]), image_module.Resampling.BILINEAR)
                pixels = np.asarray(turned, np.uint8)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # what a damaged picture makes Pillow raise is not a closed list
        raise DataError(f"{path}: not a readable picture ({error}): replace it or take it away") from error
    return pixels[None] if grey else np.ascontiguousarray(pixels.transpose(2, 0, 1))  # (h, w, c) -> (c, h, w)


def _pillow() -> tuple[Any, Any]:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise DataError("reading pictures needs Pillow: pip install 'nestling[images]'") from error
    return Image, ImageOps


def _classes(root: Path) -> tuple[str, ...]:
    names = tuple(sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")))
    if not names:
        raise DataError(f"{root}: has no sub-folder; make one per class and put its pictures there")
    return names


def _files(root: Path, names: tuple[str, ...], source: Source) -> Iterator[tuple[Path, str]]:
    for name in names:
        folder = root / name
        found = sorted(p for p in folder.rglob("*") if is_picture(p)) if folder.is_dir() else []
        # One byte per pixel is the least that a picture can be.
        bounded(str(folder), (len(found), 1), source)
        yield from zip(found, itertools.repeat(name))


def _shape(path: Path) -> tuple[int, ...]:
    return tuple(int(n) for n in picture(path).shape)


def _stack(
    files: list[tuple[Path, str]], shape: tuple[int, ...], source: Source
) -> tuple[NDArray[np.uint8], list[str]]:
    bounded(str(files[0][0].parent), (len(files), *shape), source)
    x = np.empty((len(files), *shape), np.uint8)
    for i, (path, _) in enumerate(files):
        pixels = picture(path, source.shape)
        if pixels.shape != tuple(shape):
            raise DataError(
                f"{path}: {list(pixels.shape)} where the first picture is {list(shape)}: "
                f"set data.shape, for example shape = {list(shape)}, and all pictures are brought to it"
            )
        x[i] = pixels
    return x, [name for _, name in files]


def _numbered(root: Path, words: list[str], names: tuple[str, ...]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Folder names that are all numbers are the classes themselves."""
    digits = all(name.isdecimal() for name in names)
    return numbered(str(root), words, () if digits else names)
