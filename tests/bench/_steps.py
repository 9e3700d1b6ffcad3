"""Whole training steps of a model, timed, or run in a fresh process for its memory: what `tests.bench.step` starts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench import _noise
from wire import zoo
from wire.spec import ModelSpec, Structure, parameter_count, tensor_shapes

DENSITIES = (1.0, 0.3, 0.1, 0.05, 0.01)
_ALL = (1.0, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01)
MODELS = {
    "lenet-300-100": (_ALL, 9, 0.005),
    "conv-2": (_ALL, 7, 0.02),
    "vgg-11": (DENSITIES, 5, 0.0),
    "resnet-18": (DENSITIES, 3, 0.0),
}
"""Model to its densities, rounds, and least seconds of a turn."""

_PLAIN, _ENGINE, _MASKED = "dense, torch.nn", "dense, engine", "weights times masks, 0.1"
_ERROR = 1e-2
"""Of a tensor's first movement, as a norm relative to its own: a sum that is rounded otherwise may turn a ReLU over."""


def measure(model: str) -> dict[str, Any]:
    """Time all candidates of a model.

    Returns:
        ``weights`` and ``layers`` of the model; ``seconds`` of each candidate; and by density how many times faster ours is
        than ``dense`` and than ``masked``, how many layers are held ``sparse``, the ``ways`` of all, and what is ``held``.
    """
    import torch

    from edge_runtime.engines import open_engine
    from tests.bench import _models
    from tests.bench._paired import faster, keep_memory, take_turns

    keep_memory()
    make = open_engine("torch", threads=1)
    torch.set_num_threads(1)
    spec = zoo.by_name(model)
    arrays, (x, y), masks = _noise.weights(spec), _noise.batch(spec), _noise.masks(spec, 0.1)
    densities, rounds, least = MODELS[model]
    calls = {
        _PLAIN: _models.training(_models.Plain(spec, arrays), x, y),
        _ENGINE: _engine(make, spec, arrays, None)[1],
        _MASKED: _models.training(_models.Plain(spec, arrays, masks), x, y),
    }
    engines = {}
    for density in densities:
        engine, step = _engine(make, spec, arrays, _noise.masks(spec, density))
        engines[f"{density:g}"], calls[f"density {density:g}"] = engine, step
    times = take_turns(calls, rounds, least)
    dense = _PLAIN if faster(times, _PLAIN, _ENGINE) > 1.0 else _ENGINE
    by_density = {
        "dense": {d: faster(times, f"density {d}", dense) for d in engines},
        "masked": {d: faster(times, f"density {d}", _MASKED) for d in engines},
        "sparse": {d: sum(way != "dense" for way in engine.ways.values()) for d, engine in engines.items()},
        "ways": {d: dict(engine.ways) for d, engine in engines.items()},
        "held": {d: _held(engine) for d, engine in engines.items()},
    }
    seconds = {name: float(np.median(took)) for name, took in times.items()}
    weights = parameter_count(spec, Structure())
    return {"weights": weights, "layers": len(masks), "seconds": seconds, **by_density}


def _engine(
    make: Callable[[], Any], spec: ModelSpec, arrays: Mapping[str, Any], masks: Mapping[str, Any] | None
) -> tuple[Any, Callable[[], float]]:
    """Load an engine and give it with one fused training step; with masks, the first one is checked."""
    from edge_runtime.engines import Choice, Update
    from tests.bench._models import RATE

    engine = make()
    step = partial(engine.forward_backward, *_noise.batch(spec), update=Update(RATE))
    if masks is None:
        engine.load(spec, Structure(), arrays)
    else:
        engine.load(spec, Structure(), arrays, masks, Choice(batch=_noise.BATCH))
        _compare(spec, arrays, masks, engine, step)
    return engine, step


def _held(engine: Any) -> dict[str, int]:
    from edge_runtime.engines import Update

    fused = engine.bytes_of_weights(Update(0.1))
    engine.grads  # noqa: B018 - makes them
    velocity = {name: np.zeros_like(array) for name, array in engine.params.items()}
    momentum = Update(0.1, momentum=0.9, velocity=velocity)
    return {
        "fused": fused,
        "whole": engine.bytes_of_weights(Update(0.1)),
        "momentum": engine.bytes_of_weights(momentum),
    }


def _compare(spec: ModelSpec, arrays: Mapping[str, Any], masks: Mapping[str, Any], engine: Any, step: Any) -> None:
    """Hold the engine's first step against weights times masks in torch."""
    from tests.bench import _models

    plain = _models.Plain(spec, arrays, masks)
    expected = _models.training(plain, *_noise.batch(spec))()
    loss = step()
    assert abs(loss - expected) <= 1e-4 * max(1.0, abs(expected)), (spec.name, loss, expected)
    for name, start in arrays.items():
        kept = masks.get(name, np.ones(start.shape, np.bool_))
        right = (plain.weight(name) - start)[kept].astype(np.float64)
        moved = np.ravel(engine.read(name)).astype(np.float64) - start[kept]
        # A weight is rounded when it has moved.
        slack = _ERROR * np.linalg.norm(right) + 2**-23 * np.linalg.norm(start[kept])
        assert np.linalg.norm(moved - right) <= slack, (spec.name, name)


def peak(model: str, kind: str, density: float, ways: Mapping[str, str]) -> int:
    """Give the bytes by which ten steps of a model raise the high-water mark of this process, after one of LeNet."""
    lenet, spec = zoo.by_name("lenet-300-100"), zoo.by_name(model)
    _trainer(kind, density, {})(lenet, 1)
    before = _high_water()
    _trainer(kind, density, ways)(spec, 10)
    return _high_water() - before


def _trainer(kind: str, density: float, ways: Mapping[str, str]) -> Callable[[ModelSpec, int], None]:
    """Give what trains a model for some steps; `kind` is ``plain``, ``masked``, ``engine`` (dense) or ``ours``."""
    if kind in ("plain", "masked"):
        import torch

        from tests.bench import _models

        torch.set_num_threads(1)

        def plain(spec: ModelSpec, steps: int) -> None:
            masks = _noise.masks(spec, density) if kind == "masked" else None
            shapes = tensor_shapes(spec, Structure())
            arrays = {name: np.broadcast_to(np.float32(0.01), shape) for name, shape in shapes.items()}
            step = _models.training(_models.Plain(spec, arrays, masks), *_noise.batch(spec))
            for _ in range(steps):
                step()

        return plain
    from edge_runtime.engines import Choice, Update, open_engine

    make = open_engine("torch", threads=1)

    def ours(spec: ModelSpec, steps: int) -> None:
        engine = make()
        if kind == "engine":
            engine.load(spec, Structure())
        else:
            masks = _noise.masks(spec, density)
            known = {name: way for name, way in ways.items() if name in masks}  # as the timing chose for this model
            engine.load(spec, Structure(), None, masks, Choice(batch=_noise.BATCH, ways={"": "sparse", **known}))
        for array in engine.params.values():
            array.fill(0.01)
        x, y = _noise.batch(spec)
        for _ in range(steps):
            engine.forward_backward(x, y, update=Update(0.01))

    return ours


def _high_water() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(json.dumps(measure(sys.argv[1])))
    else:
        print(peak(sys.argv[1], sys.argv[2], float(sys.argv[3]), json.loads(sys.argv[4])))
