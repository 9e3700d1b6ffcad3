"""Small models of `tests.support.models`, written out with torch alone."""

from __future__ import annotations

import torch.nn.functional as F


def small_cnn_forward(weights, x):
    """Give the logits of `small_cnn`; `weights` are tensors by name."""
    x = F.conv2d(x, weights["c.weight"], weights["c.bias"], padding=1).relu()
    x = F.max_pool2d(x, 2).flatten(1)
    x = F.linear(x, weights["f.weight"], weights["f.bias"]).tanh()
    return F.linear(x, weights["o.weight"], weights["o.bias"])
