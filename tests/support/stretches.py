"""Chains of masked layers for tests: as data, by torch in float64 without a line of ours, and by every maker."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from edge_runtime.kernels.library import open_library
from edge_runtime.kernels.twin import CLayout, TwinStretch
from wire.masks import packed
from wire.spec import Node

MAKERS = ("native", "twin", "blocks") if open_library() is not None else ("twin", "blocks")
"""The compiled core where it is built; the twin as torch runs it here; the twin as it is where torch has no CSR products."""


@dataclass(frozen=True)
class Chain:
    """Nodes in a row and their weights: `dense` by tensor name, zero where the mask of that name is False."""

    nodes: tuple[Node, ...]
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    dense: dict[str, np.ndarray]
    masks: dict[str, np.ndarray]


@dataclass(frozen=True)
class Answer:
    """What the dense masked model says, in float64: output, gradients by tensor name (dense) and of the input.

    `sizes` bound the same sums with every term made positive, `margin` is the distance to the nearest kink of a ReLU or
    a pool, relative to the largest value there; what is exactly zero does not count.
    """

    y: np.ndarray
    dx: np.ndarray
    grads: dict[str, np.ndarray]
    sizes: dict[str, float]
    margin: float


@dataclass(frozen=True)
class Made:
    """One maker's stretch; what goes in and out by tensor name is dense here."""

    kind: str
    chain: Chain
    stretch: Any
    layouts: dict[str, Any]

    def zeros(self):
        return {name: np.zeros_like(array) for name, array in self.stretch.params.items()}

    def dense(self, arrays):
        """Bring arrays of the shapes of `params` into the dense shapes."""
        result = {}
        for name, array in arrays.items():
            mask = self.chain.masks.get(name)
            if mask is None:
                result[name] = array
            else:
                result[name] = np.zeros(mask.shape, np.float32)
                result[name][mask] = self.layouts[name].to_c_order(array)
        return result

    def kept(self, dense):
        """Bring dense arrays into the shapes of `params`."""
        masks = self.chain.masks
        return {
            name: self.layouts[name].from_c_order(array[masks[name]]) if name in masks else array.copy()
            for name, array in dense.items()
        }

    def step(self, x, dy, *, input_gradient=True):
        """Forward and backward: output, dense gradients, gradient of the input."""
        grads = self.zeros()
        y = self.stretch.forward(x, train=True)
        dx = self.stretch.backward(dy, grads=grads, update=None, input_gradient=input_gradient)
        return y, self.dense(grads), dx


def make(kind, chain, blocks=(256, 8, 8)):
    """Build a chain's stretch; `blocks` are columns, in channels and out channels per block of the compiled core."""
    layouts = {node.params["weight"]: _layout(kind, node, chain, blocks) for node in chain.nodes if node.params}
    made = Made(kind, chain, None, layouts)
    return Made(kind, chain, build(kind, chain.nodes, chain.in_shape, made.kept(chain.dense), layouts), layouts)


def build(kind, *arguments):
    """Call a maker."""
    if kind != "native":
        return TwinStretch(*arguments)
    from edge_runtime.kernels.stretch import NativeStretch

    return NativeStretch(open_library(), *arguments)


def _layout(kind, node, chain, blocks):
    mask = chain.masks[node.params["weight"]]
    if kind != "native":
        return CLayout.of(mask, products=None if kind == "twin" else False)
    if node.op == "linear":
        from edge_runtime.kernels.linear import LinearLayout

        return LinearLayout.of(open_library(), packed(mask), blocks[0])
    from edge_runtime.kernels.conv import ConvLayout

    geometry = node.attrs["stride"], node.attrs["padding"], node.attrs.get("dilation", 1)
    return ConvLayout.of(open_library(), packed(mask), geometry, blocks[1], blocks[2])


@contextlib.contextmanager
def threads(kind, count):
    """Let a maker use so many threads for a while."""
    before = torch.get_num_threads()

    def put(number):
        open_library().threads(number) if kind == "native" else torch.set_num_threads(number)

    put(count)
    try:
        yield
    finally:
        put(before if kind != "native" else 1)


