"""Engines side by side: what `tests.bench.engine` starts in processes of their own.

``speeds MODEL`` times one training step of every engine and density in turns; ``peak ENGINE MODEL DENSITY WAYS FOLDER`` trains
ten steps in a fresh process and gives its high-water mark; ``write FOLDER MODEL DENSITY`` writes the masks and weights that it
reads; ``start FOLDER MODEL DENSITY WAYS`` gives CPU seconds from the process's start to the end of its first step.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench import _noise
from wire import zoo
from wire.maskfile import Held, read_masks, write_masks
from wire.masks import packed
from wire.spec import ModelSpec, Structure, tensor_shapes
from wire.structure import masks_digest

DENSITIES = (1.0, 0.1, 0.05, 0.01)
MODELS = {"lenet-300-100": (15, 0.01), "lenet-5": (9, 0.01), "conv-2": (9, 0.05), "norms": (7, 0.02)}
"""Model to rounds, and least seconds of a turn."""

RATE = 0.01


def model(name: str) -> ModelSpec:
    """Give a model of the zoo; ``norms`` is a small one with norms, all of it dense."""
    return zoo.narrow(zoo.by_name("resnet-18"), 1 / 16) if name == "norms" else zoo.by_name(name)


def speeds(name: str) -> dict[str, Any]:
    """Time all candidates of a model.

    Returns:
        Seconds per step of each candidate in each round, and the ways that the native engine chose by density.
    """
    import torch

    from edge_runtime.engines import open_engine
    from tests.bench import _models
    from tests.bench._paired import keep_memory, take_turns

    keep_memory()
    torch.set_num_threads(1)
    spec, (rounds, least) = model(name), MODELS[name]
    arrays, (x, y) = _noise.weights(spec), _noise.batch(spec)
    calls: dict[str, Callable[[], object]] = {"dense": _models.training(_models.Plain(spec, arrays), x, y)}
    ways: dict[str, Mapping[str, str]] = {}
    changes: dict[str, float] = {}
    for density in DENSITIES if name != "norms" else (1.0,):
        masks = _noise.masks(spec, density) if density < 1 else None
        if masks is not None:
            calls[f"masked {density:g}"] = _models.training(_models.Plain(spec, arrays, masks), x, y)
        for kind in ("native", "torch"):
            engine, step = _engine(open_engine(kind, threads=1), spec, arrays, masks)
            calls[f"{kind} {density:g}"] = step
            ways |= {f"{kind} {density:g}": dict(engine.ways)}
            if masks is not None and kind == "native":
                changes[f"{density:g}"] = _change(open_engine(kind, threads=1), spec, density, engine.ways)
    return {"times": take_turns(calls, rounds, least), "ways": ways, "changes": changes}


def _engine(
    make: Callable[[], Any], spec: ModelSpec, arrays: Mapping[str, Any], masks: Mapping[str, Any] | None
) -> tuple[Any, Callable[[], float]]:
    from edge_runtime.engines import Choice, Update

    engine = make()
    engine.load(spec, Structure(), arrays, masks, Choice(batch=_noise.BATCH))
    return engine, partial(engine.forward_backward, *_noise.batch(spec), update=Update(RATE))


def _change(make: Callable[[], Any], spec: ModelSpec, density: float, ways: Mapping[str, str]) -> float:
    """Give the seconds in which new masks and their values become a model ready to train, its ways known: a median of nine."""
    from edge_runtime.engines import Choice

    engine, took = make(), []
    for seed in range(10):
        rng = np.random.default_rng(seed)  # as many are kept, so that ways keep their names
        masks = {
            name: packed(rng.permuted(mask.ravel()).reshape(mask.shape))
            for name, mask in _noise.masks(spec, density).items()
        }
        values = {name: np.ones(mask.kept, np.float32) for name, mask in masks.items()}
        begin = time.thread_time()
        engine.load(spec, Structure(), None, masks, Choice(_noise.BATCH, dict(ways)))
        for name, line in values.items():
            engine.write(name, line)
        took.append(time.thread_time() - begin)
    return float(np.median(took[1:]))


def write(folder: Path, name: str, density: float) -> None:
    """Write the masks and weights of a model, as an order brings them."""
    from wire.tensor import Coding, write_blob

    spec = model(name)
    masks, arrays = _noise.masks(spec, density), _noise.weights(spec)
    write_masks(folder / "masks", masks)
    (folder / "digest").write_text(masks_digest(masks))
    outline = _held(folder, spec, {name: int(mask.sum()) for name, mask in masks.items()}).outline
    kept = {name: array[masks[name]] if name in masks else array for name, array in arrays.items()}
    write_blob(folder / "shell", "shell", kept, coding=Coding(outline=outline))


def _held(folder: Path, spec: ModelSpec, kept: Mapping[str, int]) -> Held:
    structure = Structure(masks=(folder / "digest").read_text(), kept=kept)
    return read_masks(str(folder / "masks"), spec, structure)


def order(kind: str, folder: Path, name: str, ways: Mapping[str, str]) -> tuple[Any, Callable[[], object]]:
    """Load what was written, as a worker does; give the engine and its step."""
    from edge_runtime.engines import Choice, Update, open_engine
    from edge_runtime.frugal import loading
    from edge_runtime.received import Received

    with loading():
        make = open_engine(kind, threads=1)
    spec, engine = model(name), make()
    kept = json.loads((folder / "kept").read_text())
    held = _held(folder, spec, kept)
    structure = Structure(masks=(folder / "digest").read_text(), kept=kept)
    engine.load(spec, structure, None, held.masks, Choice(_noise.BATCH, {"": "sparse", **ways}))
    for tensor, values in Received(spec, structure, [str(folder / "shell")], held).lines():
        engine.write(tensor, values)
    return engine, partial(engine.forward_backward, *_noise.batch(spec), update=Update(RATE))


def high_water() -> int:
    """Give the most that was resident of this process."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))


