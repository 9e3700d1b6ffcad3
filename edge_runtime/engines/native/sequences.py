"""Ops over steps: those with gates, attention, and words."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edge_runtime.engines.native.at import Array, At, Op
from edge_runtime.engines.native.attention import ATTENTION
from edge_runtime.engines.native.recurrent import RECURRENT, flat
from wire.errors import DataError

_LOOKED_UP = 1024


def _embedding(at: At) -> None:
    weight, words, rows = at.params["weight"], at.x[0].reshape(-1), flat(at.y)
    known = len(weight)
    # What is no number compares as false. Words are cut to whole numbers, as torch does.
    if words.size and not (words.min() > -1 and words.max() < known):
        raise DataError(f"a sample has a word that is none of the model's {known}")
    for first in range(0, len(words), _LOOKED_UP):
        some = slice(first, first + _LOOKED_UP)
        np.take(weight, words[some].astype(np.intp), axis=0, out=rows[some], mode="clip")


def _embedding_back(at: At) -> None:
    """Add up the gradients of equal words, some rows of the weight at a time."""
    rows, known = at.scratch["rows"], len(at.params["weight"])
    for first in range(0, known, len(rows)):
        here = rows[: min(len(rows), known - first)]
        here[...] = 0
        _gather(at, here, first)
        at.sink("weight", here, first)


def _gather(at: At, rows: Array, first: int) -> None:
    """Add to rows what belongs to the words from `first` on: words are sorted, those of a kind summed, then added."""
    words, dy, taken, sums = at.x[0].reshape(-1), flat(at.dy), at.scratch["taken"], at.scratch["sums"]
    for start in range(0, len(words), len(taken)):
        some = words[start : start + len(taken)].astype(np.intp)
        some -= first
        order = some.argsort(kind="stable")
        some = some[order]
        (low, high) = np.searchsorted(some, (0, len(rows)))
        if low == high:
            continue
        mine, part = some[low:high], taken[: high - low]
        begins = np.flatnonzero(np.diff(mine, prepend=-1))
        np.take(dy[start : start + len(taken)], order[low:high], axis=0, out=part, mode="clip")
        found, held = sums[: len(begins)], taken[: len(begins)]
        np.add.reduceat(part, begins, axis=0, out=found)
        np.take(rows, mine[begins], axis=0, out=held, mode="clip")
        found += held
        rows[mine[begins]] = found


OPS: Mapping[str, Op] = {**RECURRENT, "attention": ATTENTION, "embedding": Op(_embedding, _embedding_back)}
