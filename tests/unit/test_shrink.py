"""Memory that shrinks in the middle of an order: what is held is sliced as the coordinator would, and training goes on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from edge_runtime import personal, rules
from edge_runtime.engines import Update
from edge_runtime.holding import price
from edge_runtime.rules import Held, loop
from edge_runtime.shrink import Squeezed, narrow
from edge_runtime.worker import perform
from tests.support.engines import make as MAKE
from tests.support.models import batch, random_arrays, small_cnn, widths
from tests.support.orders import dataset, job, masked_job, some_masks
from wire import structure as cutting
from wire.errors import BudgetExceeded
from wire.job import Done, Failed
from wire.messages import Recipe
from wire.spec import Axis, AxisGroup, ModelSpec, Node, Structure, TensorSpec, check
from wire.tensor import open_blob

SPEC = small_cnn()
NESTED = widths(a=(2, 4, 6), b=(3, 5, 12))
WHOLE = Structure()
pytestmark = pytest.mark.usefixtures("every_engine")


def copies(arrays):
    return {name: array.copy() for name, array in arrays.items()}


def same(found, wanted):
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def loaded(structure=NESTED, spec=SPEC):
    engine = MAKE()
    engine.load(spec, structure, random_arrays(spec, structure))
    return engine


def trained(recipe, squeeze, structure=NESTED, count=40, micro=0):
    engine = loaded(structure)
    x, y = batch(SPEC, count)
    task = rules.Task(recipe, engine, x, y, 1, micro or recipe.batch, lambda *_: None, squeeze=squeeze)
    return engine, rules.find(recipe.rule).train(task)


class Cutter:
    """Cuts after so many steps, and notes what was there and what came of it."""

    def __init__(self, engine_of, after, to):
        self.calls, self.after, self.to, self.engine_of = 0, after, to, engine_of
        self.wide, self.sliced = [], []

    def __call__(self, _, held):
        if self.calls == self.after:
            engine = self.engine_of()
            before = [copies(engine.params), *(copies(arrays) for arrays in held.arrays)]
            narrow(engine, self.to, held)
            self.wide = before
            self.sliced = [copies(engine.params), *(copies(arrays) for arrays in held.arrays)]
            assert not any(held.views)
        self.calls += 1


@pytest.mark.parametrize("capacity", [0, 1])
@pytest.mark.parametrize(
    ("recipe", "count"),
    [
        (Recipe(batch=8), 0),
        (Recipe(batch=8, momentum=0.9, decay=0.01), 1),
        (Recipe(batch=8, knobs={"adam": 1.0}, rate=0.01), 2),
        (Recipe(batch=8, clip=1.0, momentum=0.9, knobs={"widths": 1.0, "distil": 0.5}), 1),
        (Recipe(batch=8, clip=1.0, momentum=0.9, knobs={"widths": 1.0, "mutual": 1.0}), 1),
        (Recipe(batch=8, rule="prox", momentum=0.9, knobs={"mu": 0.1}), 2),
        (Recipe(batch=8, rule="maml", knobs={"hf": 1.0}), 3),
    ],
)
def test_what_is_held_is_sliced_as_the_coordinator_would(recipe, count, capacity):
    """Weights and everything that goes along with them, to the bit; and what is trained from there on is that width."""
    made = []
    target = NESTED.narrowed(capacity)
    cutter = Cutter(lambda: made[0], 3, target)
    engine = loaded()
    made.append(engine)
    x, y = batch(SPEC, 40)
    task = rules.Task(recipe, engine, x, y, 1, recipe.batch, lambda *_: None, squeeze=cutter)
    result = rules.find(recipe.rule).train(task)
    assert len(cutter.wide) == 1 + count
    for wide, sliced in zip(cutter.wide, cutter.sliced, strict=True):
        if wide:
            same(sliced, cutting.cut(SPEC, wide, target))
    assert engine.structure == target
    assert result.steps == 5
    assert any(not np.array_equal(engine.params[name], cutter.sliced[0][name]) for name in engine.params)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_it_goes_on_as_if_that_width_had_been_loaded(momentum):
    """The rest of the batches, written out over a fresh engine of what the coordinator would extract."""
    recipe, target = Recipe(batch=8, epochs=2, momentum=momentum), NESTED.narrowed(1)
    engine = loaded()
    cutter = Cutter(lambda: engine, 4, target)
    x, y = batch(SPEC, 40)
    task = rules.Task(recipe, engine, x, y, 1, 8, lambda *_: None, squeeze=cutter)
    rules.find("sgd").train(task)
    fresh = MAKE()
    fresh.load(SPEC, target, cutting.cut(SPEC, cutter.wide[0], target))
    velocity = copies(cutting.cut(SPEC, cutter.wide[1], target)) if momentum else None
    for rows in list(loop.batches(task))[4:]:
        fresh.forward_backward(x[rows], y[rows], update=Update(recipe.rate, momentum, velocity=velocity))
    same(engine.params, fresh.params)


def test_gated_axes_and_running_statistics_are_sliced_too():
    """An axis that stands several times in a dimension is no prefix of the array; the slice takes it from each part."""
    tensors = (
        TensorSpec("f.weight", (Axis("a", outer=2), Axis(inner=3)), "fan", 3),
        TensorSpec("f.bias", (Axis("a", outer=2),)),
        TensorSpec("o.weight", (Axis("classes"), Axis("a", outer=2)), "fan", 8),
        TensorSpec("o.bias", (Axis("classes"),)),
    )
    nodes = (
        Node("f", "linear", ("input",), {"weight": "f.weight", "bias": "f.bias"}),
        Node("o", "linear", ("f",), {"weight": "o.weight", "bias": "o.bias"}),
    )
    groups = (AxisGroup("a", 4), AxisGroup("classes", 2, prunable=False))
    spec = check(ModelSpec("gated", (3,), 2, groups, tensors, nodes))
    wide = Structure(1, {"a": (2, 4)}, "ab" * 32)
    engine = loaded(wide, spec)
    before = copies(engine.params)
    momentum = copies(before)
    narrow(engine, wide.narrowed(0), Held([momentum]))
    rows = [0, 1, 4, 5]
    np.testing.assert_array_equal(engine.params["f.weight"], before["f.weight"][rows])
    np.testing.assert_array_equal(engine.params["o.weight"], before["o.weight"][:, rows])
    same(momentum, engine.params)


# --- when, and to what -----------------------------------------------------------------------------------------------


def watch(rooms, granted=100, needs=(20, 50, 90), micro=1):
    """A watched engine; `needs` is what the widths take, half of it the samples', `rooms` what there is from call to call."""
    engine, settled = loaded(), []
    left = iter(rooms)

    def price(structure, size):
        return needs[structure.capacity] * (micro + size) // (2 * micro)

    squeeze = Squeezed(
        engine, lambda _: next(left), price, lambda room, _: settled.append(room), (granted, needs[2], micro)
    )
    return engine, squeeze, settled


