"""What every reader hands over, and how it becomes a data set: checked, scaled, divided into three parts.

The held-out parts are stratified: each class gives its share, give or take a sample. Which samples they are depends on
the seed and the classes alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edge_runtime.data import Dataset, Source
from wire.errors import DataError

CLASSES_MAX = 1 << 20
AXES_MAX = 4
"""Axes that a sample may have: a device can say no more of them (`wire.messages.Caps`), and no model reads more."""
_ID_MAX = 1 << 53

Part: TypeAlias = tuple[NDArray[np.float32], NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class Raw:
    """What a reader found.

    Attributes:
        name: What to call it in messages.
        x: Samples [n, *shape] of any real type.
        y: Classes [n], integers.
        scale: Divide x by this.
        classes: Number of classes; 0 for one more than the highest that occurs.
        labels: Names of the classes, when they have names.
        guessed: Whether those are just the names that occur, because nobody has said which there are.
        test: The test part that the data bring along.
        ids: Who made each sample, when the data say so.
    """

    name: str
    x: NDArray[Any]
    y: NDArray[Any]
    scale: float = 1.0
    classes: int = 0
    labels: tuple[str, ...] = ()
    guessed: bool = False
    test: tuple[NDArray[Any], NDArray[Any]] | None = None
    ids: NDArray[Any] | None = None


def divide(raw: Raw, source: Source) -> Dataset:
    """Check, scale and divide. Cost: one float32 copy of the samples.

    Raises:
        DataError: Lengths, classes or shapes do not agree, a value is not finite, or there are too many bytes.
    """
    y = _classes_of(raw.name, raw.x, raw.y)
    own = None if raw.test is None else _classes_of(raw.name, *raw.test)
    highest = max(int(part.max(initial=-1)) for part in (y, own) if part is not None)
    classes = raw.classes or len(raw.labels) or len(source.labels) or highest + 1
    if highest >= classes:
        raise DataError(f"{raw.name}: class {highest} occurs, but there are {classes} classes (0..{classes - 1})")
    if classes > CLASSES_MAX:
        raise DataError(f"{raw.name}: {classes} classes; the limit is {CLASSES_MAX}")
    if raw.ids is not None:
        _check_ids(raw.name, raw.ids, y)
    shape = source.shape or raw.x.shape[1:]
    if len(shape) > AXES_MAX or not math.prod(shape):
        raise DataError(
            f"{raw.name}: a sample of shape {shape}; wanted are 1 to {AXES_MAX} axes, none of them empty: change data.shape"
        )
    scale = source.scale or raw.scale

    def take(x: NDArray[Any], y: NDArray[np.int64], chosen: NDArray[np.int64]) -> Part:
        return _finite(raw.name, x, chosen, shape, scale), y[chosen]

    test, validation, train = hold_out(y, 0.0 if own is not None else source.test, source.validation, source.seed)
    if raw.test is None or own is None:
        kept = take(raw.x, y, test)
    else:
        kept = take(raw.test[0], own, np.arange(len(own)))
        train, validation = (train[:0], validation[:0]) if source.test == 1.0 else (train, validation)
    return Dataset(
        train=take(raw.x, y, train),
        validation=take(raw.x, y, validation),
        test=kept,
        classes=classes,
        input_shape=tuple(int(n) for n in shape),
        name=raw.name,
        labels=raw.labels or source.labels,
        guessed=raw.guessed,
        ids=None if raw.ids is None else raw.ids[train].astype(np.int64),
    )


def hold_out(
    y: NDArray[np.int64], test: float, validation: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Choose the held-out samples.

    Args:
        y: Classes [n].
        test: Share of the test part.
        validation: Share of the validation part.
        seed: Decides which.

    Returns:
        Indices of test, validation and training samples, each ascending. Their numbers are n times the share, rounded.
        Within a class the j-th of m shuffled samples stands at (j + 1/2) / m; the lowest places of all classes together
        are the test part, the next the validation part, so each class gives its share.
    """
    count = len(y)
    shuffled = np.random.default_rng([seed, 1]).permutation(count)
    by_class = shuffled[np.argsort(y[shuffled], kind="stable")]
    _, sizes = np.unique(y, return_counts=True)
    place = np.concatenate([(np.arange(m) + 0.5) / m for m in sizes]) if count else np.empty(0)
    order = by_class[np.argsort(place, kind="stable")]
    first, second = round(count * test), round(count * (test + validation))
    return np.sort(order[:first]), np.sort(order[first:second]), np.sort(order[second:])


def bounded(name: str, shape: tuple[int, ...], source: Source) -> None:
    """Refuse samples before they are read, by what they would take as float32.

    Raises:
        DataError: They would take more than `source.bytes_max`.
    """
    size = math.prod(shape) * 4
    if size > source.bytes_max:
        raise DataError(
            f"{name}: samples of shape {shape} take {size / 2**20:,.0f} MiB as float32, more than the "
            f"{source.bytes_max / 2**20:,.0f} MiB of data.bytes_max: use fewer samples, or raise it"
        )


def numbered(name: str, words: list[str], labels: tuple[str, ...]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Turn class names into numbers: by the given order, as the numbers that they are, or sorted.

    Raises:
        DataError: A name is not among the given ones.
    """
    found = set(words)
    if not labels and all(word.isdecimal() and len(word) < 7 for word in found):
        return np.array([int(word) for word in words], np.int64), ()
    names = labels or tuple(sorted(found))
    unknown = sorted(found - set(names))
    if unknown:
        raise DataError(f"{name}: class {unknown[0]!r} is not among data.labels {list(names)}")
    number = {word: i for i, word in enumerate(names)}
    return np.array([number[word] for word in words], np.int64), names


def _classes_of(name: str, x: NDArray[Any], y: NDArray[Any]) -> NDArray[np.int64]:
    whole = y.dtype.kind in "iu" or (y.dtype.kind == "f" and bool(np.all(np.isfinite(y) & (y == np.rint(y)))))
    if not whole:
        raise DataError(f"{name}: classes must be whole numbers 0, 1, 2, ...; these are {y.dtype}")
    if y.ndim != 1 or x.ndim < 2 or len(x) != len(y):
        raise DataError(f"{name}: x {x.shape} and y {y.shape} do not fit; wanted are x [n, ...] and y [n] of equal n")
    if len(y) and not (int(y.min()) >= 0 and int(y.max()) < CLASSES_MAX):
        raise DataError(f"{name}: classes run from {y.min()} to {y.max()}; they must be 0, 1, 2, ...")
    return y.astype(np.int64)


def _check_ids(name: str, ids: NDArray[Any], y: NDArray[np.int64]) -> None:
    if ids.shape != y.shape:
        raise DataError(f"{name}: {ids.shape} ids for {len(y)} samples")
    numbers = ids.astype(np.float64)
    if not (np.abs(numbers) < _ID_MAX).all() or (numbers != np.rint(numbers)).any():
        raise DataError(f"{name}: ids must be whole numbers below {_ID_MAX}; these are {ids.dtype}")


def _finite(
    name: str, x: NDArray[Any], chosen: NDArray[np.int64], shape: tuple[int, ...], scale: float
) -> NDArray[np.float32]:
    if math.prod(shape) != math.prod(x.shape[1:]):
        raise DataError(f"{name}: a sample of shape {x.shape[1:]} does not become {shape}: change data.shape")
    samples = x[chosen].astype(np.float32, copy=False).reshape(len(chosen), *shape)
    if scale != 1.0:
        samples = samples / np.float32(scale)
    if not np.isfinite(samples).all():
        raise DataError(f"{name}: a value is not a finite number: clean the data first")
    return samples
