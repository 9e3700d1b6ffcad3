"""Orders and jobs for a worker, with their files."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from edge_runtime import engines
from edge_runtime.data import Dataset
from wire import spec as specs
from wire import structure as cutting
from wire.job import Job
from wire.maskfile import outline_of_model, write_masks
from wire.messages import BlobRef, Order, Recipe
from wire.spec import Structure
from wire.tensor import Coding, write_blob


def job(folder, spec, arrays, structures, recipe=None, verb="train", **limits):
    """Write spec and shells into `folder` and give a job; `arrays` are whole, in wire order; results go to folder/out.

    `limits` are the round's ``number``, the ``budget`` in bytes, the ``micro`` batch, and in ``norms`` by capacity the running
    statistics that a width has of its own.
    """
    folder, out = Path(folder), Path(folder) / "out"
    out.mkdir(parents=True, exist_ok=True)
    text = specs.encode(spec)
    (folder / "spec").write_bytes(text)
    number = limits.get("number", 1)
    widest = max(structures, key=lambda s: s.capacity)
    shells, paths = [], []
    for capacity in range(widest.capacity + 1):
        parts = cutting.shell(spec, arrays, widest.narrowed(capacity))
        parts |= {f"n/{name}": array for name, array in limits.get("norms", {}).get(capacity, {}).items()}
        if parts:
            paths.append(str(folder / f"shell-{capacity}"))
            shells.append(write_blob(Path(paths[-1]), "shell", parts, meta={"capacity": capacity}))
    order = Order(
        id=f"{number:016x}",
        run=RUN,
        round=number,
        device="d",
        verb=verb,
        spec=BlobRef(hashlib.sha256(text).hexdigest(), len(text)),
        shells=tuple(shells),
        structures=tuple(structures),
        recipe=recipe or Recipe(batch=8, clip=1.0),
    )
    ours = engines.available()
    only = ours[0] if len(ours) == 1 else ""
    limit, micro = limits.get("budget", 0), limits.get("micro", 0)
    return Job(order, str(folder / "spec"), tuple(paths), str(out), "", limit, micro, 1, engine=only)


def masked_job(folder, spec, arrays, masks, recipe=None, verb="train", *, width=None, **limits):
    """Write what an order with masks needs into `folder` and give its job; `limits` as in `job`.

    Arrays and masks are whole, or compact of a width.
    """
    width = WHOLE if width is None else width
    alone = Structure(0, {group: (counts[width.capacity],) for group, counts in width.widths.items()})
    plain = job(folder, spec, arrays, [alone], recipe, verb, **limits)
    lines = {n: array[masks[n]] if n in masks else array for n, array in arrays.items()}
    shell, file = Path(folder) / "shell", Path(folder) / "masks"
    coding = Coding(outline=outline_of_model(spec, masks, width))
    order = dataclasses.replace(
        plain.order,
        shells=(write_blob(shell, "shell", lines, meta={"capacity": 0}, coding=coding),),
        structures=(cutting.masked(masks, width),),
        masks=write_masks(file, masks),
    )
    return dataclasses.replace(plain, order=order, shells=(str(shell),), masks=str(file))


def some_masks(spec, density=0.3, seed=3, names=None, width=None):
    """Draw masks of weights, of all that can be masked or of those with these names; whole, or of a width."""
    rng = np.random.default_rng(seed)
    shapes = specs.tensor_shapes(spec, width or WHOLE)
    return {n: rng.random(shape) < density for n, shape in shapes.items() if n in (names or shapes) and len(shape) > 1}


def dataset(spec, train=40, test=16, seed=0, shape=None):
    """Classes that can be told apart: each has a mean of its own."""
    rng = np.random.default_rng(seed)
    shape = shape or spec.input_shape
    means = rng.standard_normal((spec.classes, *shape)).astype(np.float32)

    def part(count):
        y = rng.integers(0, spec.classes, count).astype(np.int64)
        x = means[y] + 0.3 * rng.standard_normal((count, *shape)).astype(np.float32)
        return x.astype(np.float32), y

    return Dataset(
        train=part(train), validation=part(0), test=part(test), classes=spec.classes, input_shape=shape, name="made-up"
    )


WHOLE = Structure()
RUN = "ab" * 8