@dataclass
class Draft:
    """A chain in the making; `fill` gives the mask of a shape, `whole` makes all numbers small integers."""

    in_shape: tuple[int, ...]
    fill: Any
    rng: np.random.Generator
    whole: bool = False
    shape: tuple[int, ...] = ()
    nodes: list[Node] = field(default_factory=list)
    dense: dict = field(default_factory=dict)
    masks: dict = field(default_factory=dict)

    def __post_init__(self):
        self.shape = self.in_shape

    def add(self, op, out=0, **attrs):
        name = f"n{len(self.nodes)}"
        before = self.nodes[-1].name if self.nodes else "input"
        params = {}
        if op in ("linear", "conv2d"):
            shape = (out, self.shape[0], *([attrs["kernel"]] * 2 if op == "conv2d" else ()))
            params = {"weight": f"{name}.weight", "bias": f"{name}.bias"}
            mask = self.fill(shape)
            self.masks[f"{name}.weight"] = mask
            self.dense[f"{name}.weight"] = np.where(mask, numbers(self.rng, shape, self.whole), np.float32(0))
            self.dense[f"{name}.bias"] = numbers(self.rng, (out,), self.whole)
        self.nodes.append(Node(name, op, (before,), params, attrs))
        self.shape = _after(op, self.shape, out, attrs)
        return self

    def chain(self):
        return Chain(tuple(self.nodes), self.in_shape, self.shape, self.dense, self.masks)


def numbers(rng, shape, whole=False):
    """Normal ones, or integers from -2 to 2, whose sums are exact in float32 as long as they stay below 2^24."""
    return (rng.integers(-2, 3, shape) if whole else rng.standard_normal(shape)).astype(np.float32)


