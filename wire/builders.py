"""Families of models as data, from their layers' sizes. Hidden channels are prunable; inputs and classes are not.

Where a paper has batch norm most of these have group norm of one group, whose statistics are of one sample: nothing runs
along that a federation would have to average, batches of one train, and cut channels leave no trace. It has as many weights,
and convolutions before it keep their biases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Literal

from wire.errors import SpecError
from wire.spec import Axis, AxisGroup, ModelSpec, Node, TensorSpec, check

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Conv:
    """One stage of `cnn`: a convolution, a ReLU and perhaps a pool.

    Attributes:
        channels: Of its output.
        kernel: Side of the square kernel.
        padding: On every side.
        pool: Side and stride of the max pool behind it; 0 for none.
        stride: Of the kernel.
        norm: ``batch`` for a batch norm before the ReLU; empty for none.
    """

    channels: int
    kernel: int = 3
    padding: int = 1
    pool: int = 0
    stride: int = 1
    norm: Literal["", "batch"] = ""


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """One block of `mobilenet`: channels are widened, filtered one by one, weighed, and narrowed again.

    Attributes:
        kernel: Side of the filters.
        wide: Channels between.
        channels: Of its output.
        gate: Whether channels are weighed by what they hold (squeeze and excite).
        act: ``relu`` or ``hard_swish``.
        stride: Of the filters.
    """

    kernel: int
    wide: int
    channels: int
    gate: bool
    act: str
    stride: int = 1


@dataclass(slots=True)
class Draft:
    """A chain of layers that is being built.

    Attributes:
        shape: Of the latest node's output.
        last: Name of the latest node.
        axis: How the first dimension of the latest output follows a group.
    """

    shape: Shape
    axis: Axis
    last: str = "input"
    groups: list[AxisGroup] = field(default_factory=list)
    tensors: list[TensorSpec] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)

    def node(self, name: str, op: str, shape: Shape, **attrs: int) -> None:
        """Append a node without weights."""
        self.nodes.append(Node(name, op, (self.last,), {}, attrs))
        self.last, self.shape = name, shape

    def weigh(self, name: str, op: str, out: AxisGroup, window: Shape, **attrs: int) -> None:
        """Append the tensors and the node of a linear layer or a convolution; `out` may be a group of an earlier one."""
        init: Literal["kaiming", "fan"] = "kaiming" if out.prunable else "fan"
        axes = (Axis(out.name), self.axis, *(Axis("", side) for side in window))
        if out not in self.groups:
            self.groups.append(out)
        self._layer(Node(name, op, (self.last,), {}, attrs), axes, init, self.shape[0] * prod(window))

    def _layer(self, node: Node, axes: tuple[Axis, ...], init: Literal["kaiming", "fan"], fan_in: int) -> None:
        params = {"weight": f"{node.name}.weight", "bias": f"{node.name}.bias"}
        self.tensors.append(TensorSpec(params["weight"], axes, init, fan_in))
        self.tensors.append(TensorSpec(params["bias"], axes[:1]))
        self.nodes.append(replace(node, params=params))
        self.last, self.axis = node.name, axes[0]

    def convolve(self, name: str, out: AxisGroup, kernel: int, padding: int, stride: int = 1) -> None:
        """Append a convolution and follow its shape; over time where samples are (channels, length)."""
        (_, *sides) = self.shape
        op, window = f"conv{len(sides)}d", (kernel,) * len(sides)
        self.weigh(name, op, out, window, kernel=kernel, stride=stride, padding=padding)
        self.shape = (out.size, *((side + 2 * padding - kernel) // stride + 1 for side in sides))

    def filter(self, name: str, kernel: int, stride: int) -> None:
        """Append a depthwise convolution: a filter for each channel, which lives and dies with it."""
        (channels, *sides) = self.shape
        padding = kernel // 2
        attrs = {"kernel": kernel, "stride": stride, "padding": padding, "groups": channels}
        axes = (self.axis, Axis(), Axis("", kernel), Axis("", kernel))
        self._layer(Node(name, "conv2d", (self.last,), {}, attrs), axes, "kaiming", kernel * kernel)
        self.shape = (channels, *((side + 2 * padding - kernel) // stride + 1 for side in sides))

    def average(self, name: str) -> None:
        """Append the mean of each channel.

        Raises:
            SpecError: Pictures are not square.
        """
        (channels, height, width) = self.shape
        if height != width:
            raise SpecError(f"node {name!r} wants square pictures, got {height} by {width}")
        self.node(name, "avg_pool2d", (channels, 1, 1), kernel=height, stride=height)

    def gate(self, name: str, squeezed: int) -> None:
        """Append squeeze and excite (Hu et al., CVPR 2018): every channel times what two layers make of all means."""
        (last, axis, shape) = (self.last, self.axis, self.shape)
        (out,) = (group for group in self.groups if group.name == axis.group)
        self.average(f"{name}.mean")
        self.convolve(f"{name}.squeeze", AxisGroup(f"{name}.squeeze", squeezed), 1, 0)
        self.node(f"{name}.relu", "relu", self.shape)
        self.convolve(f"{name}.excite", out, 1, 0)
        self.node(f"{name}.share", "hard_sigmoid", self.shape)
        self.nodes.append(Node(f"{name}.times", "mul", (last, self.last)))
        self.last, self.axis, self.shape = f"{name}.times", axis, shape

    def bottleneck(self, name: str, block: Bottleneck, out: AxisGroup) -> None:
        """Append a block of Howard et al. (ICCV 2019), with a sum around it if its output is of the input's group."""
        before = (self.last, self.axis, self.shape)
        if block.wide != self.shape[0]:
            self.convolve(f"{name}.widen", AxisGroup(f"{name}.wide", block.wide), 1, 0)
            self.norm(f"{name}.norm1")
            self.node(f"{name}.act1", block.act, self.shape)
        self.filter(f"{name}.filter", block.kernel, block.stride)
        self.norm(f"{name}.norm2")
        self.node(f"{name}.act2", block.act, self.shape)
        if block.gate:
            self.gate(f"{name}.gate", _eighths(block.wide // 4))
        self.convolve(f"{name}.narrow", out, 1, 0)
        self.norm(f"{name}.norm3")
        if before[1] == self.axis:
            self.nodes.append(Node(f"{name}.add", "add", (before[0], self.last)))
            self.last = f"{name}.add"

    def norm(self, name: str) -> None:
        """Append a group norm of one group: it is the same wherever channels stand, and whichever of them are cut."""
        self.tensors += [TensorSpec(f"{name}.weight", (self.axis,), "ones"), TensorSpec(f"{name}.bias", (self.axis,))]
        params = {"weight": f"{name}.weight", "bias": f"{name}.bias"}
        self.nodes.append(Node(name, "group_norm", (self.last,), params, {"groups": 1}))
        self.last = name

    def batch_norm(self, name: str) -> None:
        """Append a batch norm, whose running mean and variance are tensors too."""
        inits: dict[str, Literal["zeros", "ones"]] = {
            "weight": "ones",
            "bias": "zeros",
            "mean": "zeros",
            "variance": "ones",
        }
        self.tensors += [TensorSpec(f"{name}.{role}", (self.axis,), init) for role, init in inits.items()]
        self.nodes.append(Node(name, "batch_norm", (self.last,), {role: f"{name}.{role}" for role in inits}))
        self.last = name

    def residual(self, name: str, out: AxisGroup, stride: int) -> None:
        """Append a basic block of He et al. (CVPR 2016): two 3x3 convolutions, and around them nothing or a 1x1."""
        before = (self.last, self.axis, self.shape)
        self.convolve(f"{name}.conv1", AxisGroup(name, out.size), 3, 1, stride)
        self.norm(f"{name}.norm1")
        self.node(f"{name}.relu1", "relu", self.shape)
        self.convolve(f"{name}.conv2", out, 3, 1)
        self.norm(f"{name}.norm2")
        (inner, axis, shape) = (self.last, self.axis, self.shape)
        self.last, self.axis, self.shape = before
        if self.axis != axis:
            self.convolve(f"{name}.short", out, 1, 0, stride)
            self.norm(f"{name}.norm3")
        self.nodes.append(Node(f"{name}.add", "add", (inner, self.last)))
        self.last, self.axis, self.shape = f"{name}.add", axis, shape
        self.node(f"{name}.relu2", "relu", shape)

    def flatten(self) -> None:
        """Append a flatten, unless the output is one line already."""
        if len(self.shape) > 1:
            channels, *rest = self.shape
            inner = prod(rest)
            axis = Axis(self.axis.group, inner) if self.axis.group else Axis("", channels * inner)
            self.node("flatten", "flatten", (channels * inner,))
            self.axis = axis

    def dense(self, hidden: Sequence[int], classes: int, first: int, act: str = "relu") -> None:
        """Append linear layers, an activation behind each but the last, which gives the classes."""
        self.flatten()
        for place, units in enumerate(hidden, first):
            self.weigh(f"fc{place}", "linear", AxisGroup(f"fc{place}", units), ())
            self.node(f"{act}{place}", act, (units,))
        self.weigh("out", "linear", AxisGroup("classes", classes, prunable=False), ())
        self.shape = (classes,)

    def spec(self, name: str, input_shape: Shape, classes: int) -> ModelSpec:
        """Close the graph and check it."""
        return check(ModelSpec(name, input_shape, classes, tuple(self.groups), tuple(self.tensors), tuple(self.nodes)))


def mlp(name: str, input_shape: Shape, classes: int, hidden: Sequence[int] = ()) -> ModelSpec:
    """Build a multi-layer perceptron; without hidden layers it is multinomial logistic regression.

    Raises:
        SpecError: It cannot be run.
    """
    draft = Draft(input_shape, Axis("", input_shape[0]))
    draft.dense(hidden, classes, 1)
    return draft.spec(name, input_shape, classes)


def cnn(name: str, input_shape: Shape, classes: int, convs: Sequence[Conv], hidden: Sequence[int]) -> ModelSpec:
    """Build convolutions, then linear layers.

    Args:
        name: For people.
        input_shape: (channels, height, width) or (channels, length) of one sample.
        classes: Length of the output.
        convs: The convolutional stages; over time, kernels and pools are so many steps long.
        hidden: Units of the hidden linear layers.

    Raises:
        SpecError: It cannot be run, for example because a pool no longer fits.
    """
    draft = _picture(name, input_shape) if len(input_shape) != 2 else Draft(input_shape, Axis("", input_shape[0]))
    for place, conv in enumerate(convs, 1):
        draft.convolve(f"conv{place}", AxisGroup(f"conv{place}", conv.channels), conv.kernel, conv.padding, conv.stride)
        if conv.norm:
            draft.batch_norm(f"norm{place}")
        draft.node(f"relu{place}", "relu", draft.shape)
        if conv.pool:
            pooled = (conv.channels, *(side // conv.pool for side in draft.shape[1:]))
            draft.node(f"pool{place}", f"max_pool{len(pooled) - 1}d", pooled, kernel=conv.pool, stride=conv.pool)
    draft.dense(hidden, classes, len(convs) + 1)
    return draft.spec(name, input_shape, classes)


def resnet(name: str, input_shape: Shape, classes: int, stages: Sequence[tuple[int, int]]) -> ModelSpec:
    """Build a residual network for small pictures: a 3x3 stem, stages of basic blocks, the mean of each channel, one layer.

    Args:
        name: For people.
        input_shape: (channels, side, side) of one sample.
        classes: Length of the output.
        stages: (channels, blocks) of each; from the second on, its first block halves the sides. Channels of a stage are
            cut together, the stem's with the first stage's.

    Raises:
        SpecError: It cannot be run, for example because pictures are not square.
    """
    draft = _picture(name, input_shape)
    for place, (channels, blocks) in enumerate(stages, 1):
        out = AxisGroup(f"stage{place}", channels)
        if place == 1:
            draft.convolve("stem", out, 3, 1)
            draft.norm("norm")
            draft.node("relu", "relu", draft.shape)
        for block in range(1, blocks + 1):
            draft.residual(f"block{place}.{block}", out, 2 if place > 1 and block == 1 else 1)
    draft.average("pool")
    draft.dense((), classes, 1)
    return draft.spec(name, input_shape, classes)


def mobilenet(
    name: str, input_shape: Shape, classes: int, blocks: Sequence[Bottleneck], ends: tuple[int, int, int]
) -> ModelSpec:
    """Build a MobileNetV3 (Howard et al., ICCV 2019, tables 1 and 2), without its dropout.

    A block whose stride is 1 and whose output is as wide as its input adds up with it, so that both share their channels.

    Args:
        name: For people.
        input_shape: (channels, side, side) of one sample; the stem and blocks with a stride of 2 halve the sides.
        classes: Length of the output.
        blocks: The blocks.
        ends: Channels of the stem and of the last convolution, and units of the hidden linear layer.

    Raises:
        SpecError: It cannot be run, for example because pictures are not square.
    """
    (stem, last, hidden) = ends
    draft, out = _picture(name, input_shape), AxisGroup("stem", stem)
    draft.convolve("stem", out, 3, 1, 2)
    draft.norm("norm")
    draft.node("act", "hard_swish", draft.shape)
    for place, block in enumerate(blocks, 1):
        if block.stride > 1 or block.channels != out.size:
            out = AxisGroup(f"stage{place}", block.channels)
        draft.bottleneck(f"block{place}", block, out)
    draft.convolve("last", AxisGroup("last", last), 1, 0)
    draft.norm("last.norm")
    draft.node("last.act", "hard_swish", draft.shape)
    draft.average("pool")
    draft.dense((hidden,), classes, 1, "hard_swish")
    return draft.spec(name, input_shape, classes)


def _eighths(channels: int) -> int:
    """Give the multiple of 8 next to a number, from 8 on and not below nine tenths of it, as the paper's code does."""
    nearest = max(8, (channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


def _picture(name: str, input_shape: Shape) -> Draft:
    if len(input_shape) != 3:
        raise SpecError(f"model {name!r} wants samples of (channels, height, width), got {input_shape}")
    return Draft(input_shape, Axis("", input_shape[0]))
