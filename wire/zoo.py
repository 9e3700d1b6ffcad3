"""Models by name, as data. Hidden channels are prunable; inputs and classes are not. A new one: a builder and one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Literal

from wire.errors import ConfigError, PeerError, SpecError
from wire.spec import SPEC_BYTES, Axis, AxisGroup, ModelSpec, Node, TensorSpec, check, decode

Shape = tuple[int, ...]
Builder = Callable[[str, Shape, int], ModelSpec]


@dataclass(frozen=True, slots=True)
class Conv:
    """One stage of `cnn`: a convolution, a ReLU and perhaps a pool.

    Attributes:
        channels: Of its output.
        kernel: Side of the square kernel; the stride is 1.
        padding: On every side.
        pool: Side and stride of the max pool behind it; 0 for none.
    """

    channels: int
    kernel: int = 3
    padding: int = 1
    pool: int = 0


@dataclass(slots=True)
class _Draft:
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
        fan_in = self.shape[0] * prod(window)
        init: Literal["kaiming", "fan"] = "kaiming" if out.prunable else "fan"
        axes = (Axis(out.name), self.axis, *(Axis("", side) for side in window))
        if out not in self.groups:
            self.groups.append(out)
        self.tensors.append(TensorSpec(f"{name}.weight", axes, init, fan_in))
        self.tensors.append(TensorSpec(f"{name}.bias", (Axis(out.name),)))
        params = {"weight": f"{name}.weight", "bias": f"{name}.bias"}
        self.nodes.append(Node(name, op, (self.last,), params, attrs))
        self.last, self.axis = name, Axis(out.name)

    def convolve(self, name: str, out: AxisGroup, kernel: int, padding: int, stride: int = 1) -> None:
        """Append a convolution and follow its shape."""
        (_, *sides) = self.shape
        self.weigh(name, "conv2d", out, (kernel, kernel), kernel=kernel, stride=stride, padding=padding)
        self.shape = (out.size, *((side + 2 * padding - kernel) // stride + 1 for side in sides))

    def norm(self, name: str) -> None:
        """Append a group norm of one group: it is the same wherever channels stand, and whichever of them are cut."""
        self.tensors += [TensorSpec(f"{name}.weight", (self.axis,), "ones"), TensorSpec(f"{name}.bias", (self.axis,))]
        params = {"weight": f"{name}.weight", "bias": f"{name}.bias"}
        self.nodes.append(Node(name, "group_norm", (self.last,), params, {"groups": 1}))
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

    def dense(self, hidden: Sequence[int], classes: int, first: int) -> None:
        """Append linear layers, a ReLU behind each but the last, which gives the classes."""
        self.flatten()
        for place, units in enumerate(hidden, first):
            self.weigh(f"fc{place}", "linear", AxisGroup(f"fc{place}", units), ())
            self.node(f"relu{place}", "relu", (units,))
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
    draft = _Draft(input_shape, Axis("", input_shape[0]))
    draft.dense(hidden, classes, 1)
    return draft.spec(name, input_shape, classes)


def cnn(name: str, input_shape: Shape, classes: int, convs: Sequence[Conv], hidden: Sequence[int]) -> ModelSpec:
    """Build convolutions, then linear layers.

    Args:
        name: For people.
        input_shape: (channels, height, width) of one sample.
        classes: Length of the output.
        convs: The convolutional stages.
        hidden: Units of the hidden linear layers.

    Raises:
        SpecError: It cannot be run, for example because a pool no longer fits.
    """
    draft = _picture(name, input_shape)
    for place, conv in enumerate(convs, 1):
        draft.convolve(f"conv{place}", AxisGroup(f"conv{place}", conv.channels), conv.kernel, conv.padding)
        draft.node(f"relu{place}", "relu", draft.shape)
        if conv.pool:
            pooled = (conv.channels, draft.shape[1] // conv.pool, draft.shape[2] // conv.pool)
            draft.node(f"pool{place}", "max_pool2d", pooled, kernel=conv.pool, stride=conv.pool)
    draft.dense(hidden, classes, len(convs) + 1)
    return draft.spec(name, input_shape, classes)


def resnet(name: str, input_shape: Shape, classes: int, stages: Sequence[tuple[int, int]]) -> ModelSpec:
    """Build a residual network for small pictures: a 3x3 stem, stages of basic blocks, the mean of each channel, one layer.

    Where the paper has batch norm this has group norm of one group, whose statistics are of one sample: nothing runs along
    that a federation would have to average, batches of one train, and cut channels leave no trace. Convolutions have biases.

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
    (channels, height, width) = draft.shape
    if height != width:
        raise SpecError(f"model {name!r} wants square pictures, got {input_shape}")
    draft.node("pool", "avg_pool2d", (channels, 1, 1), kernel=height, stride=height)
    draft.dense((), classes, 1)
    return draft.spec(name, input_shape, classes)


