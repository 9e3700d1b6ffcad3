"""Small torch modules drawn by seed, of every layer that the exporter takes, in orders that nobody would write.

A drawn module is a list of steps over a list of values: step `i` reads earlier values and appends its own. The list is fixed
once it is drawn, so that torch.fx sees a straight line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

WORDS = 11


@dataclass
class Drawn:
    """What has been drawn: layers, steps over values, and the values for one batch, whose shapes say what may come next."""

    rng: np.random.Generator
    layers: nn.ModuleList = field(default_factory=nn.ModuleList)
    steps: list = field(default_factory=list)
    values: list = field(default_factory=list)

    def step(self, act: Callable, *reads: int) -> int:
        """Append a step and give its place."""
        with torch.no_grad():
            self.values.append(act(self.layers, *(self.values[i] for i in reads)))
        self.steps.append((act, reads))
        return len(self.values) - 1

    def layer(self, layer: nn.Module, *reads: int) -> int:
        """Append a step that calls a new layer."""
        place = len(self.layers)
        self.layers.append(layer)
        return self.step(lambda layers, *xs: layers[place](*xs), *reads)

    def few(self, low: int = 2, high: int = 6) -> int:
        return int(self.rng.integers(low, high + 1))

    def coin(self, odds: float = 0.5) -> bool:
        return bool(self.rng.random() < odds)

    def shape(self, at: int) -> tuple[int, ...]:
        return tuple(self.values[at].shape[1:])


class Random(nn.Module):
    """A drawn module."""

    def __init__(self, drawn: Drawn):
        super().__init__()
        self.layers, self.steps = drawn.layers, drawn.steps

    def forward(self, x):
        values = [x]
        for act, reads in self.steps:
            values.append(act(self.layers, *(values[i] for i in reads)))
        return values[-1]


ACTS = (
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Hardsigmoid, nn.Hardswish, lambda: nn.Dropout(0.25)
)  # fmt: skip
FUNCTIONS = (F.relu, torch.tanh, torch.sigmoid, F.silu, F.hardswish, lambda x: x.relu())


def act(d, at):
    if d.coin(0.3):
        function = FUNCTIONS[d.few(0, len(FUNCTIONS) - 1)]
        return d.step(lambda _, x: function(x), at)
    return d.layer(ACTS[d.few(0, len(ACTS) - 1)](), at)


def conv(d, at, out=None, kernel=None, stride=None):
    (channels, *sides) = d.shape(at)
    kind = nn.Conv2d if len(sides) == 2 else nn.Conv1d
    kernel = kernel or (3 if min(sides) >= 3 and d.coin() else 1)
    stride = stride or (2 if min(sides) >= 4 and d.coin(0.3) else 1)
    return d.layer(kind(channels, out or d.few(), kernel, stride, kernel // 2, bias=d.coin(0.7)), at)


def depthwise(d, at):
    (channels, *sides) = d.shape(at)
    kind = nn.Conv2d if len(sides) == 2 else nn.Conv1d
    return d.layer(kind(channels, channels, 3, padding=1, groups=channels), at)


def grouped(d, at):
    """Groups of two or three channels, behind a layer that makes them or, where they come out even, behind anything."""
    groups, each = d.few(2, 3), d.few(2, 3)
    if d.coin(0.7) or d.shape(at)[0] % groups or d.shape(at)[0] == groups:
        at = conv(d, at, groups * each)
    (channels, *sides) = d.shape(at)
    kind = nn.Conv2d if len(sides) == 2 else nn.Conv1d
    return d.layer(kind(channels, groups * d.few(1, 3), 1, groups=groups, bias=d.coin()), at)


def norm(d, at):
    shape = d.shape(at)
    if len(shape) == 3:
        kinds = [nn.BatchNorm2d(shape[0]), nn.GroupNorm(1, shape[0], affine=d.coin(0.8))]
    elif d.kind == "line":
        kinds = [nn.BatchNorm1d(shape[0]), nn.GroupNorm(1, shape[0])]
    else:
        kinds = [nn.LayerNorm(shape[-1], elementwise_affine=d.coin(0.8)), nn.BatchNorm1d(shape[0])]
    return d.layer(kinds[d.few(0, 1)], at)


def tied_norm(d, at):
    at = conv(d, at, 2 * d.few(1, 3)) if d.coin(0.7) or d.shape(at)[0] % 2 else at
    return d.layer(nn.GroupNorm(2, d.shape(at)[0]), at)


def pool(d, at):
    (_, *sides) = d.shape(at)
    name = f"{'Max' if d.coin() else 'Avg'}Pool{len(sides)}d"
    return d.layer(getattr(nn, name)(2, 1 if d.coin(0.3) else 2), at) if min(sides) >= 2 else at


def adaptive(d, at):
    (_, *sides) = d.shape(at)
    return d.layer(getattr(nn, f"AdaptiveAvgPool{len(sides)}d")(d.few(1, 3)), at)


def residual(d, at):
    (channels, *_) = d.shape(at)
    inner = conv(d, at, channels, stride=1)
    return d.step(lambda _, x, y: x + y, act(d, inner), at)


def times(d, at):
    (channels, *_) = d.shape(at)
    (a, b) = (conv(d, at, channels, stride=1, kernel=1) for _ in range(2))
    return d.step(lambda _, x, y: x * y, a, b)


def twice(d, at):
    """One convolution with two uses."""
    (channels, *_) = d.shape(at)
    first = conv(d, at, channels, stride=1)
    place = len(d.layers) - 1
    return d.step(lambda layers, x: layers[place](x), act(d, first))


def concat(d, at):
    """Branches side by side, read through what goes channel by channel; sometimes by what cannot be split."""
    parts = [conv(d, at, stride=1) for _ in range(d.few(2, 3))]
    made = d.step(lambda _, *xs: torch.cat(xs, 1), *parts)
    for _ in range(d.few(0, 2)):
        made = (act, depthwise, norm)[d.few(0, 2)](d, made)
    return conv(d, made) if d.coin(0.7) else made


def excite(d, at):
    """Squeeze and excite, with linear layers or convolutions."""
    (channels, *sides) = d.shape(at)
    ones = (1,) * len(sides)
    axes = tuple(range(2, 2 + len(sides)))
    mean = d.step(lambda _, x: x.mean(axes), at)
    if d.coin():
        gate = d.layer(nn.Linear(channels, 3, bias=d.coin()), mean)
        gate = d.layer(nn.Linear(3, channels), act(d, gate))
        gate = d.step(lambda _, g: torch.sigmoid(g).view(g.size(0), g.size(1), *ones), gate)
    else:
        gate = d.step(lambda _, x: x.mean(axes, keepdim=True), at)
        gate = d.layer(nn.Hardsigmoid(), conv(d, gate, channels, 1, 1))
    return d.step(lambda _, g, x: g * x, gate, at)


def linear(d, at):
    return d.layer(nn.Linear(d.shape(at)[-1], d.few(), bias=d.coin(0.7)), at)


def dense_residual(d, at):
    inner = d.layer(nn.Linear(d.shape(at)[-1], d.shape(at)[-1]), at)
    return d.step(lambda _, x, y: x + y, at, act(d, inner))


def gates(d, at):
    width = d.few()
    (a, b) = (d.layer(nn.Linear(d.shape(at)[-1], width), at) for _ in range(2))
    return d.step(lambda _, x, y: x * torch.sigmoid(y), a, b)


def dense_concat(d, at):
    (a, b) = (linear(d, at), linear(d, at))
    made = d.step(lambda _, x, y: torch.cat([x, y], -1), a, b)
    made = (act, norm)[d.few(0, 1)](d, made) if d.coin() else made
    return linear(d, made) if d.coin(0.7) else made


def recurrent(d, at):
    kind = nn.LSTM if d.coin() else nn.GRU
    layers = d.few(1, 2)
    place = len(d.layers)
    d.layers.append(kind(d.shape(at)[-1], d.few(), layers, bias=d.coin(0.8), batch_first=True, dropout=0.0))
    return d.step(lambda many, x: many[place](x)[0], at)


def attention(d, at):
    heads, size = d.few(1, 3), d.few(1, 2)
    inner = d.layer(nn.Linear(d.shape(at)[-1], heads * size), at)
    place = len(d.layers)
    d.layers.append(nn.MultiheadAttention(heads * size, heads, batch_first=True))
    made = d.step(lambda many, x: many[place](x, x, x, need_weights=False)[0], inner)
    return d.step(lambda _, x, y: x + y, inner, made) if d.coin() else made


def weighed(d, at):
    return d.step(lambda _, x: torch.softmax(x, -1), at) if d.coin(0.3) else at


def mixed(d, at):
    """A linear layer over the steps, between two transposes."""
    turned = d.step(lambda _, x: x.transpose(1, 2), at)
    made = d.layer(nn.Linear(d.shape(turned)[-1], d.few()), turned)
    return d.step(lambda _, x: x.permute(0, 2, 1), act(d, made))


PICTURE = (
    conv, conv, depthwise, norm, norm, act, act, pool, pool, pool, adaptive, residual, times, twice, concat, concat, excite,
    grouped, tied_norm,
)  # fmt: skip
LINE = (conv, conv, depthwise, norm, act, pool, adaptive, residual, times, twice, concat, excite, grouped, tied_norm)
SEQUENCE = (
    linear, linear, norm, act, dense_residual, gates, dense_concat, recurrent, recurrent, attention, attention, weighed, mixed,
)  # fmt: skip
FLAT = (linear, linear, norm, act, dense_residual, gates, dense_concat, weighed)
"""What may come next, by the kind of value."""

LEAVES = {
    "picture": (
        ("flat", lambda x: x.flatten(1)),
        ("flat", lambda x: x.mean((2, 3))),
        ("sequence", lambda x: x.flatten(2).transpose(1, 2)),
    ),
    "line": (
        ("flat", lambda x: x.reshape(x.shape[0], -1)),
        ("flat", lambda x: x.mean(-1)),
        ("sequence", lambda x: x.transpose(1, 2)),
    ),
    "sequence": (
        ("flat", lambda x: x[:, -1]),
        ("flat", lambda x: x.mean(1)),
        ("flat", lambda x: torch.flatten(x, 1)),
        ("line", lambda x: x.permute(0, 2, 1)),
    ),
}
"""How one kind of value becomes another."""

INPUTS = {"picture": (2, 5, 5), "line": (3, 6), "sequence": (4, 3), "flat": (6,), "words": (5,)}
BATCH = 6


def drawn(seed):
    """Draw a module.

    Returns:
        The module, the shape of one sample, one batch of samples, and the labels.
    """
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    kind = list(INPUTS)[seed % len(INPUTS)]
    shape = INPUTS[kind]
    x = rng.integers(WORDS, size=(BATCH, *shape)) if kind == "words" else rng.standard_normal((BATCH, *shape))
    d = Drawn(rng)
    d.values.append(torch.from_numpy(x) if kind == "words" else torch.from_numpy(x.astype(np.float32)))
    at = 0
    if kind == "words":
        at, kind = d.layer(nn.Embedding(WORDS, d.few()), 0), "sequence"
    tables = {"picture": PICTURE, "line": LINE, "sequence": SEQUENCE, "flat": FLAT}
    while True:
        d.kind = kind
        for _ in range(d.few(2, 5) if kind == "picture" else d.few(1, 3)):
            table = tables[kind]
            at = table[d.few(0, len(table) - 1)](d, at)
        if kind == "flat":
            break
        ways = LEAVES[kind][: 3 if len(d.steps) > 12 else None]
        (kind, leave) = ways[d.few(0, len(ways) - 1)]
        at = d.step(lambda _, x, leave=leave: leave(x), at)
    classes = d.few(2, 4)
    d.layer(nn.Linear(d.shape(at)[-1], classes), at)
    module = Random(d)
    with torch.no_grad():
        for name, array in module.named_parameters():
            if "norm" in name or array.ndim == 1:
                array.add_(0.2 * torch.randn_like(array))
        module.train()(d.values[0])
    return module, shape, x.astype(np.float32), rng.integers(classes, size=BATCH)
