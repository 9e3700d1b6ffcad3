"""A device's data: one file per source, one registry line each, and the part of every set that training never sees.

This module itself is light: the agent reads its configuration with `Source` and never loads a sample. Readers are
named by module and imported when `load` is called, because each of them needs numpy.
"""

from __future__ import annotations

import importlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple, TypeAlias, cast

from edge_runtime.data.resolve import detect, resolve
from wire.errors import ConfigError, DataError
from wire.schema import Amount, Fraction, Limit, Name, Natural, Positive

if TYPE_CHECKING:
    import numpy as np

    Samples: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
    Labels: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


class Reader(NamedTuple):
    """One registry line: the module whose ``read(path, source)`` reads this kind of data, and what it is for."""

    module: str
    about: str
    needs_path: bool = True


SOURCES = {
    "digits": Reader("edge_runtime.data.digits", "1,797 handwritten digits of 8x8 pixels, in the package", False),
    "npz": Reader("edge_runtime.data.npz", "a NumPy file with arrays x and y (and x_test, y_test)"),
    "images": Reader("edge_runtime.data.images", "a folder with one sub-folder of pictures per class"),
    "csv": Reader("edge_runtime.data.csv", "a table: one row per sample, one column is the class"),
    "idx": Reader("edge_runtime.data.idx", "a folder of IDX files, as MNIST comes"),
    "recordings": Reader(
        "edge_runtime.data.recordings", "a NumPy file of sensor recordings, as MotionSense is prepared"
    ),
}
"""Every kind of source by name. Any other name is looked up as a folder or file, see `edge_runtime.data.resolve`."""


@dataclass(frozen=True, slots=True)
class Source:
    """Which data a device has, and which part of them is kept from training.

    Attributes:
        source: A kind of `SOURCES`, or the name of a data set that is looked up.
        path: The file or folder; empty for `digits` and for names that are looked up.
        validation: Share that is kept for choosing settings.
        test: Share that is kept for measuring. A set that brings its own test part keeps that one, and this share then
            means nothing, except that 1.0 leaves nothing to train on.
        seed: Decides which samples are kept. The same seed always keeps the same ones.
        shape: Shape of one sample; empty for the shape that the data have. Pictures are brought to it: (channels,
            height, width), 1 channel for grey and 3 for colour.
        label: Column of a table that holds the class: a name, or a number from 0; empty for the last column.
        labels: Names of all classes, in the order that every device uses; empty when classes are numbers, or to take
            the names that are found, sorted, which is only right when every device has samples of every class.
        scale: Divide values by this; 0 for the data's own range (255 for bytes, else 1).
        bytes_max: More float32 bytes than this are refused.
    """

    source: Name = "digits"
    path: Annotated[str, Limit(0, 4096)] = ""
    validation: Fraction = 0.1
    test: Fraction = 0.2
    seed: Natural = 0
    shape: Annotated[tuple[Annotated[int, Limit(1, 65536)], ...], Limit(0, 8)] = ()
    label: Annotated[str, Limit(0, 256)] = ""
    labels: Annotated[tuple[Annotated[str, Limit(1, 256)], ...], Limit(0, 65536)] = ()
    scale: Amount = 0.0
    bytes_max: Positive = 2**30

    def __post_init__(self) -> None:
        """Refuse what no set could satisfy.

        Raises:
            ConfigError: The two held-out shares are more than everything, or a class has its name twice.
        """
        if twice := [name for name, count in Counter(self.labels).items() if count > 1]:
            raise ConfigError(f"data.labels names {twice[0]!r} twice: write every class once")
        if self.validation + self.test > 1.0:
            raise ConfigError(
                f"data.validation {self.validation:g} and data.test {self.test:g} are more than everything: "
                "write two shares whose sum is at most 1"
            )


@dataclass(frozen=True, slots=True)
class Dataset:
    """Samples in three parts that never overlap.

    Attributes:
        train: (x float32 [n, *input_shape], y int64 [n]).
        validation: The same, for choosing settings.
        test: The same, for measuring.
        classes: Number of classes; every y is in 0..classes-1.
        input_shape: Shape of one sample.
        name: What to call it in messages.
        labels: Names of the classes; empty when they are numbers only.
        guessed: Whether classes are numbered by the names that happen to be here, since nobody said which there are.
        ids: Who made each sample of `train` (a writer, a person), int64 [n]; None when the data do not say.
    """

    train: tuple[Samples, Labels]
    validation: tuple[Samples, Labels]
    test: tuple[Samples, Labels]
    classes: int
    input_shape: tuple[int, ...]
    name: str
    labels: tuple[str, ...] = ()
    guessed: bool = False
    ids: Labels | None = None


def parse(text: str, *, validation: float = 0.1, test: float = 0.2, seed: int = 0) -> Source:
    """Read ``NAME`` or ``NAME=PATH`` as it stands on a command line.

    Raises:
        ConfigError: The shares are more than everything.
    """
    name, _, path = text.partition("=")
    return Source(name, path, validation=validation, test=test, seed=seed)


def load(source: Source) -> Dataset:
    """Read a device's data. Cost: every sample once, and two copies of them for a moment.

    Raises:
        DataError: It is not there, not readable, too large, or not what it should be; the text says what to do.
    """
    reader = SOURCES.get(source.source)
    if reader is None:
        path = resolve(source.source, source.path)
        reader = SOURCES[detect(path)]
    elif reader.needs_path:
        if not source.path:
            raise DataError(f"data source {source.source} needs a path: write path = ... or {source.source}=PATH")
        path = Path(source.path).expanduser()
        if not path.exists():
            raise DataError(f"{path}: there is no such file or folder (looked from {Path.cwd()})")
    else:
        if source.path:
            raise DataError(
                f"data source {source.source} is in the package: leave its path out, or use npz={source.path}"
            )
        path = Path(__file__).parent
    raw = importlib.import_module(reader.module).read(path, source)
    return cast("Dataset", importlib.import_module("edge_runtime.data.parts").divide(raw, source))
