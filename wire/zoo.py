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
        """Append the tensors and the node of a linear layer or a convolution."""
        fan_in = self.shape[0] * prod(window)
        init: Literal["kaiming", "fan"] = "kaiming" if out.prunable else "fan"
        axes = (Axis(out.name), self.axis, *(Axis("", side) for side in window))
        self.groups.append(out)
        self.tensors.append(TensorSpec(f"{name}.weight", axes, init, fan_in))
        self.tensors.append(TensorSpec(f"{name}.bias", (Axis(out.name),)))
        params = {"weight": f"{name}.weight", "bias": f"{name}.bias"}
        self.nodes.append(Node(name, op, (self.last,), params, attrs))
        self.last, self.axis = name, Axis(out.name)

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
    if len(input_shape) != 3:
        raise SpecError(f"model {name!r} wants samples of (channels, height, width), got {input_shape}")
    draft = _Draft(input_shape, Axis("", input_shape[0]))
    for place, conv in enumerate(convs, 1):
        (_, height, width) = draft.shape
        grown = 2 * conv.padding - conv.kernel + 1
        side = (conv.kernel, conv.kernel)
        attrs = {"kernel": conv.kernel, "stride": 1, "padding": conv.padding}
        draft.weigh(f"conv{place}", "conv2d", AxisGroup(f"conv{place}", conv.channels), side, **attrs)
        draft.shape = (conv.channels, height + grown, width + grown)
        draft.node(f"relu{place}", "relu", draft.shape)
        if conv.pool:
            pooled = (conv.channels, draft.shape[1] // conv.pool, draft.shape[2] // conv.pool)
            draft.node(f"pool{place}", "max_pool2d", pooled, kernel=conv.pool, stride=conv.pool)
    draft.dense(hidden, classes, len(convs) + 1)
    return draft.spec(name, input_shape, classes)


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


_FIVE = (Conv(32, 5, 2, 2), Conv(64, 5, 2, 2))

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
