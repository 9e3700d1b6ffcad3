"""Every engine against torch's autograd in double precision: random graphs, and the models of the zoo."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from coordinator.blocks.initial import initial_weights
from edge_runtime.models.lower import lowered
from edge_runtime.models.trace import calls_of
from tests.support.engines import NAMES
from tests.support.masked_module import random_widths
from tests.support.parity import HOWS, Story, check, masks_of, tame
from tests.support.random_models import drawn
from wire import memory, zoo
from wire.segments import places

LARGE = ("conv-2", "vgg-11", "alexnet", "resnet-18", "mobilenet-v3-small")
SMALL = (
    *("linear", "digits-mlp", "digits-cnn", "digits-cnn-bn", "lenet-300-100", "lenet-5", "har-cnn"),
    "har-cnn-wide",
)
SINGLE, NATIVE = HOWS[: len(NAMES)], HOWS[1:]
MANY, LOTS = 220, 5
LOSSES, WAYS = ("cross_entropy", "binary_cross_entropy"), ("sparse", "dense")
UPDATES = ((0.05, 0.0, 0.0, 0.0), (0.05, 0.9, 0.0, 0.0), (0.05, 0.0, 0.1, 0.0), (0.05, 0.5, 0.01, 0.3))
DENSITIES = (0.5, 0.1, 0.01)


def story_of(seed):
    """Draw a model and a batch."""
    module, shape, x, y = drawn(seed)
    made = lowered(calls_of(module, shape), "drawn")
    return Story(made.spec, tame(made.spec, made.arrays), x, y)


def stories_of(seed):
    """Give what is told of one drawn model: a pass with a narrower width, and one of three: segments, masks, micro-batches."""
    plain = story_of(seed)
    spec, update = plain.spec, UPDATES[seed % len(UPDATES)]
    rng, density = np.random.default_rng(seed), DENSITIES[seed // 5 % 3]
    yield replace(plain, narrow=random_widths(spec, rng, 2)[0].structure, loss=LOSSES[seed % 2])
    masks = masks_of(spec, density, seed)
    if seed % 3 == 0:
        yield replace(plain, steps=3, update=update, cuts=places(spec.nodes)[seed % 2 :: 2])
    elif seed % 3 == 1:
        yield replace(plain, steps=2, update=update, masks=masks)
    else:
        yield replace(plain, micro=4, masks=masks, way=WAYS[seed % 2])


@pytest.mark.parametrize("lot", range(LOTS))
def test_random_graphs(lot):
    needed, told = Counter(), 0
    for seed in range(lot, MANY, LOTS):
        one, other = stories_of(seed)
        check(one, needed, HOWS if seed % 4 == 0 else NATIVE)
        check(other, needed, SINGLE if seed % 4 == 0 else SINGLE[1:])
        told += 2
    assert all(count <= 0.25 * told for count in needed.values()), "rounding is an excuse for few"


def of_zoo(name, count=2):
    """Give a model's story with the weights that a federation begins with."""
    spec = zoo.load(name)
    rng = np.random.default_rng(4)
    x = rng.standard_normal((count, *spec.input_shape)).astype(np.float32)
    return Story(spec, initial_weights(spec, 3), x, rng.integers(0, spec.classes, count))


def test_the_zoo_has_no_other_models():
    assert {*SMALL, *LARGE} == set(zoo.MODELS)


@pytest.mark.parametrize("name", LARGE)
def test_large_models_of_the_zoo_whole(name):
    check(of_zoo(name), hows=SINGLE)


@pytest.mark.parametrize("name", [*SMALL, *(f"{name}@0.1" for name in LARGE)])
def test_models_of_the_zoo(name):
    plain = of_zoo(name, 4)
    cuts = places(plain.spec.nodes)[::3]
    check(replace(plain, narrow=memory.uniform(plain.spec, 0.5)))
    check(replace(plain, steps=2, update=UPDATES[3], cuts=cuts))
    for density, way in zip(DENSITIES, ("sparse", "dense", "sparse"), strict=True):
        check(replace(plain, micro=3, masks=masks_of(plain.spec, density), way=way, loss="binary_cross_entropy"))