@pytest.mark.parametrize(
    ("rooms", "capacity", "settled"),
    [
        ([0, 0], 2, []),  # as granted
        ([100, 400], 2, []),
        ([95, 90], 2, []),  # less, but enough
        ([89, 89], 1, [89]),
        ([50, 0], 1, [50]),
        ([49, 49], 0, [49]),
        ([60, 200], 1, [60]),  # what comes back later comes back with the next order
        ([60, 20], 0, [60, 20]),
    ],
)
def test_the_widest_width_that_fits(rooms, capacity, settled):
    engine, squeeze, found = watch(rooms)
    for done in (0.25, 0.5):
        squeeze(done, Held())
    assert engine.structure == NESTED.narrowed(capacity)
    assert found == settled
    assert squeeze.at == (0.25 if settled else None)
    assert squeeze.bytes_needed == (20, 50, 90)[capacity]


def test_no_limit_was_granted_and_one_comes():
    engine, squeeze, found = watch([60], granted=0)
    squeeze(0.5, Held())
    assert (engine.structure.capacity, found) == (1, [60])


@pytest.mark.parametrize(
    ("rooms", "capacity", "micro", "settled"),
    [
        ([50, 50], 1, 8, [50]),  # width first
        ([19, 19], 0, 4, [19]),  # 20 with 8 samples at once, 15 with 4
        ([19, 11], 0, 1, [19, 11]),
        ([12, 99], 0, 2, [12]),
    ],
)
def test_the_narrowest_in_smaller_parts(rooms, capacity, micro, settled):
    engine, squeeze, found = watch(rooms, micro=8)
    assert [squeeze(done, Held()) for done in (0.25, 0.5)][-1] == micro == squeeze.micro_batch
    assert (engine.structure, found, squeeze.at) == (NESTED.narrowed(capacity), settled, 0.25)


def test_not_even_the_narrowest():
    engine, squeeze, _ = watch([19])
    with pytest.raises(BudgetExceeded, match="width 0"):
        squeeze(0.5, Held())
    assert engine.structure == NESTED
    assert squeeze.bytes_needed == 20


# --- whole orders ----------------------------------------------------------------------------------------------------

RECIPE = Recipe(epochs=4, batch=8, rate=0.1, clip=1.0, seed=5)


def bound(capacity, recipe=RECIPE, folder=None):
    task = job(folder, SPEC, random_arrays(SPEC, WHOLE), [NESTED], recipe)
    return price(task, SPEC, NESTED.narrowed(capacity), recipe.batch).bound


def shrinking(room, at):
    seen = []

    def look(done):
        seen.append(done)
        return room if done >= at else 0

    return look, seen


