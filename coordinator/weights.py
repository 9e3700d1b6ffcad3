"""Weights that a run starts from instead of chance: those of a torch module, or of an earlier run, as safetensors.

`edge-runtime export-spec --weights` and `coordinator export` write such files. They are data: names, shapes and numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wire import tensor
from wire.errors import ConfigError, Malformed
from wire.spec import ModelSpec, Structure, statistics, tensor_shapes
from wire.spool import Spool

KIND = "weights"
_SHOWN = 3


def started(spool: Spool, digest: str) -> dict[str, NDArray[np.float32]]:
    """Read such weights from a blob of `KIND` in the spool.

    Raises:
        Malformed: It is something else.
    """
    blob = tensor.open_blob(spool.path(digest))
    if blob.kind != KIND:
        raise Malformed(f"expected weights, got a {blob.kind!r}")
    return {name: np.array(blob.tensor(name), np.float32) for name in blob.names}


def read(file: Path, spec: ModelSpec) -> dict[str, NDArray[np.float32]]:
    """Read a model's weights from safetensors.

    Args:
        file: With every tensor of the spec by its name; float64, float32 or float16.
        spec: The model.

    Raises:
        ConfigError: The file cannot be read, a tensor is missing, too many, of another shape, or not a finite number.

    Memory: the file and its values as float32.
    """
    found, shapes = _tensors(file), tensor_shapes(spec, Structure())
    for kind, names in (("lacks", shapes.keys() - found.keys()), ("has, beside it,", found.keys() - shapes.keys())):
        if names:
            some = ", ".join(sorted(names)[:_SHOWN]) + (" ..." if len(names) > _SHOWN else "")
            raise ConfigError(
                f"{file}: model {spec.name!r} has other tensors: the file {kind} {some}; write both with one"
                " `edge-runtime export-spec --out SPEC --weights FILE`, and start with --model SPEC"
            )
    weights = {}
    for name, shape in shapes.items():
        if found[name].shape != shape:
            raise ConfigError(f"{file}: {name} is {found[name].shape}; model {spec.name!r} has {shape}")
        if found[name].dtype.kind != "f":
            raise ConfigError(f"{file}: {name} is {found[name].dtype}; write float64, float32 or float16")
        with np.errstate(over="ignore"):
            weights[name] = np.ascontiguousarray(found[name], np.float32)
        if not np.isfinite(weights[name]).all():
            raise ConfigError(f"{file}: {name} has values that are no finite float32 numbers")
    for node in spec.nodes:
        name = node.params.get("variance", "")
        if name in statistics(spec) and (weights[name] < 0).any():
            raise ConfigError(f"{file}: {name} has negative variances")
    return weights


def _tensors(file: Path) -> dict[str, NDArray[Any]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(file))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror or error}") from error
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{file}: not a safetensors file of float64, float32 or float16 tensors ({error}); "
            "`edge-runtime export-spec --weights FILE` writes one"
        ) from error
