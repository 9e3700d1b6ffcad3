"""`edge-runtime predict`: run the model that this device holds (its own trained width, from the Keep) on new samples."""

from __future__ import annotations

import io
import json
import sys
import zipfile
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime import personal
from edge_runtime.config import Config
from edge_runtime.data.resolve import is_picture
from edge_runtime.engines import open_engine
from edge_runtime.engines.arrays import Floats
from edge_runtime.keep import Keep, Kept
from wire.errors import DataError, StoreError

_SAMPLES_MAX = 100_000
_BYTES_MAX = 1 << 28
_DIGITS = 16.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One sample's answer.

    Attributes:
        label: The likeliest class.
        odds: Probability of every class.
        names: What the classes are called.
    """

    label: str
    odds: tuple[float, ...]
    names: tuple[str, ...]


def predict(config: Config, where: str) -> list[Answer]:
    """Classify samples.

    Args:
        config: The device.
        where: A file of samples, or ``-`` for standard input (an npy or npz file, CSV or JSON rows, as its bytes tell).

    Raises:
        StoreError: This device holds no model yet.
        DataError: The samples cannot be read, or are not of the model's shape.
    """
    held = _held(config)
    model = personal.read(held.path)
    x = _fitting(_read(config, where, model.spec.input_shape), model.spec.input_shape)
    engine = open_engine(config.worker.engine, config.worker.threads)()
    engine.load(model.spec, model.structure, model.arrays)
    named = config.data.labels or model.labels  # data may have fewer classes than the model
    names = (*named, *(str(i) for i in range(len(named), model.spec.classes)))
    answers: list[Answer] = []
    for start in range(0, len(x), 64):
        logits = engine.forward(x[start : start + 64]).astype(np.float64)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        odds /= odds.sum(axis=1, keepdims=True)
        answers += [Answer(names[int(row.argmax())], tuple(float(p) for p in row), names) for row in odds]
    return answers


def _held(config: Config) -> Kept:
    """Find the newest personal model of this device's federation."""
    keep = Keep(Path(config.state.dir) / "keep")
    held = [kept for kept in keep.listing() if kept.federation == config.federation]
    if not held:
        raise StoreError(
            f"{config.state.dir}: no model of federation {config.federation!r} yet; it comes with the first round"
            " that this device's answer was counted in"
        )
    return max(held, key=lambda kept: kept.seconds_wall)


def _read(config: Config, where: str, shape: tuple[int, ...]) -> Floats:
    """Read samples; values that come as whole numbers are divided as the device's own data are."""
    if where != "-" and is_picture(Path(where)):
        return _scaled(_picture(Path(where), config.data.shape or shape), config)
    try:
        data = sys.stdin.buffer.read(_BYTES_MAX + 1) if where == "-" else Path(where).read_bytes()
    except OSError as error:
        raise DataError(f"{where}: {error.strerror}") from None
    if not 0 < len(data) <= _BYTES_MAX:
        raise DataError(f"{where}: {len(data)} bytes; from 1 to {_BYTES_MAX} can be read")
    try:
        return _scaled(_parse(data), config)
    except (ValueError, TypeError, LookupError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{where}: neither npy, npz, CSV nor JSON rows: {error}") from None


def _parse(data: bytes) -> NDArray[Any]:
    if data[:6] == b"\x93NUMPY":
        return np.asarray(np.load(io.BytesIO(data), allow_pickle=False))
    if data[:2] == b"PK":
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return np.asarray(arrays["x"] if "x" in arrays else arrays[arrays.files[0]])
    text = data.decode("utf-8")
    if text.lstrip()[:1] == "[":
        rows = json.loads(text)
        return np.asarray(rows if isinstance(rows[0], list) else [rows], dtype=np.float64)
    return np.atleast_2d(np.loadtxt(io.StringIO(text), delimiter=",", dtype=np.float64, ndmin=2))


def _scaled(values: NDArray[Any], config: Config) -> Floats:
    if values.dtype.kind not in "fiub":
        raise ValueError(f"values of type {values.dtype}")
    by = config.data.scale or (255.0 if values.dtype == np.uint8 else 1.0)
    if config.data.source == "digits" and not config.data.scale:
        by = _DIGITS if values.max(initial=0) > 1 else 1.0
    return np.asarray(values, np.float32) / np.float32(by)


def _picture(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    from edge_runtime.data.images import picture

    return picture(path, shape if len(shape) == 3 and shape[0] in (1, 3) else ())


def _fitting(x: Floats, shape: tuple[int, ...]) -> Floats:
    """Bring samples to ``(n, *shape)``."""
    size = prod(shape)
    if not x.size or size not in (x.size, prod(x.shape[1:])):
        raise DataError(f"samples of shape {x.shape}, where the model wants {shape}, or rows of {size} numbers")
    if not np.isfinite(x).all():
        raise DataError("a sample holds something that is no number")
    found = x.reshape(-1, *shape)
    if len(found) > _SAMPLES_MAX:
        raise DataError(f"{len(found)} samples; at most {_SAMPLES_MAX} at a time")
    return found
