"""Self-attention, some heads of one sample at a time; the scores are made again on the way back, not held."""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt

import numpy as np

from edge_runtime.engines.native.at import Array, At, Op
from edge_runtime.engines.native.recurrent import column_sums, flat


def _heads(array: Array, head: int) -> Array:
    """See (steps, heads * head) as (heads, steps, head)."""
    return array.reshape(len(array), -1, head).swapaxes(0, 1)


def _runs(queries: Array) -> tuple[Array, Array, Array]:
    """Cut (steps, 3 inner) into queries, keys and values."""
    inner = queries.shape[1] // 3
    return queries[:, :inner], queries[:, inner : 2 * inner], queries[:, 2 * inner :]


def _lots(at: At, inner: int) -> Iterator[slice]:
    """Give the heads whose scores are made at once."""
    count, most = inner // at.node.attrs["head"], len(at.scratch["scores"])
    for first in range(0, count, most):
        yield slice(first, min(count, first + most))


def _scores(asked: Array, keys: Array, room: Array) -> Array:
    """Say how much each step looks at each, (heads, steps, steps), of (heads, steps, head)."""
    scores = np.matmul(asked, keys.swapaxes(1, 2), out=room[: len(asked)])
    scores *= 1 / sqrt(asked.shape[2])
    scores -= scores.max(axis=2, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=2, keepdims=True)
    return scores


def _attention(at: At) -> None:
    x, head, inner = at.x[0], at.node.attrs["head"], at.params["weight_out"].shape[1]
    held = at.saved.get("queries")
    for sample, given in enumerate(x):
        if held is not None:
            queries, seen = held[sample], at.saved["seen"][sample]
        else:
            queries, seen = at.scratch["queries"], at.scratch["seen"]
        np.matmul(given, at.params["weight_in"].T, out=queries)
        queries += at.params["bias_in"]
        (asked, keys, values) = (_heads(run, head) for run in _runs(queries))
        for some in _lots(at, inner):
            scores = _scores(asked[some], keys[some], at.scratch["scores"])
            np.matmul(scores, values[some], out=_heads(seen, head)[some])
        np.matmul(seen, at.params["weight_out"].T, out=at.y[sample])
        at.y[sample] += at.params["bias_out"]


def _attention_back(at: At) -> None:
    """Turn queries, keys and values into their gradients in place."""
    head, inner = at.node.attrs["head"], at.params["weight_out"].shape[1]
    came, found = at.scratch["seen"], at.scratch["asked"]
    for sample, dy in enumerate(at.dy):
        np.matmul(dy, at.params["weight_out"], out=came)
        runs = _runs(at.saved["queries"][sample])
        (asked, keys, values) = (_heads(run, head) for run in runs)
        (back, asking) = (_heads(array, head) for array in (came, found))
        for some in _lots(at, inner):
            scores = _scores(asked[some], keys[some], at.scratch["scores"])
            slopes = at.scratch["slopes"][: len(scores)]
            np.matmul(back[some], values[some].swapaxes(1, 2), out=slopes)
            np.matmul(scores.swapaxes(1, 2), back[some], out=values[some])
            slopes -= np.einsum("hij,hij->hi", scores, slopes)[:, :, None]
            slopes *= scores
            slopes *= 1 / sqrt(head)
            np.matmul(slopes, keys[some], out=asking[some])
            np.matmul(slopes.swapaxes(1, 2), asked[some], out=keys[some])
        np.copyto(runs[0], found)
    queries = flat(at.saved["queries"])
    if at.dx[0] is not None:
        np.matmul(queries, at.params["weight_in"], out=flat(at.dx[0]))
    width = at.dy.shape[2]
    room = at.scratch["weight"].reshape(inner, width)
    for place, run in enumerate(_runs(queries)):
        at.sink("weight_in", np.matmul(run.T, flat(at.x[0]), out=room), place * inner)
    at.sink("bias_in", column_sums(queries))
    room = room.reshape(width, inner)
    at.sink("weight_out", np.matmul(flat(at.dy).T, flat(at.saved["seen"]), out=room))
    at.sink("bias_out", column_sums(flat(at.dy)))


ATTENTION = Op(_attention, _attention_back)
