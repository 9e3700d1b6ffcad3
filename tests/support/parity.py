"""Stories that every engine is told, in one precision or the other: what it says must be what double precision says.

Who calculates in float32 rounds. What it finds may be `exact.NEAR` from what is exact; where it is further, torch's own
float32 is asked how far it is from its own float64 on the very same story, and `LIKE` times that is allowed. Tests count how
often this was needed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from edge_runtime.engines import Choice, Update, open_engine
from tests.support.engines import IN_DOUBLE, NAMES, in_double
from tests.support.exact import NEAR, NEAR_IN_DOUBLE, Exact, apart
from wire.errors import Unsupported
from wire.masked import maskable
from wire.prices import lacks
from wire.spec import ModelSpec, Structure, statistics, tensor_shapes

WHOLE = Structure()
LIKE = 10.0
SEEDS = (3, 4)
HOWS = (*((name, "single") for name in NAMES), *((name, "double") for name in IN_DOUBLE))


@dataclass(frozen=True)
class Story:
    """What happens to a model.

    Attributes:
        spec: The model.
        arrays: Its weights, whole.
        x, y: One batch.
        loss: As in recipes.
        masks: What is kept.
        way: How masked weights are held, in single precision.
        update: Rate, momentum, decay and pull; None to look at the gradients of one pass instead.
        steps: Fused steps.
        micro: Samples that go through at once; not with an update.
        narrow: A narrower width that has a pass of its own, with half the weight; not with an update.
        cuts: Where passes are cut into segments.
    """

    spec: ModelSpec
    arrays: dict
    x: np.ndarray
    y: np.ndarray
    loss: str = "cross_entropy"
    masks: dict = field(default_factory=dict)
    way: str = "sparse"
    update: tuple | None = None
    steps: int = 1
    micro: int = 0
    narrow: Structure | None = None
    cuts: tuple = ()


def told(engine, story, way):
    """Tell an engine a story and give all that it leaves behind, by name."""
    spec, found = story.spec, {}
    engine.load(spec, WHOLE, story.arrays, story.masks, Choice(ways={"": way}))
    engine.recompute(story.cuts)
    engine.seed(*SEEDS)
    update = None
    if story.update is not None:
        velocity = {name: np.zeros_like(array) for name, array in engine.params.items()}
        anchor = {name: array / 2 for name, array in engine.params.items()}
        update = Update(*story.update, velocity=velocity, anchor=anchor)
    for step in range(story.steps):
        for rows, share in parts(story):
            found[f"loss {step} {rows.start}"] = engine.forward_backward(
                story.x[rows], story.y[rows], scale=share, loss=story.loss, update=update
            )
    found["logits"] = engine.logits.copy()
    if story.narrow is not None:
        narrow = engine.narrow(story.narrow)
        found["narrow loss"] = narrow.forward_backward(story.x, story.y, scale=0.5, loss=story.loss)
        found["narrow logits"] = narrow.logits.copy()
        found["narrow outputs"] = narrow.forward(story.x)
    found |= {f"weight {name}": engine.read(name) for name in engine.params}
    found["outputs"] = engine.forward(story.x)
    if update is None:  # last: they are read by way of the weights
        found |= {f"grad {name}": in_c_order(engine, name, grad) for name, grad in engine.grads.items()}
    return found


def exactly(story, kind=torch.float64):
    """Give what a story leaves behind in torch's autograd."""
    exact, found = Exact(story.spec, WHOLE, story.arrays, story.masks, kind), {}
    exact.seed(*SEEDS)
    update = None
    if story.update is not None:
        update = Update(*story.update, anchor={name: array / np.float32(2) for name, array in story.arrays.items()})
    for step in range(story.steps):
        for rows, share in parts(story):
            found[f"loss {step} {rows.start}"] = exact.forward_backward(
                story.x[rows], story.y[rows], scale=share, loss=story.loss
            )
        if update is not None:
            exact.move(update)
    found["logits"] = exact.logits
    if story.narrow is not None:
        found["narrow loss"] = exact.forward_backward(
            story.x, story.y, scale=0.5, loss=story.loss, structure=story.narrow
        )
        found["narrow logits"] = exact.logits
        found["narrow outputs"] = exact.forward(story.x, story.narrow)
    found |= {f"weight {name}": exact.read(name) for name in exact.params}
    found["outputs"] = exact.forward(story.x)
    if update is None:
        found |= {f"grad {name}": grad.ravel() for name, grad in exact.grads().items()}
    return found


def parts(story):
    """Give the rows of each micro-batch, and its share."""
    count = len(story.x)
    size = story.micro or count
    for start in range(0, count, size):
        rows = slice(start, min(count, start + size))
        yield rows, 1.0 if story.loss == "sum" else (rows.stop - start) / count


def in_c_order(engine, name, array):
    """Bring an array of the engine's own form into the order in which weights are read."""
    kept = engine.params[name].copy()
    engine.params[name][...] = array
    values = engine.read(name)
    engine.params[name][...] = kept
    return values


def check(story, needed: Counter | None = None, hows=HOWS):
    """Tell every engine a story, and hold what it leaves behind against what is exact; or it says which op it lacks."""
    exact, own = exactly(story), None
    for name, precision in hows:
        if missing := lacks(name, story.spec):
            with pytest.raises(Unsupported, match=missing[0]):
                told(open_engine(name)(), story, story.way)
            continue
        if precision == "double":
            gap, what = apart(told(in_double(name)(), story, "dense"), exact)
            assert gap <= NEAR_IN_DOUBLE, f"{name} in double precision: {what} is {gap:.1e} apart"
            continue
        gap, what = apart(told(open_engine(name)(), story, story.way), exact)
        if gap > NEAR:
            if own is None:
                own, _ = apart(exactly(story, torch.float32), exact)
            assert gap <= LIKE * own, f"{name}: {what} is {gap:.1e} apart, torch's own float32 {own:.1e}"
            if needed is not None:
                needed[name] += 1


def masks_of(spec, density, seed=5):
    """Draw masks of all that can be masked; at least one weight of each is kept."""
    rng, shapes, found = np.random.default_rng(seed), tensor_shapes(spec, WHOLE), {}
    for name in maskable(spec):
        mask = rng.random(shapes[name]) < density
        mask.flat[rng.integers(mask.size)] = True
        found[name] = mask
    return found


def tame(spec, arrays):
    """Give running variances that a norm can divide by."""
    still = statistics(spec)
    return {name: np.abs(array) + np.float32(0.5) if name in still else array for name, array in arrays.items()}