def main(words: list[str]) -> None:
    """Do one of the module's four things and print what came of it as JSON."""
    if words[0] == "speeds":
        print(json.dumps(speeds(words[1])))
        return
    folder = Path(words[1])
    if words[0] == "write":
        spec = model(words[2])
        masks = _noise.masks(spec, float(words[3]))
        (folder / "kept").write_text(json.dumps({name: int(mask.sum()) for name, mask in masks.items()}))
        write(folder, words[2], float(words[3]))
        print(json.dumps({"weights": sum(int(mask.sum()) for mask in masks.values())}))
        return
    kind, steps = words[3], 10 if words[0] == "peak" else 1
    engine, step = order(kind, folder, words[2], json.loads(words[4]))
    for _ in range(steps):
        step()
    found: dict[str, float] = {"peak": high_water(), "cpu": time.process_time()}
    if words[0] == "peak":
        found |= _bytes(engine)
    print(json.dumps(found))


def _bytes(engine: Any) -> dict[str, float]:
    """Count what a kept weight takes: as a fused step holds it, without and with momentum, and with gradients that stay."""
    from edge_runtime.engines import Update

    shapes = tensor_shapes(engine.spec, Structure())
    kept = sum(array.size for name, array in engine.params.items() if name in engine.ways)
    beside = 4 * sum(int(np.prod(shapes[name])) for name in shapes if name not in engine.ways)
    velocity = {name: np.zeros_like(array) for name, array in engine.params.items()}
    fused, momentum = engine.bytes_of_weights(), engine.bytes_of_weights(Update(RATE, 0.9, velocity=velocity))
    engine.grads  # noqa: B018 - makes them
    found = {"fused": fused - beside, "momentum": momentum - 2 * beside}
    found["whole"] = engine.bytes_of_weights() - 2 * beside
    return {name: size / kept for name, size in found.items()}


if __name__ == "__main__":
    main(sys.argv[1:])
