"""Recordings of sensors, cut into windows: a NumPy file with arrays `signal` and `recording`, as MotionSense is prepared.

``signal`` [rows, channels] holds all recordings one behind the other; ``recording`` [recordings, 4] says of each its class,
its trial, its person and how many rows it has. A sample is a window of 128 rows, the next one begins 64 rows later and none
runs over a recording's end; with data.shape = [channels, rows] it is as long as that, and half as far apart.

Trials from 11 on are the test part: other recordings of the same people, so that no two windows of one recording are on both
sides (M. Malekzadeh et al., *MotionSense*, whose trials 11 to 16 are the short ones).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from edge_runtime.data import Source
from edge_runtime.data.npz import arrays
from edge_runtime.data.parts import Raw, bounded
from wire.errors import DataError

WINDOW = 128
"""Rows of a window: 2.56 seconds of the 50 Hz of MotionSense and UCI HAR."""
FIRST_TEST_TRIAL = 11
_KEYS = ("signal", "recording")
_ACTIVITY, _TRIAL, _PERSON, _LENGTH = range(4)


def read(path: Path, source: Source) -> Raw:
    """Read recordings and cut them.

    Returns:
        x of the file's own type [windows, channels, rows], y the classes, ids the people; both parts.

    Raises:
        DataError: It is not such a file, its two arrays do not fit, or a part is left without a window.
    """
    found = arrays(path, _KEYS, source)
    for key in _KEYS:
        if key not in found:
            raise DataError(f"{path}: has no array {key!r}; recordings are arrays signal and recording")
    signal, table = found["signal"], found["recording"]
    if signal.ndim != 2 or table.ndim != 2 or table.shape[1] != 4 or table.dtype.kind not in "iu":
        raise DataError(
            f"{path}: signal {signal.shape} and recording {table.shape}; wanted are [n, channels] and [m, 4]"
        )
    lengths = table[:, _LENGTH]
    # No single one may be longer, or the sum could make up the rows by running over.
    if (table < 0).any() or (lengths > len(signal)).any() or int(lengths.sum(dtype=np.uint64)) != len(signal):
        raise DataError(f"{path}: the lengths of the recordings do not make up the {len(signal)} rows of signal")
    rows = source.shape[-1] if len(source.shape) == 2 else WINDOW
    later = table[:, _TRIAL] >= FIRST_TEST_TRIAL
    owners = [_owners(table, chosen, rows) for chosen in (~later, later)]
    if not all(len(owner) for owner in owners):
        raise DataError(
            f"{path}: a part is empty: wanted are recordings of {rows} rows with trials from 11 on and below"
        )
    for owner in owners:
        bounded(str(path), (len(owner), signal.shape[1], rows), source)
    (x, y), test = ((_windows(signal, table, owner, rows), table[owner, _ACTIVITY]) for owner in owners)
    return Raw(path.stem, x, y, classes=int(table[:, _ACTIVITY].max()) + 1, test=test, ids=table[owners[0], _PERSON])


def _owners(table: NDArray[Any], chosen: NDArray[np.bool_], rows: int) -> NDArray[np.int64]:
    """Give for every window, in order, the number of its recording."""
    counts = (table[:, _LENGTH].astype(np.int64) - rows) // _step(rows) + 1
    return np.repeat(np.arange(len(table)), np.where(chosen, counts.clip(0), 0))


def _windows(signal: NDArray[Any], table: NDArray[Any], owner: NDArray[np.int64], rows: int) -> NDArray[Any]:
    """Cut the windows [n, channels, rows] of the recordings that own them."""
    ends = np.cumsum(table[:, _LENGTH], dtype=np.int64)
    pieces = [
        sliding_window_view(signal[ends[i] - int(table[i, _LENGTH]) : ends[i]], rows, axis=0)[:: _step(rows)]
        for i in np.unique(owner)
    ]
    return np.concatenate(pieces)


def _step(rows: int) -> int:
    return max(rows // 2, 1)