def _picture(name: str, input_shape: Shape) -> _Draft:
    if len(input_shape) != 3:
        raise SpecError(f"model {name!r} wants samples of (channels, height, width), got {input_shape}")
    return _Draft(input_shape, Axis("", input_shape[0]))


@dataclass(frozen=True, slots=True)
class Entry:
    """A model that has a name.

    Attributes:
        about: One line for people.
        input_shape: Of one sample, unless the caller wants another.
        classes: Length of the output, unless the caller wants another.
        build: The builder: (name, input shape, classes) to a spec.
    """

    about: str
    input_shape: Shape
    classes: int
    build: Builder


def _mlp(*hidden: int) -> Builder:
    return lambda name, input_shape, classes: mlp(name, input_shape, classes, hidden)


def _cnn(convs: Sequence[Conv], *hidden: int) -> Builder:
    return lambda name, input_shape, classes: cnn(name, input_shape, classes, convs, hidden)


def _resnet(*stages: tuple[int, int]) -> Builder:
    return lambda name, input_shape, classes: resnet(name, input_shape, classes, stages)


_FIVE = (Conv(32, 5, 2, 2), Conv(64, 5, 2, 2))
_ELEVEN = (Conv(64, pool=2), Conv(128, pool=2), Conv(256), Conv(256, pool=2), *2 * (Conv(512), Conv(512, pool=2)))

MODELS: Mapping[str, Entry] = {
    "linear": Entry("logistic regression on 8x8 digits", (64,), 10, _mlp()),
    "digits-mlp": Entry("two hidden layers of 96 for 8x8 digits", (64,), 10, _mlp(96, 96)),
    "digits-cnn": Entry(
        "two 3x3 convolutions and a wide layer for 8x8 digits: 1.6 million weights",
        (1, 8, 8),
        10,
        _cnn((Conv(32), Conv(64, pool=2)), 1536),
    ),
    "lenet-300-100": Entry("the classic perceptron for 28x28 digits", (784,), 10, _mlp(300, 100)),
    "lenet-5": Entry(
        "the classic small convolutional network for 28x28 digits, with ReLU and max pools",
        (1, 28, 28),
        10,
        _cnn((Conv(6, 5, 2, 2), Conv(16, 5, 0, 2)), 120, 84),
    ),
    "conv-2": Entry("PruneFL's Conv-2 for FEMNIST: 6.6 million weights", (1, 28, 28), 62, _cnn(_FIVE, 2048)),
    "vgg-11": Entry(
        "PruneFL's VGG-11 for 32x32 pictures, without norms, layers of 512 behind: 9.8 million weights",
        (3, 32, 32),
        10,
        _cnn(_ELEVEN, 512, 512),
    ),
    "resnet-18": Entry(
        "ResNet-18 for 32x32 pictures, with group norm: 11.2 million weights",
        (3, 32, 32),
        10,
        _resnet((64, 2), (128, 2), (256, 2), (512, 2)),
    ),
}
"""Name to model; `coordinator` and devices share it."""


def by_name(name: str, input_shape: Shape | None = None, classes: int | None = None) -> ModelSpec:
    """Build a named model, for other samples or classes than its own if asked.

    Raises:
        ConfigError: There is no such model; the text lists those that are.
        SpecError: It cannot take such samples.
    """
    entry = MODELS.get(name)
    if entry is None:
        raise ConfigError(f"there is no model {name!r}; known are {', '.join(sorted(MODELS))}, or name a model file")
    return entry.build(name, input_shape or entry.input_shape, classes or entry.classes)


def load(model: str | Path) -> ModelSpec:
    """Build a model by its name, or read it from a file that `spec.encode` made.

    Raises:
        ConfigError: It is neither a known name nor a file with a model that can be run.
    """
    if isinstance(model, str) and model in MODELS:
        return by_name(model)
    path = Path(model)
    try:
        with path.open("rb") as file:
            return decode(file.read(SPEC_BYTES + 1))
    except FileNotFoundError:
        names = ", ".join(sorted(MODELS))
        raise ConfigError(f"{str(model)!r} is neither a file nor a model's name; the names are {names}") from None
    except OSError as error:
        raise ConfigError(f"{model}: {error.strerror}") from error
    except (PeerError, SpecError) as error:
        raise ConfigError(f"{model} is no model file: {error}") from error
