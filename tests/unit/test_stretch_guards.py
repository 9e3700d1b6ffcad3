"""What a stretch must not write to, what it may not hold, and what it must not hide."""

from __future__ import annotations

import gc
import tracemalloc
import weakref

import numpy as np
import pytest

from edge_runtime.engines import Update
from edge_runtime.engines.torch import TorchEngine
from tests.support.models import batch as batch_of
from tests.support.models import random_arrays
from tests.support.stretches import MAKERS, draft, make
from tests.unit.test_masked_engine import DENSE, SPARSE, WHOLE, deep, masks_of
from wire.errors import SpecError

FLOAT = np.float32


def chain():
    return (
        draft((2, 6, 6))
        .add("conv2d", out=3, kernel=3, stride=1, padding=1)
        .add("relu")
        .add("flatten")
        .add("linear", out=4)
        .chain()
    )


@pytest.fixture(params=MAKERS)
def made(request):
    return make(request.param, chain())


def forward(made, n=3):
    x = np.random.default_rng(0).standard_normal((n, *made.chain.in_shape)).astype(FLOAT)
    return made.stretch.forward(x, train=True)


@pytest.mark.parametrize("spoil", ["short", "float64", "strided", "missing"])
@pytest.mark.parametrize("what", ["grads", "velocity", "anchor"])
def test_arrays_that_do_not_fit_are_refused_before_anything_moves(made, what, spoil):
    before = {name: array.copy() for name, array in made.stretch.params.items()}
    for victim, array in made.stretch.params.items():
        arrays = made.zeros()
        if spoil == "short":
            arrays[victim] = np.zeros(array.size - 1, FLOAT)
        elif spoil == "float64":
            arrays[victim] = np.zeros(array.shape)
        elif spoil == "strided":
            arrays[victim] = np.zeros((2 * len(array), *array.shape[1:]), FLOAT)[::2]
        else:
            del arrays[victim]
        y = forward(made)
        update = (
            None
            if what == "grads"
            else Update(0.1, 0.5, 0.0, 0.5, **{"velocity": made.zeros(), "anchor": made.zeros(), what: arrays})
        )
        with pytest.raises(SpecError, match=victim):
            made.stretch.backward(
                np.ones_like(y), grads=arrays if what == "grads" else None, update=update, input_gradient=True
            )
    for name, array in made.stretch.params.items():
        np.testing.assert_array_equal(array, before[name])


def test_momentum_without_a_velocity_is_refused(made):
    y = forward(made)
    with pytest.raises(SpecError, match="velocity"):
        made.stretch.backward(np.ones_like(y), grads=None, update=Update(0.1, 0.9), input_gradient=False)


@pytest.mark.parametrize("kind", MAKERS)
def test_an_evaluation_keeps_nothing(kind):
    wide = make(kind, draft((8, 32, 32)).add("conv2d", out=8, kernel=3, stride=1, padding=1).add("relu").chain())
    x = np.ones((16, 8, 32, 32), FLOAT)
    wide.stretch.forward(x[:1], train=False)
    tracemalloc.start()
    wide.stretch.forward(x, train=False)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < x.nbytes // 8  # numpy tells tracemalloc of its memory; torch's own is not seen


def test_weights_of_another_mask_are_not_woken_by_an_old_velocity():
    spec = deep()
    masks = masks_of(spec)
    engine = TorchEngine()
    engine.load(spec, WHOLE, random_arrays(spec, WHOLE), masks, DENSE)
    velocity = {name: np.ones(array.shape, FLOAT) for name, array in engine.params.items()}
    x, y = batch_of(spec, 4)
    engine.forward_backward(x, y, update=Update(0.1, 0.9, velocity=velocity))
    for name, mask in masks.items():
        assert not engine.params[name][~mask].any(), name


def test_the_model_before_is_gone_while_the_next_is_made(monkeypatch):
    spec = deep()
    masks = masks_of(spec)
    engine = TorchEngine()
    engine.load(spec, WHOLE, random_arrays(spec, WHOLE), masks, SPARSE)
    old = weakref.ref(next(step.stretch for step in engine._steps if step.stretch is not None))
    seen = []
    install = TorchEngine._install

    def watched(self, *args):
        gc.collect()
        seen.append(old())
        install(self, *args)

    monkeypatch.setattr(TorchEngine, "_install", watched)
    engine.load(spec, WHOLE, random_arrays(spec, WHOLE), masks, SPARSE)
    assert seen == [None]
    with pytest.raises(SpecError):
        engine.load(spec, WHOLE, random_arrays(spec, WHOLE), {"ghost": np.ones(3, np.bool_)}, SPARSE)
    with pytest.raises(SpecError, match="no model"):
        engine.forward(batch_of(spec, 1)[0])


def test_arrays_must_be_the_models():
    spec = deep()
    arrays = random_arrays(spec, WHOLE)
    for wrong in (
        {**arrays, "ghost": np.zeros(1, FLOAT)},
        {name: a for name, a in arrays.items() if name != "out.bias"},
    ):
        with pytest.raises(SpecError, match=r"ghost|out\.bias"):
            TorchEngine().load(spec, WHOLE, wrong, masks_of(spec), SPARSE)
