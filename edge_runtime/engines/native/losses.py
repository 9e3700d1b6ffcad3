"""The losses of the native engine and their gradients, in numpy; what each is stands in `edge_runtime.engines.losses`.

Both are told by the same few arrays of the logits' size. Nothing overflows: exponentials are of numbers that are not positive.
"""

from __future__ import annotations

from typing import get_args

import numpy as np

from edge_runtime.engines.arrays import Floats, Labels
from edge_runtime.engines.native.at import Array
from wire.errors import DataError, Unsupported
from wire.messages import Loss


def settle(output: Array, target: Labels | Floats, loss: Loss, scale: float, out: Array) -> float:
    """Give a loss, and write `scale` times its gradient to the logits.

    Args:
        output: Logits ``(n, classes)``.
        target: Labels, int64 ``(n,)``; or distributions, of the logits' shape.
        loss: Which.
        scale: Of the gradient alone.
        out: Of the logits' shape and type; no memory of theirs.

    Raises:
        Unsupported: There is no such loss here.
        DataError: The targets do not fit the logits, or a label is no class.
    """
    if loss not in get_args(Loss):
        raise Unsupported(f"loss {loss!r}; known are {', '.join(get_args(Loss))}")
    with np.errstate(all="ignore"):  # what is no number is found where weights are looked at
        if loss == "sum":
            out.fill(scale)
            return float(output.sum())
        _check(output, target)
        if loss == "cross_entropy":
            return _cross_entropy(output, target, scale, out)
        if loss == "binary_cross_entropy":
            return _binary_cross_entropy(output, target, scale, out)
        np.copyto(out, output)
        _minus(out, target)
        lost = float(np.square(out).sum()) / out.size
        out *= 2 * scale / out.size
        return lost


def scored(output: Array, labels: Labels) -> tuple[float, int]:
    """Give the sum of cross-entropies, and how often the label is the first of the largest logits (one that is NaN is larger).

    Args:
        output: Logits ``(n, classes)``.
        labels: int64 ``(n,)``.

    Raises:
        DataError: There are not as many labels, or one is no class.
    """
    _check(output, labels)
    with np.errstate(all="ignore"):
        shifted = output - output.max(1, keepdims=True)
        picked = shifted[np.arange(len(labels)), labels]
        lost = float((np.log(np.exp(shifted, out=shifted).sum(1)) - picked).sum())
    return lost, int(np.count_nonzero(output.argmax(1) == labels))


def _check(output: Array, target: Labels | Floats) -> None:
    """Numpy would take a label below zero for one counted from the end."""
    wanted = output.shape[:1] if target.dtype == np.int64 else output.shape
    if target.shape != wanted:
        raise DataError(f"targets of shape {target.shape} for logits of shape {output.shape}")
    classes = output.shape[1]
    if target.dtype == np.int64 and len(target) and not 0 <= target.min() <= target.max() < classes:
        raise DataError(f"a sample has a label that is none of the model's {classes} classes")


def _cross_entropy(output: Array, target: Labels | Floats, scale: float, out: Array) -> float:
    """With m the largest logit of a sample: ``-log softmax(z)_j = log sum_k exp(z_k - m) - (z_j - m)``."""
    factor = scale / len(output)
    np.subtract(output, output.max(1, keepdims=True), out=out)
    if target.dtype == np.int64:
        rows = np.arange(len(target))
        chosen, weights = out[rows, target], None
    else:
        chosen, weights = (target * out).sum(1), target.sum(1)
    totals = np.exp(out, out=out).sum(1)
    logs, shares = np.log(totals), factor / totals
    if weights is not None:
        logs *= weights
        shares *= weights
    logs -= chosen
    out *= shares[:, None]
    _minus(out, target, factor)
    return float(logs.sum()) / len(logs)


def _binary_cross_entropy(output: Array, target: Labels | Floats, scale: float, out: Array) -> float:
    """``z - min(z, 0) - t z + log(1 + exp(-|z|))``, and ``s(z) = exp(min(z, 0)) / (1 + exp(-|z|))``."""
    factor = scale / output.size
    small = np.abs(output)
    np.negative(small, out=small)
    np.exp(small, out=small)
    np.minimum(output, 0, out=out)
    lost = float(np.log1p(small).sum()) + float((output - out).sum())
    if target.dtype == np.int64:
        lost -= float(output[np.arange(len(target)), target].sum())
    else:
        lost -= float((target * output).sum())
    np.exp(out, out=out)
    small += 1
    out /= small
    out *= factor
    _minus(out, target, factor)
    return lost / output.size


def _minus(out: Array, target: Labels | Floats, factor: float = 1.0) -> None:
    """Take `factor` times the targets away in place."""
    if target.dtype == np.int64:
        out[np.arange(len(target)), target] -= factor
    else:
        out -= target if factor == 1 else factor * target
