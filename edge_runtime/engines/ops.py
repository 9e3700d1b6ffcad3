"""The ops of a spec, one torch function each, over inputs and over parameters by role."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from edge_runtime.engines.phase import FOLLOWS, Phase, draw_keeps
from wire.errors import DataError
from wire.spec import NORM_EPSILON, Node, conv_groups

Tensor = torch.Tensor
Inputs = list[Tensor]
Run = Callable[[Node, Inputs, Mapping[str, Tensor]], Tensor]


def _conv(convolve: Callable[..., Tensor], node: Node, x: Inputs, p: Mapping[str, Tensor]) -> Tensor:
    weight, groups = p["weight"], conv_groups(node, x[0].shape[1], p["weight"].shape[1])
    return convolve(x[0], weight, p["bias"], stride=node.attrs["stride"], padding=node.attrs["padding"], groups=groups)


def _embedding(_: Node, x: Inputs, p: Mapping[str, Tensor]) -> Tensor:
    words, known = x[0].long(), len(p["weight"])
    if bool((words < 0).any()) or bool((words >= known).any()):
        raise DataError(f"a sample has a word that is none of the model's {known}")
    return F.embedding(words, p["weight"])


def _reshape(node: Node, x: Inputs, _: Mapping[str, Tensor]) -> Tensor:
    return x[0].reshape(-1, *(node.attrs[f"d{axis}"] for axis in range(len(node.attrs))))


def _gates(p: Mapping[str, Tensor]) -> list[Tensor]:
    return [p[role] for role in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]


def _lstm(_: Node, x: Inputs, p: Mapping[str, Tensor]) -> Tensor:
    start = x[0].new_zeros(1, len(x[0]), p["weight_hh"].shape[1])
    return torch.lstm(x[0], (start, start), _gates(p), True, 1, 0.0, False, False, True)[0]


def _gru(_: Node, x: Inputs, p: Mapping[str, Tensor]) -> Tensor:
    start = x[0].new_zeros(1, len(x[0]), p["weight_hh"].shape[1])
    return torch.gru(x[0], start, _gates(p), True, 1, 0.0, False, False, True)[0]


def _attention(node: Node, x: Inputs, p: Mapping[str, Tensor]) -> Tensor:
    """Self-attention by heads (Vaswani et al., NeurIPS 2017, section 3.2): every step reads every step."""
    (samples, steps, _), head = x[0].shape, node.attrs["head"]
    each = F.linear(x[0], p["weight_in"], p["bias_in"]).reshape(samples, steps, 3, -1, head)
    asked, keys, values = each.permute(2, 0, 3, 1, 4)
    seen = F.scaled_dot_product_attention(asked, keys, values)
    return F.linear(seen.transpose(1, 2).flatten(2), p["weight_out"], p["bias_out"])


RUN: Mapping[str, Run] = {
    "linear": lambda _, x, p: F.linear(x[0], p["weight"], p["bias"]),
    "conv2d": partial(_conv, F.conv2d),
    "conv1d": partial(_conv, F.conv1d),
    "relu": lambda _, x, __: torch.relu(x[0]),
    "relu in place": lambda _, x, __: torch.relu_(x[0]),
    "relu6": lambda _, x, __: F.relu6(x[0]),
    "gelu": lambda _, x, __: F.gelu(x[0]),
    "silu": lambda _, x, __: F.silu(x[0]),
    "tanh": lambda _, x, __: torch.tanh(x[0]),
    "sigmoid": lambda _, x, __: torch.sigmoid(x[0]),
    "hard_sigmoid": lambda _, x, __: F.hardsigmoid(x[0]),
    "hard_swish": lambda _, x, __: F.hardswish(x[0]),
    "softmax": lambda _, x, __: torch.softmax(x[0], -1),
    "max_pool2d": lambda node, x, _: F.max_pool2d(x[0], node.attrs["kernel"], node.attrs["stride"]),
    "avg_pool2d": lambda node, x, _: F.avg_pool2d(x[0], node.attrs["kernel"], node.attrs["stride"]),
    "max_pool1d": lambda node, x, _: F.max_pool1d(x[0], node.attrs["kernel"], node.attrs["stride"]),
    "avg_pool1d": lambda node, x, _: F.avg_pool1d(x[0], node.attrs["kernel"], node.attrs["stride"]),
    "adaptive_avg_pool2d": lambda node, x, _: F.adaptive_avg_pool2d(x[0], node.attrs["size"]),
    "adaptive_avg_pool1d": lambda node, x, _: F.adaptive_avg_pool1d(x[0], node.attrs["size"]),
    "flatten": lambda _, x, __: x[0].flatten(1),
    "reshape": _reshape,
    "transpose": lambda node, x, _: x[0].transpose(1 + node.attrs["first"], 1 + node.attrs["second"]),
    "last": lambda _, x, __: x[0][:, -1],
    "concat": lambda _, x, __: torch.cat(x, 1),
    "add": lambda _, x, __: sum(x[1:], x[0]),
    "mul": lambda _, x, __: x[0] * x[1],
    # Not by F: that refuses one value per channel, which a single sample may have.
    "group_norm": lambda node, x, p: torch.group_norm(x[0], node.attrs["groups"], p["weight"], p["bias"], NORM_EPSILON),
    "layer_norm": lambda _, x, p: F.layer_norm(x[0], x[0].shape[-1:], p["weight"], p["bias"], NORM_EPSILON),
    "embedding": _embedding,
    "lstm": _lstm,
    "gru": _gru,
    "attention": _attention,
}
"""By `wire.ops.OPS`, without those of `PHASED`; ``relu in place`` overwrites what only it reads."""


def _batch_norm(phase: Phase, _: int) -> Run:
    """Norm by the batch in training, else by the running statistics, which follow as torch's own do.

    A batch with one value per channel has no variance: it is normed by the running statistics, and these do not move.
    """

    def run(_: Node, x: Inputs, p: Mapping[str, Tensor]) -> Tensor:
        alone = x[0].numel() == x[0].shape[1]
        if not phase.training or alone:
            # What came over the wire, rounded or pulled, may have left a variance below zero.
            mean, variance = p["mean"], p["variance"].clamp(min=0.0)
            return torch.batch_norm(x[0], p["weight"], p["bias"], mean, variance, False, FOLLOWS, NORM_EPSILON, False)
        mean_or_none, variance_or_none = (p["mean"], p["variance"]) if phase.follows else (None, None)
        return torch.batch_norm(
            x[0], p["weight"], p["bias"], mean_or_none, variance_or_none, True, phase.follows, NORM_EPSILON, False
        )

    return run


def _dropout(phase: Phase, place: int) -> Run:
    """Set a share of the values to zero and scale the rest, in training alone (`phase.draw_keeps`)."""

    def run(node: Node, x: Inputs, _: Mapping[str, Tensor]) -> Tensor:
        share = node.attrs["permille"] / 1000
        if not (phase.training and phase.drops and share):
            return x[0]
        keeps = torch.empty(x[0].shape)
        draw_keeps(phase.source, place, share, keeps.numpy())
        return x[0] * keeps

    return run


PHASED: Mapping[str, Callable[[Phase, int], Run]] = {"batch_norm": _batch_norm, "dropout": _dropout}
"""The ops that do otherwise in training: each is made for an engine's phase and the node's place in the graph."""
