"""Nested and sparse in one structure: a width whose weights are masked, on both engines, in the planner and in an order."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from coordinator.answers import check_update, within
from coordinator.simulate.flops import flops
from edge_runtime.engines import Update
from edge_runtime.engines.native.engine import NativeEngine
from edge_runtime.engines.torch import TorchEngine
from edge_runtime.shrink import Squeezed
from edge_runtime.worker import perform
from tests.support.models import batch, random_arrays
from tests.support.orders import dataset, masked_job
from tests.unit.test_masked_engine import (
    DENSE,
    MIXED,
    SPARSE,
    WHOLE,
    at,
    deep,
    in_c_order,
    make,
    masks_of,
    times_mask,
)
from wire import memory, prices
from wire.errors import BudgetExceeded, Malformed, SpecError, TooLarge
from wire.job import Done
from wire.maskfile import outline_of_model, read_masks, write_masks
from wire.messages import Recipe
from wire.native import memory as native
from wire.native.plan import Asked, plan
from wire.outline import outline_of
from wire.spec import Structure, tensor_shapes
from wire.structure import masked
from wire.work import per_sample

__all__ = ["make"]

SPEC = deep()
WIDTHS = Structure(1, {g.name: (g.size // 4, g.size // 2) for g in SPEC.groups if g.prunable}, "ab" * 32)


def prefix_of(name, width):
    tensor = next(t for t in SPEC.tensors if t.name == name)
    assert all(axis.outer == 1 for axis in tensor.axes)
    return tuple(slice(length) for length in tensor_shapes(SPEC, width)[name])


def masks_within(width, density=0.4, skip=()):
    return {name: mask[prefix_of(name, width)].copy() for name, mask in masks_of(SPEC, density, skip).items()}


def cut(arrays, width):
    return {name: np.ascontiguousarray(array[prefix_of(name, width)]) for name, array in arrays.items()}


@pytest.mark.parametrize("choice", [SPARSE, DENSE, MIXED], ids=["sparse", "dense", "mixed"])
@pytest.mark.parametrize("capacity", [0, 1])
def test_it_computes_what_the_whole_model_does_without_the_rest(make, choice, capacity):
    width, arrays = WIDTHS.narrowed(capacity), random_arrays(SPEC, WHOLE)
    masks = masks_within(width, skip=("out.weight",))
    alone = {name: np.zeros(array.shape, bool) for name, array in arrays.items()}
    for name, whole in alone.items():
        whole[prefix_of(name, width)] = masks.get(name, True)
    engine, twin = make(), TorchEngine()
    engine.load(SPEC, masked(masks, width), cut(arrays, width), masks, choice)
    twin.load(SPEC, WHOLE, times_mask(arrays, alone))
    x, y = batch(SPEC, 7)
    np.testing.assert_allclose(engine.forward(x), twin.forward(x), atol=2e-5)
    losses = [each.forward_backward(x, y) for each in (engine, twin)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for name, grad in twin.grads.items():
        found = in_c_order(engine, masks, engine.grads, name)
        np.testing.assert_allclose(found, at(masks, name, grad[prefix_of(name, width)]), atol=2e-5, err_msg=name)
    with pytest.raises(SpecError, match="no narrower widths"):
        engine.narrow(width.narrowed(0))


def test_the_planner_counts_what_its_width_keeps():
    recipe = Recipe(batch=4, momentum=0.9)
    for engine in ("torch", "native"):
        bounds = []
        for width in (WIDTHS.narrowed(0), WIDTHS, WHOLE):
            sizes = [
                prices.training(engine)(SPEC, masked(masks_within(width, density), width), recipe, 4).peak
                for density in (0.05, 0.9)
            ]
            assert sizes[0] < sizes[1]
            bounds.append(sizes)
        assert bounds == sorted(bounds)
        assert [some[1] for some in bounds] == sorted(some[1] for some in bounds)
    masks = masks_within(WIDTHS)
    for choice in (SPARSE, DENSE):
        torch = TorchEngine()
        torch.load(SPEC, masked(masks, WIDTHS), cut(random_arrays(SPEC, WHOLE), WIDTHS), masks, choice)
        velocity = {name: np.zeros(array.shape, np.float32) for name, array in torch.params.items()}
        held = torch.bytes_of_weights(Update(0.1, 0.9, velocity=velocity))
        kept = memory.Masked(
            {name: int(mask.sum()) for name, mask in masks.items()},
            [name for name, way in torch.ways.items() if way == "dense"],
        )
        assert held < memory.predict(SPEC, WIDTHS, recipe, masked=kept).peak
    with pytest.raises(SpecError, match="could be kept"):
        memory.predict(SPEC, masked(masks_within(WHOLE, 1.0), WIDTHS), recipe)


@pytest.mark.parametrize("choice", [SPARSE, DENSE, MIXED], ids=["sparse", "dense", "mixed"])
@pytest.mark.parametrize("capacity", [0, 1])
def test_the_native_arena_of_a_width_is_as_long_as_predicted(choice, capacity):
    width = WIDTHS.narrowed(capacity)
    masks = masks_within(width, skip=("out.weight",))
    engine, structure = NativeEngine(), masked(masks, width)
    engine.load(SPEC, structure, cut(random_arrays(SPEC, WHOLE), width), masks, choice)
    x, y = batch(SPEC, 7)
    engine.evaluate(x, y, 7)
    engine.forward_backward(x, y, update=Update(0.1))
    held = memory.Masked(structure.kept, [name for name, way in engine.ways.items() if way == "dense"])
    found, predicted = engine._arena.nbytes, native.arena(SPEC, structure, Asked(7), held)
    panels = max(plan(SPEC, structure, Asked(7, backward=back), held).panels for back in (False, True))
    assert found == predicted - panels
    assert predicted < native.arena(SPEC, WIDTHS.narrowed(1), Asked(7), held) or capacity == 1


def test_its_operations_are_those_of_its_own_width(tmp_path):
    masks = masks_within(WIDTHS)
    job = masked_job(tmp_path, SPEC, cut(random_arrays(SPEC, WHOLE), WIDTHS), masks, Recipe(epochs=2), width=WIDTHS)
    own = per_sample(SPEC, masked(masks, WIDTHS))
    assert 0 < own < per_sample(SPEC, WIDTHS) < per_sample(SPEC, WHOLE)

    def counted(**changes):
        order = dataclasses.replace(job.order, recipe=dataclasses.replace(job.order.recipe, **changes))
        return flops(SPEC, order, 10)

    assert counted() == counted(knobs={"widths": 1.0}) == 20 * own
    assert counted(rule="dpf") == 20 * per_sample(SPEC, masked(masks, WIDTHS), dense_gradient=True) > 20 * own


def test_masks_of_another_width_are_refused(tmp_path):
    masks = masks_within(WIDTHS)
    write_masks(tmp_path / "masks", masks)
    structure = masked(masks, WIDTHS)
    held = read_masks(str(tmp_path / "masks"), SPEC, structure)
    assert held.outline == outline_of_model(SPEC, masks, WIDTHS)
    assert held.outline == outline_of(cut(random_arrays(SPEC, WHOLE), WIDTHS), masks)
    for wrong in (structure.narrowed(0), dataclasses.replace(structure, widths={}), masked(masks)):
        with pytest.raises((Malformed, TooLarge), match=r"a mask of|the limit is"):
            read_masks(str(tmp_path / "masks"), SPEC, wrong)


@pytest.mark.parametrize("rule", ["sgd", "fiarse", "importance"])
def test_an_order_about_it_is_answered_about_it(tmp_path, rule):
    masks, arrays = masks_within(WIDTHS), cut(random_arrays(SPEC, WHOLE), WIDTHS)
    job = masked_job(tmp_path, SPEC, arrays, masks, Recipe(batch=8, rate=0.1, rule=rule), width=WIDTHS)
    done = perform(job, dataset(SPEC, 24, 8), pinned=True)
    assert isinstance(done, Done), done
    (asked,) = job.order.structures
    assert done.structure == asked == masked(masks, WIDTHS)
    held = read_masks(job.masks, SPEC, asked)
    check_update(Path(done.update), SPEC, done.structure, held)
    assert done.metrics["loss"] < done.metrics["loss.first"] * 2


def test_who_may_answer_about_what():
    width, sparse = WIDTHS, masked(masks_within(WIDTHS), WIDTHS)
    whole = masked(masks_within(WHOLE))
    assert within(width, width)
    assert within(width.narrowed(0), width)
    assert not within(width, width.narrowed(0))
    for asked in (sparse, whole, WHOLE, Structure(3)):
        assert within(asked, asked)
        for other in (width, width.narrowed(0), WHOLE, Structure(1), sparse.narrowed(0), whole.narrowed(1)):
            assert within(other, asked) == (other == asked)


def test_memory_that_shrinks_leaves_it_smaller_batches_and_no_narrower_width():
    masks = masks_within(WIDTHS)
    engine = TorchEngine()
    engine.load(SPEC, masked(masks, WIDTHS), cut(random_arrays(SPEC, WHOLE), WIDTHS), masks, SPARSE)
    tried = []

    def price(structure, micro_batch):
        tried.append((structure, micro_batch))
        return 100 * micro_batch

    squeezed = Squeezed(engine, lambda done: 250, price, lambda room, batch: None, (900, 800, 8))
    with pytest.raises(BudgetExceeded):
        Squeezed(engine, lambda done: 50, price, lambda room, batch: None, (900, 800, 8))(0.5, None)
    assert squeezed(0.5, None) == 2
    assert {structure.capacity for structure, _ in tried} == {1}
    assert engine.structure == masked(masks, WIDTHS)
