"""The native engine owns its memory: an arena as long as the plan says, and nothing of size beside it while a step runs."""

from __future__ import annotations

import dataclasses
import tracemalloc
from math import prod

import numpy as np
import pytest

from coordinator.blocks.initial import initial_weights
from edge_runtime import rules
from edge_runtime.engines import Choice, Update, open_engine
from edge_runtime.worker import perform
from tests.support.models import batch, random_arrays
from tests.support.orders import dataset, masked_job
from tests.support.parity import masks_of
from tests.support.sequences import attended, recurrent, turned
from wire import beside, memory, zoo
from wire.builders import resnet
from wire.job import Done
from wire.masked import Masked
from wire.masks import bits_at, positions
from wire.messages import Recipe
from wire.native.plan import Asked, plan
from wire.segments import places
from wire.spec import Structure, statistics, tensor_shapes
from wire.structure import masked

WHOLE = Structure()
BATCH = 32
SMALL = 88 << 10
"""What a step may make for itself: 64 KiB in which an update is worked out, what there is per channel and class, and Python's
own objects."""

MODELS = {
    "perceptron": zoo.by_name("lenet-300-100"),
    "convolutions": zoo.by_name("lenet-5"),
    "batch norms": zoo.by_name("digits-cnn-bn"),
    "sensors": zoo.by_name("har-cnn"),
    "residuals": resnet("blocks", (3, 16, 16), 4, ((16, 2), (32, 2))),
    "gates": zoo.by_name("mobilenet-v3-small", (3, 32, 32), 3),
    "lstm": recurrent("lstm", 64, 48),
    "gru": recurrent("gru", 64, 48),
    "attention": attended(),
    "turned": turned(64),
}


def step_bytes(engine, x, y, update, **more):
    """Give the bytes that a step makes at once and that it leaves, once it has run before."""
    for _ in range(2):
        engine.forward_backward(x, y, update=update, **more)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        engine.forward_backward(x, y, update=update, **more)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return peak - before, after - before


def arrays_of(engine):
    return sum(array.nbytes for array in engine.params.values())


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize("model", MODELS)
def test_a_step_takes_the_plan_and_nothing_else(model, cut):
    spec = MODELS[model]
    cuts = places(spec.nodes)[::2] if cut else ()
    engine = open_engine("native")()
    engine.load(spec, WHOLE, random_arrays(spec, WHOLE, scale=0.05))
    engine.recompute(cuts)
    x, y = batch(spec, BATCH)
    velocity = {name: np.zeros_like(array) for name, array in engine.params.items()}
    made, left = step_bytes(engine, x, y, Update(1e-4, 0.9, 1e-4, velocity=velocity))
    asked = plan(spec, WHOLE, Asked(BATCH, cuts=cuts))
    assert engine._arena.nbytes == 4 * asked.length
    assert arrays_of(engine) == 4 * sum(prod(shape) for shape in tensor_shapes(spec, WHOLE).values())
    assert made < SMALL, f"{made} bytes beside the arena"
    assert left < 4096
    engine.grads  # noqa: B018 - makes them
    still = statistics(spec)
    grads = sum(4 * prod(shape) for name, shape in tensor_shapes(spec, WHOLE).items() if name not in still)
    assert engine.bytes_of_weights() == arrays_of(engine) + grads
    assert step_bytes(engine, x, y, None)[0] < SMALL


def test_cuts_make_the_arena_shorter():
    spec = MODELS["residuals"]
    lengths = [plan(spec, WHOLE, Asked(BATCH, cuts=cuts)).length for cuts in ((), places(spec.nodes)[::3])]
    assert lengths[1] < 0.8 * lengths[0]


@pytest.mark.parametrize("narrower", [0.3, 0.7])
def test_a_narrower_width_has_room_in_the_same_arena(narrower):
    spec = MODELS["gates"]
    engine = open_engine("native")()
    engine.load(spec, WHOLE, initial_weights(spec, 1))
    structure = memory.uniform(spec, narrower)
    width = engine.narrow(structure)
    x, y = batch(spec, BATCH)
    for one in (engine, width):
        one.forward_backward(x, y)
    made, left = step_bytes(width, x, y, None)
    lengths = [plan(spec, WHOLE, Asked(BATCH)).length, plan(spec, structure, Asked(BATCH, views=True)).length]
    assert engine._arena is width._arena
    assert engine._arena.nbytes == 4 * max(lengths)
    assert made < SMALL
    assert left < 4096


