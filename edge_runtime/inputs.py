"""What an order is done with: the model's file, read once, and the device's samples in the shape that the model wants."""

from __future__ import annotations

import functools
from math import prod
from pathlib import Path
from typing import Literal

from edge_runtime.data import Dataset
from edge_runtime.engines.arrays import Floats, Labels
from wire.errors import DataError
from wire.spec import ModelSpec, decode


def read_spec(path: str) -> ModelSpec:
    """Read and check a model file; one that has not changed is not read again.

    Raises:
        PeerError, SpecError: It is no model that can be run.
    """
    status = Path(path).stat()
    return _decoded(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=4)
def _decoded(path: str, changed: int, size: int) -> ModelSpec:
    del changed, size  # they tell one content of the path from another
    return decode(Path(path).read_bytes())


def part_of(spec: ModelSpec, data: Dataset, name: Literal["train", "test"]) -> tuple[Floats, Labels]:
    """Give one part of the device's data in the shape that the model wants.

    Raises:
        DataError: It is empty, or its samples or classes do not fit the model. Or it is to be trained on, lacks classes, and
            numbers those that it has by itself: another device would number them otherwise.
    """
    x, y = data.train if name == "train" else data.test
    if not len(x):
        raise DataError(f"{data.name}: the {name} part is empty")
    if prod(data.input_shape) != prod(spec.input_shape):
        raise DataError(f"{data.name}: a sample is {data.input_shape}, model {spec.name} wants {spec.input_shape}")
    if data.classes > spec.classes:
        raise DataError(f"{data.name} has {data.classes} classes, model {spec.name} tells {spec.classes} apart")
    if name == "train" and data.guessed and data.classes < spec.classes:
        raise DataError(
            f"{data.name} has {data.classes} of the {spec.classes} classes that model {spec.name} tells apart, and their"
            " names do not say which: write [data] labels, the names of all classes, in the same order on every device"
            " (of pictures: or make an empty folder for each class that is missing)"
        )
    return x.reshape(len(x), *spec.input_shape), y
