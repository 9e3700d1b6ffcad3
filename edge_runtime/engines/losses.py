"""The losses of the torch engine, and their gradients by hand for models that run without autograd.

``n`` samples, ``c`` classes, logits ``z`` and targets ``t`` (one-hot, or any distribution):

* ``cross_entropy``: the mean over samples of ``-sum_j t_j log softmax(z)_j``;
* ``binary_cross_entropy``: the mean over samples *and* classes of ``-t log s(z) - (1 - t) log(1 - s(z))``, ``s`` being the
  sigmoid. It is c times smaller than the sum over classes that others mean by it: PruneFL's public code takes this mean, and
  its learning rates of 0.25 and 0.1 belong to it (Jiang et al., TNNLS 2022);
* ``mean_squared_error``: the mean over samples *and* classes of ``(z - t)^2``;
* ``sum``: the sum of all logits, whatever the labels. Over inputs of ones and the absolute values of the weights it is
  SynFlow's objective (Tanaka et al., NeurIPS 2020, equation 1).
"""

from __future__ import annotations

from typing import get_args

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from wire.errors import Unsupported
from wire.messages import Loss

Tensor = torch.Tensor


def value(output: Tensor, target: Tensor, loss: Loss) -> Tensor:
    """Give a loss as a scalar that autograd can follow.

    Args:
        output: Logits ``(n, classes)``.
        target: Labels, int64 ``(n,)``; or distributions, float32 ``(n, classes)``.
        loss: Which.

    Raises:
        Unsupported: There is no such loss here.
    """
    if loss == "cross_entropy":
        return F.cross_entropy(output, target)
    if loss == "binary_cross_entropy":
        return F.binary_cross_entropy_with_logits(output, _spread(target, output))
    if loss == "mean_squared_error":
        return F.mse_loss(output, _spread(target, output))
    if loss == "sum":
        return output.sum()
    raise _unknown(loss)


def gradient(output: Tensor, target: Tensor, loss: Loss, scale: float) -> Tensor:
    """Give `scale` times the gradient of `value` to the logits, ``(n, classes)``.

    Raises:
        Unsupported: There is no such loss here.
    """
    if loss == "cross_entropy":
        odds = torch.softmax(output, 1)
        if target.dtype != torch.int64:
            odds.mul_(target.sum(1, keepdim=True))
        return _minus(odds, target).mul_(scale / len(odds))
    if loss == "binary_cross_entropy":
        return _minus(torch.sigmoid(output), target).mul_(scale / output.numel())
    if loss == "mean_squared_error":
        return _minus(output.clone(), target).mul_(2 * scale / output.numel())
    if loss == "sum":
        return torch.full_like(output, scale)
    raise _unknown(loss)


def _unknown(loss: str) -> Unsupported:
    return Unsupported(f"loss {loss!r}; known are {', '.join(get_args(Loss))}")


def _minus(odds: Tensor, target: Tensor) -> Tensor:
    """Take the targets away in place."""
    if target.dtype == torch.int64:
        return odds.scatter_add_(1, target.unsqueeze(1), torch.full((len(target), 1), -1.0))
    return odds.sub_(target)


def _spread(target: Tensor, output: Tensor) -> Tensor:
    """Give the one-hot rows of labels; distributions are such rows already."""
    if target.dtype != torch.int64:
        return target
    return torch.zeros_like(output, requires_grad=False).scatter_(1, target.unsqueeze(1), 1.0)