@pytest.mark.parametrize("density", [0.3, 0.05])
@pytest.mark.parametrize("way", ["sparse", "dense"])
def test_with_masks_too(way, density):
    spec = MODELS["convolutions"]
    masks = masks_of(spec, density)
    engine = open_engine("native")()
    engine.load(spec, WHOLE, initial_weights(spec, 1), masks, Choice(ways={"": way}))
    x, y = batch(spec, BATCH)
    made, left = step_bytes(engine, x, y, Update(1e-4))
    kept = Masked({name: int(mask.sum()) for name, mask in masks.items()}, tuple(masks) if way == "dense" else ())
    assert engine._arena.nbytes <= 4 * plan(spec, WHOLE, Asked(BATCH), kept).length
    assert made < SMALL
    assert left < 4096


def importance_order(steps, knobs):
    """Give the extras of a reconfiguration's order on 6 million weights of which 60 000 are there, and its peak."""
    spec = zoo.mlp("wide", (3000,), 10, (2000,))
    weight = bits_at([np.arange(0, 6_000_000, 100)], (2000, 3000))
    masks = {"fc1.weight": weight}
    engine = open_engine("native")()
    engine.load(spec, masked(masks), None, masks, Choice(BATCH, {"": "sparse"}))
    for name in engine.params:
        engine.write(name, np.full(engine.params[name].size, 0.01, np.float32))
    engine.forward_backward(*batch(spec, BATCH), update=Update(1e-3))  # the arena is there
    recipe = Recipe(rule="importance", batch=BATCH, steps=steps, rate=1e-3, knobs={"window": 1.0, "send": 1.0, **knobs})
    task = rules.Task(recipe, engine, *batch(spec, BATCH), 1, BATCH, lambda *_: None, masks)
    tracemalloc.start()
    trained = rules.find("importance").train(task)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    counted = [beside.passed(spec, masked(masks), recipe, BATCH), *beside.told(spec, masked(masks), recipe)]
    return weight, trained.extras["fc1.weight"], peak, counted


@pytest.mark.parametrize("steps", [2, 12])
def test_importance_at_all_positions_makes_nothing_as_large_as_the_weights(steps):
    """In blocks of rows, however many steps count, beside what passed in them."""
    knobs = {"last": steps - 1.0, "top.fc1.weight": 60_000.0}
    weight, told, peak, counted = importance_order(steps, knobs)
    assert len(told.places) == 60_000
    assert np.count_nonzero(np.isin(told.places, positions(weight))) < 6_000, "most are not there yet"
    assert peak - counted[0] < weight.size, f"{peak} bytes; the weights would take {4 * weight.size}"
    assert peak < sum(counted) < 4 * weight.size


@pytest.mark.parametrize(("steps", "last"), [(5, 0.0), (5, 50.0), (60, 0.0)])
def test_importance_of_all_weights_is_counted_where_all_of_it_is_told(steps, last):
    """However many steps were said to count."""
    weight, told, peak, counted = importance_order(steps, {"last": last})
    assert told.places is None
    assert 4 * weight.size < peak < sum(counted) < 6 * weight.size


def test_importance_is_held_once_where_what_passes_is_more_than_the_weights():
    weight, told, peak, counted = importance_order(60, {"top.fc1.weight": 60_000.0})
    assert len(told.places) == 60_000
    assert 4 * weight.size < peak < sum(counted) < 6 * weight.size


@pytest.mark.parametrize("density", [0.01, 0.05])
def test_an_order_with_masks_makes_nothing_of_a_byte_per_weight(tmp_path, density):
    """From the order's files to the reply's, but for what the model itself is: 6 million weights, most of them not there."""
    spec = zoo.mlp("wide", (3000,), 10, (2000,))
    masks = {"fc1.weight": np.random.default_rng(0).random((2000, 3000)) < density}
    data, recipe = dataset(spec, BATCH, 8), Recipe(batch=BATCH, steps=2, rate=1e-3)
    tasks = [masked_job(tmp_path / str(i), spec, initial_weights(spec, 1), masks, recipe, number=i) for i in (1, 2)]
    perform(dataclasses.replace(tasks[0], engine="native"), data, pinned=True)  # modules are loaded
    tracemalloc.start()
    done = perform(dataclasses.replace(tasks[1], engine="native"), data, pinned=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(done, Done)
    kept = int(masks["fc1.weight"].sum())
    # values, what says where they stand, a copy to send; the bits, and the passes
    assert peak < 12 * kept + 6_000_000 // 8 + 2_500_000 < 6_000_000 + 12 * kept