def _after(op, shape, out, attrs):
    if op == "linear":
        return (out,)
    if op == "flatten":
        return (prod(shape),)
    if op == "relu":
        return shape
    padding, reach = attrs.get("padding", 0), attrs.get("dilation", 1) * (attrs["kernel"] - 1) + 1
    sides = ((length + 2 * padding - reach) // attrs["stride"] + 1 for length in shape[1:])
    return (out or shape[0], *sides)


def data(chain, count, rng, whole):
    """Give a chain with inputs and gradients of its output that no rounding can push over a kink.

    Random numbers are drawn until all of them are far from one. Where that does not help (constant images have ties in
    every pool) everything becomes a small integer: then sums are exact, and so are ties, which go to the first.
    """
    for _ in range(0 if whole else 6):
        x, dy = numbers(rng, (count, *chain.in_shape)), numbers(rng, (count, *chain.out_shape))
        if oracle(chain, x, dy).margin > 4e-6:
            return chain, x, dy
    dense = {name: np.rint(array) for name, array in chain.dense.items()}
    chain = dataclasses.replace(chain, dense=dense)
    return chain, numbers(rng, (count, *chain.in_shape), True), numbers(rng, (count, *chain.out_shape), True)


def agree(found, answer, chain, share=2e-5):
    """Hold what `Made.step` gave against the oracle: within `share` of the largest value of each array.

    Where a sum nearly cancels float32 cannot do that; there a twentieth of `share` of its positive terms is allowed.
    """
    y, grads, dx = found
    _near(y, answer.y, share, "y")
    if dx is not None:
        _near(dx, answer.dx, share, "dx")
    assert set(grads) == set(answer.grads)
    for name, wanted in answer.grads.items():
        mask = chain.masks.get(name, np.ones(wanted.shape, bool))
        _near(grads[name], np.where(mask, wanted, 0), share, name, share / 20 * answer.sizes[name])


def _near(found, wanted, share, what, least=0.0):
    assert found.shape == wanted.shape, what
    assert found.dtype == np.float32, what
    assert found.flags.c_contiguous, what
    allowed = max(share * np.abs(wanted).max(initial=0), least)
    worst = np.abs(found - wanted).max(initial=0)
    assert worst <= allowed, f"{what} is off by {worst}, allowed are {allowed}"


def draft(in_shape, mask="0.5", seed=0, whole=False):
    rng = np.random.default_rng(seed)
    return Draft(in_shape, masks(mask, rng), rng, whole)


def small(mask="0.5", seed=0):
    """conv, relu, pool, conv with stride, flatten, linear, relu, linear."""
    made = draft((3, 9, 8), mask, seed)
    made.add("conv2d", 7, kernel=3, stride=1, padding=1).add("relu").add("max_pool2d", kernel=2, stride=2)
    made.add("conv2d", 5, kernel=3, stride=2, padding=2).add("relu").add("flatten")
    return made.add("linear", 20).add("relu").add("linear", 6).chain()


def batch(chain, count, seed=1):
    rng = np.random.default_rng(seed)
    return numbers(rng, (count, *chain.in_shape)), numbers(rng, (count, *chain.out_shape))


def oracle(chain, x, dy):
    """Run the dense masked model by torch's autograd, in float64."""
    value = first = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    leaves = {name: torch.tensor(array, dtype=torch.float64, requires_grad=True) for name, array in chain.dense.items()}
    margin, seen = np.inf, []
    for node in chain.nodes:
        margin = min(margin, _margin(node, value.detach()))
        before, value = value, _run(node, value, leaves)
        if node.params:
            value.retain_grad()
            seen.append((node, before.detach(), value))
    value.backward(torch.tensor(dy, dtype=torch.float64))
    sizes = {}
    for node, before, after in seen:
        positive = torch.zeros_like(leaves[node.params["weight"]], requires_grad=True)
        _run(node, before.abs(), {node.params["weight"]: positive}, bias=False).backward(after.grad.abs())
        sizes[node.params["weight"]] = float(positive.grad.max())
        axes = [axis for axis in range(after.ndim) if axis != 1]
        sizes[node.params["bias"]] = float(after.grad.abs().sum(axes).max())
    grads = {name: leaf.grad.numpy() for name, leaf in leaves.items()}
    return Answer(value.detach().numpy(), first.grad.numpy(), grads, sizes, margin)


def _run(node, x, leaves, bias=True):
    if node.params:
        weight, shift = leaves[node.params["weight"]], leaves[node.params["bias"]] if bias else None
        if node.op == "linear":
            return F.linear(x, weight, shift)
        attrs = node.attrs
        return F.conv2d(x, weight, shift, attrs["stride"], attrs["padding"], attrs.get("dilation", 1))
    if node.op == "relu":
        return torch.relu(x)
    return x.flatten(1) if node.op == "flatten" else F.max_pool2d(x, node.attrs["kernel"], node.attrs["stride"])


def _margin(node, x):
    largest = float(x.abs().max()) or 1.0
    if node.op == "relu":
        return float(torch.where(x == 0, np.inf, x.abs()).min()) / largest
    if node.op == "max_pool2d" and node.attrs["kernel"] > 1:
        side = node.attrs["kernel"]
        windows = x.unfold(2, side, side).unfold(3, side, side).flatten(4)
        best = windows.topk(2, dim=-1).values
        gap = torch.where(best[..., 0] == 0, np.inf, best[..., 0] - best[..., 1])
        return float(gap.min()) / largest
    return np.inf


def masks(kind, rng):
    """Give a function from shapes to masks: of a density, with one weight, full, or with rows and columns left out."""

    def fill(shape):
        mask = np.zeros(shape, bool)
        if kind == "one":
            mask[tuple(int(rng.integers(0, n)) for n in shape)] = True
        elif kind == "gaps":
            mask = (rng.random(shape[:1]) < 0.5).reshape(-1, *[1] * (len(shape) - 1)) & (rng.random(shape[1:]) < 0.5)
        elif kind != "none":
            mask = rng.random(shape) < float(kind)
        return mask

    return fill


KINDS = ("none", "one", "gaps", "0.02", "0.1", "0.5", "1")


@st.composite
def chains(draw):
    """A chain of up to three weighted layers, each with a mask of its own kind, and a batch size."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    weighted = draw(st.sampled_from((1, 2, 3, 1, 2, 0)))
    images = draw(st.sampled_from((weighted, min(1, weighted), 2 * weighted // 3, 0)))
    sides = st.integers(1, 11)
    in_shape = (draw(st.integers(1, 5)), draw(sides), draw(sides))
    if not images and draw(st.booleans()):
        in_shape = (draw(st.integers(1, 60)),)

    def fill(shape):
        return masks(draw(st.sampled_from(KINDS)), rng)(shape)

    draft = Draft(in_shape, fill, rng, draw(st.booleans()))
    between = (("relu", "pool"), (), ("relu",), ("pool",), ("pool", "relu"))
    for place in range(weighted + 1):
        if len(draft.shape) == 3 and place >= images and (place < weighted or draw(st.booleans())):
            draft.add("flatten")
        if place < weighted:
            _weigh(draw, draft)
        for op in draw(st.sampled_from(between)) if place < weighted or not weighted else ():
            if op == "relu":
                draft.add("relu")
            elif len(draft.shape) == 3:
                side = draw(st.integers(1, min(3, *draft.shape[1:])))
                draft.add("max_pool2d", kernel=side, stride=side)
    if {node.op for node in draft.nodes} <= {"flatten"}:
        draft.add("relu")
    return draft.chain(), draw(st.integers(1, 40)), rng, draft.whole


def _weigh(draw, draft):
    if len(draft.shape) == 1:
        draft.add("linear", draw(st.integers(1, 40)))
        return
    kernel = draw(st.integers(1, 5))
    padding = draw(st.integers(0, kernel - 1))
    dilation = draw(st.sampled_from((1, 1, 1, 2)))
    while dilation * (kernel - 1) + 1 > min(draft.shape[1:]) + 2 * padding:
        kernel, padding, dilation = 1, 0, 1
    attrs = {"kernel": kernel, "stride": draw(st.integers(1, 3)), "padding": padding}
    draft.add("conv2d", draw(st.integers(1, 9)), **attrs, **({"dilation": 2} if dilation == 2 else {}))