@pytest.mark.parametrize("rule", ["sgd", "prox", "maml"])
@pytest.mark.parametrize("form", ["", "int8"])
@pytest.mark.parametrize("capacity", [0, 1])
def test_an_order_ends_with_a_narrower_answer(tmp_path, capacity, form, rule):
    knobs = {"prox": {"mu": 0.1}, "maml": {"alpha": 0.05, "tune": 0.0}}.get(rule, {})
    recipe = dataclasses.replace(RECIPE, form=form, rule=rule, knobs=knobs)
    arrays, data = random_arrays(SPEC, WHOLE), dataset(SPEC)
    budget, left = bound(2, recipe, tmp_path / "a"), bound(capacity, recipe, tmp_path / "b")
    room, seen = shrinking(left, 0.5)
    done = perform(job(tmp_path / "c", SPEC, arrays, [NESTED], recipe, budget=budget), data, room=room)
    assert isinstance(done, Done), done
    assert done.structure == NESTED.narrowed(capacity)
    assert done.metrics["squeezed"] == 0.5
    assert done.usage.bytes_budget == left
    assert (
        done.usage.bytes_peak
        == price(job(tmp_path / "d", SPEC, arrays, [NESTED], recipe), SPEC, done.structure, 8).peak
    )
    assert seen[:20] == [step / 20 for step in range(20)], "between all batches"
    kept = personal.read(Path(done.keep))
    assert kept.structure == done.structure
    with open_blob(Path(done.update)) as blob:
        update = {name: blob.tensor(name).copy() for name in blob.names}
    before = cutting.cut(SPEC, arrays, done.structure)
    for name, array in kept.arrays.items():
        step = np.abs(update[name]).max() / 127 if form else 1e-6
        np.testing.assert_allclose(update[name], array - before[name], atol=step, err_msg=name)
    again = perform(
        job(tmp_path / "e", SPEC, arrays, [NESTED], recipe, budget=budget), data, room=shrinking(left, 0.5)[0]
    )
    assert again.update_ref == done.update_ref


@pytest.mark.parametrize("structure", [NESTED, NESTED.narrowed(0), WHOLE], ids=["all", "narrow", "whole"])
def test_what_cannot_be_cut_is_given_up(tmp_path, structure):
    made = job(tmp_path, SPEC, random_arrays(SPEC, WHOLE), [structure], RECIPE, budget=1 << 30)
    failed = perform(made, dataset(SPEC), room=shrinking(1000, 0.5)[0])
    assert isinstance(failed, Failed)
    assert failed.reason == "memory"
    wanted = structure.narrowed(0) if structure.widths else WHOLE
    assert failed.bytes_needed == price(made, SPEC, wanted, 1).bound


@pytest.mark.parametrize("rule", ["sgd", "prox", "maml", "heterofl", "fjord"])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_what_has_no_narrower_width_goes_on_in_smaller_parts(tmp_path, rule, clip):
    """Micro-batches add up to the batch, so that the answer is the same but for rounding, also where none was needed."""
    recipe = dataclasses.replace(RECIPE, rule=rule, clip=clip)
    arrays, data = random_arrays(SPEC, WHOLE), dataset(SPEC)
    made = [job(tmp_path / name, SPEC, arrays, [WHOLE], recipe, budget=1 << 30) for name in ("a", "b")]
    wanted, left = perform(made[0], data), price(made[0], SPEC, WHOLE, 2).bound
    assert left < price(made[0], SPEC, WHOLE, 4).bound
    done = perform(made[1], data, room=shrinking(left, 0.5)[0])
    assert isinstance(done, Done), done
    assert (done.structure, done.metrics["squeezed"], done.usage.micro_batch) == (WHOLE, 0.5, 2)
    assert (done.usage.bytes_budget, done.usage.bytes_peak) == (left, price(made[0], SPEC, WHOLE, 2).peak)
    for name, array in personal.read(Path(wanted.keep)).arrays.items():
        np.testing.assert_allclose(personal.read(Path(done.keep)).arrays[name], array, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_masks_have_no_widths(tmp_path, clip):
    recipe = dataclasses.replace(RECIPE, clip=clip)
    parts = [tmp_path / name for name in "abc"]
    made = [masked_job(p, SPEC, random_arrays(SPEC, WHOLE), some_masks(SPEC), recipe, budget=1 << 30) for p in parts]
    wanted = perform(made[0], dataset(SPEC), pinned=True)
    whole = made[0].order.structures[0]
    left = price(made[0], SPEC, whole, 2).bound
    done = perform(made[1], dataset(SPEC), pinned=True, room=shrinking(left, 0.5)[0])
    assert isinstance(done, Done), done
    fits = next(size for size in (8, 4, 2) if price(made[0], SPEC, whole, size).bound <= left)
    assert (done.structure, done.usage.micro_batch) == (whole, fits)
    for name, array in personal.read(Path(wanted.keep)).arrays.items():
        np.testing.assert_allclose(personal.read(Path(done.keep)).arrays[name], array, atol=2e-5, err_msg=name)
    failed = perform(made[2], dataset(SPEC), pinned=True, room=shrinking(1000, 0.5)[0])
    assert isinstance(failed, Failed)
    assert failed.reason == "memory"
    assert failed.bytes_needed > 8 << 20


def test_a_rule_that_does_not_say_what_it_holds_is_left_alone(tmp_path):
    recipe = dataclasses.replace(RECIPE, rule="topk", clip=0.0)
    made = job(tmp_path, SPEC, random_arrays(SPEC, WHOLE), [NESTED], recipe, budget=1 << 30)
    done = perform(made, dataset(SPEC), room=shrinking(1000, 0.5)[0])
    assert isinstance(done, Done), done
    assert done.structure == NESTED
