"""Models by name, as data. A new one: a line here, and a builder in `wire.builders` if none fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from wire.builders import Bottleneck, Conv, Shape, cnn, mlp, mobilenet, resnet
from wire.errors import ConfigError, PeerError, SpecError
from wire.spec import SPEC_BYTES, ModelSpec, decode

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
