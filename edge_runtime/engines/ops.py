"""The ops of a spec, one torch function each, over inputs and over parameters by role."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from wire.spec import NORM_EPSILON, Node, conv_groups

Tensor = torch.Tensor
Inputs = list[Tensor]
Run = Callable[[Node, Inputs, Mapping[str, Tensor]], Tensor]

RUN: Mapping[str, Run] = {
    "linear": lambda _, x, p: F.linear(x[0], p["weight"], p["bias"]),
    "conv2d": lambda node, x, p: F.conv2d(
        x[0],
        p["weight"],
        p["bias"],
        stride=node.attrs["stride"],
        padding=node.attrs["padding"],
        groups=conv_groups(node, x[0].shape[1], p["weight"].shape[1]),
    ),
    "relu": lambda _, x, __: torch.relu(x[0]),
    "relu in place": lambda _, x, __: torch.relu_(x[0]),
    "tanh": lambda _, x, __: torch.tanh(x[0]),
    "sigmoid": lambda _, x, __: torch.sigmoid(x[0]),
    "hard_sigmoid": lambda _, x, __: F.hardsigmoid(x[0]),
    "hard_swish": lambda _, x, __: F.hardswish(x[0]),
    "max_pool2d": lambda node, x, _: F.max_pool2d(x[0], node.attrs["kernel"], node.attrs["stride"]),
    "avg_pool2d": lambda node, x, _: F.avg_pool2d(x[0], node.attrs["kernel"], node.attrs["stride"]),
    "flatten": lambda _, x, __: x[0].flatten(1),
    "add": lambda _, x, __: sum(x[1:], x[0]),
    "mul": lambda _, x, __: x[0] * x[1],
    # Not by F: that refuses one value per channel, which a single sample may have.
    "group_norm": lambda node, x, p: torch.group_norm(x[0], node.attrs["groups"], p["weight"], p["bias"], NORM_EPSILON),
}
"""By `wire.spec.OPS`; ``relu in place`` overwrites what only it reads."""
