"""Models by name, as data. A new one: a line here, and a builder in `wire.builders` if none fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod
from pathlib import Path

from wire.builders import Bottleneck, Conv, Shape, cnn, mlp, mobilenet, resnet
from wire.errors import ConfigError, PeerError, SpecError
from wire.spec import SPEC_BYTES, ModelSpec, check, decode, regrouped, tensor_shape

Builder = Callable[[str, Shape, int], ModelSpec]


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


def _mobilenet(blocks: Sequence[Bottleneck], *ends: int) -> Builder:
    (stem, last, hidden) = ends
    return lambda name, input_shape, classes: mobilenet(name, input_shape, classes, blocks, (stem, last, hidden))


_FIVE = (Conv(32, 5, 2, 2), Conv(64, 5, 2, 2))
_ELEVEN = (Conv(64, pool=2), Conv(128, pool=2), Conv(256), Conv(256, pool=2), *2 * (Conv(512), Conv(512, pool=2)))
_ALEX = (Conv(64, pool=2, stride=2), Conv(192, pool=2), Conv(384), Conv(256), Conv(256, pool=2))
_SMALL = (
    Bottleneck(3, 16, 16, True, "relu", 2),
    Bottleneck(3, 72, 24, False, "relu", 2),
    Bottleneck(3, 88, 24, False, "relu"),
    Bottleneck(5, 96, 40, True, "hard_swish", 2),
    Bottleneck(5, 240, 40, True, "hard_swish"),
    Bottleneck(5, 240, 40, True, "hard_swish"),
    Bottleneck(5, 120, 48, True, "hard_swish"),
    Bottleneck(5, 144, 48, True, "hard_swish"),
    Bottleneck(5, 288, 96, True, "hard_swish", 2),
    Bottleneck(5, 576, 96, True, "hard_swish"),
    Bottleneck(5, 576, 96, True, "hard_swish"),
)
"""Table 2 of the MobileNetV3 paper."""

MODELS: Mapping[str, Entry] = {
    "linear": Entry("logistic regression on 8x8 digits", (64,), 10, _mlp()),
    "digits-mlp": Entry("two hidden layers of 96 for 8x8 digits", (64,), 10, _mlp(96, 96)),
    "digits-cnn": Entry(
        "two 3x3 convolutions and a wide layer for 8x8 digits: 1.6 million weights",
        (1, 8, 8),
        10,
        _cnn((Conv(32), Conv(64, pool=2)), 1536),
    ),
    "digits-cnn-bn": Entry(
        "three 3x3 convolutions with batch norms for 8x8 digits: 16 thousand weights",
        (1, 8, 8),
        10,
        _cnn((Conv(16, norm="batch"), Conv(32, pool=2, norm="batch"), Conv(32, pool=2, norm="batch"))),
    ),
    "lenet-300-100": Entry("the classic perceptron for 28x28 digits", (784,), 10, _mlp(300, 100)),
    "lenet-5": Entry(
        "the classic small convolutional network for 28x28 digits, with ReLU and max pools",
        (1, 28, 28),
        10,
        _cnn((Conv(6, 5, 2, 2), Conv(16, 5, 0, 2)), 120, 84),
    ),
    "har-cnn": Entry(
        "two convolutions over time for windows of sensors (MotionSense, UCI HAR): 78 thousand weights",
        (9, 128),
        6,
        _cnn((Conv(32, 5, 2, 4), Conv(64, 5, 2, 4)), 128),
    ),
    "har-cnn-wide": Entry(
        "the same with a wide layer behind, of which most widths do not fit where all do: 541 thousand weights",
        (9, 128),
        6,
        _cnn((Conv(32, 5, 2, 4), Conv(64, 5, 2, 4)), 1024),
    ),
    "conv-2": Entry("PruneFL's Conv-2 for FEMNIST: 6.6 million weights", (1, 28, 28), 62, _cnn(_FIVE, 2048)),
    "vgg-11": Entry(
        "PruneFL's VGG-11 for 32x32 pictures, without norms, layers of 512 behind: 9.8 million weights",
        (3, 32, 32),
        10,
        _cnn(_ELEVEN, 512, 512),
    ),
    "alexnet": Entry(
        "FedDIP's AlexNet for 32x32 pictures, with 3x3 kernels and without dropout: 23.3 million weights",
        (3, 32, 32),
        10,
        _cnn(_ALEX, 4096, 4096),
    ),
    "resnet-18": Entry(
        "ResNet-18 for 32x32 pictures, with group norm: 11.2 million weights",
        (3, 32, 32),
        10,
        _resnet((64, 2), (128, 2), (256, 2), (512, 2)),
    ),
    "mobilenet-v3-small": Entry(
        "MobileNetV3-Small for CelebA's 84x84 faces, with group norm: 1.5 million weights",
        (3, 84, 84),
        2,
        _mobilenet(_SMALL, 16, 576, 1024),
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

    ``NAME@FRACTION``, such as ``lenet-5@0.4``, is a narrower model of its own: that fraction of the channels of every layer.

    Raises:
        ConfigError: It is neither a known name nor a file with a model that can be run, or there is no such fraction.
    """
    name, at, fraction = str(model).partition("@")
    if isinstance(model, str) and name in MODELS:
        try:
            return narrow(by_name(name), _fraction(model, fraction)) if at else by_name(name)
        except SpecError as error:
            raise ConfigError(f"model {model!r} is too narrow: {error}") from error
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


def whole(model: str) -> str:
    """Give the name of the model that another one is a narrower one of; its own where it is none."""
    name = model.partition("@")[0]
    return name if name in MODELS else model


def narrow(spec: ModelSpec, fraction: float) -> ModelSpec:
    """Give a model of its own with a fraction of the channels of every prunable group, rounded up as `nestfl` rounds.

    Its weights are as many as those of that width; it begins from other ones, which are drawn for its own layers' inputs.

    Raises:
        SpecError: It cannot be run, or a convolution in groups that are cut would have one of them left.
    """
    groups = [replace(g, size=max(1, ceil(fraction * g.size - 1e-9))) if g.prunable else g for g in spec.groups]
    before, after = ({g.name: g.size for g in found} for found in (spec.groups, groups))
    tensors = []
    for tensor in spec.tensors:
        inputs = [prod(tensor_shape(tensor, sizes)[1:]) for sizes in (before, after)]
        tensors.append(replace(tensor, fan_in=max(1, tensor.fan_in * inputs[1] // inputs[0])))
    first = {t.name: t.axes[0].group for t in spec.tensors}
    nodes = []
    for node in spec.nodes:
        group = first.get(node.params.get("weight", ""), "")
        nodes.append(regrouped(node, before.get(group, 1), after.get(group, 1)))
    name = f"{spec.name}-{fraction:g}"
    return check(replace(spec, name=name, groups=tuple(groups), tensors=tuple(tensors), nodes=tuple(nodes)))


def _fraction(model: str, text: str) -> float:
    try:
        fraction = float(text)
    except ValueError:
        fraction = 0.0
    if not 0.0 < fraction <= 1.0:
        raise ConfigError(f"model {model!r}: behind the @ write a fraction above 0 and at most 1, such as @0.4")
    return fraction
