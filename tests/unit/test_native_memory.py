"""The native engine's memory: its arena is what is predicted, nothing of an engine outlives it, and a worker takes no more."""

from __future__ import annotations

import gc
import itertools
import weakref
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.engines import Choice, Engine, Update, open_engine
from tests.bench import memory as bench
from tests.support.models import random_arrays
from tests.support.orders import some_masks
from wire import memory, prices, zoo
from wire.builders import Conv, cnn
from wire.errors import Unsupported
from wire.masked import FLOAT, Masked, maskable
from wire.messages import Recipe
from wire.native import memory as native
from wire.native.plan import Asked, plan
from wire.passes import options
from wire.spec import ModelSpec, Structure
from wire.structure import masked

MIB = 1 << 20
WHOLE = Structure()
MODELS = ("linear", "digits-mlp", "digits-cnn", "digits-cnn-bn", "lenet-5")


def trained(spec: ModelSpec, batch: int, *, sparse: float = 0.0, cuts: tuple[int, ...] = ()) -> Engine:
    engine = open_engine("native")()
    if sparse:
        masks = some_masks(spec, sparse, names=maskable(spec))
        engine.load(spec, masked(masks), None, masks, Choice(batch, {"": "sparse"}))
    else:
        engine.load(spec, WHOLE, random_arrays(spec, WHOLE, scale=0.05))
        engine.recompute(cuts)
    x, y = np.zeros((batch, *spec.input_shape), np.float32), np.zeros(batch, np.int64)
    engine.evaluate(x, y, batch)
    engine.forward_backward(x, y, update=Update(0.1))
    return engine


@pytest.mark.parametrize("batch", [1, 7, 32])
@pytest.mark.parametrize("name", MODELS)
def test_the_arena_is_as_long_as_predicted(name: str, batch: int) -> None:
    spec = zoo.by_name(name)
    engine = trained(spec, batch)
    assert engine._arena.nbytes == native.arena(spec, WHOLE, Asked(batch))  # type: ignore[attr-defined]  # a look inside


def test_so_it_is_with_cuts_which_take_less() -> None:
    spec = cnn("deep", (1, 16, 16), 4, tuple(Conv(16, norm="batch") for _ in range(8)), (8,))
    cut = [cuts for cuts in options(spec, WHOLE) if cuts]
    assert cut
    plain = native.arena(spec, WHOLE, Asked(32))
    for cuts in cut:
        engine = trained(spec, 32, cuts=cuts)
        found = engine._arena.nbytes  # type: ignore[attr-defined]  # a look inside
        assert found == native.arena(spec, WHOLE, Asked(32, cuts=cuts)) < plain


def test_of_a_chain_of_masked_layers_the_whole_counts_once() -> None:
    spec = zoo.by_name("lenet-5")
    kept = dict.fromkeys(maskable(spec), 10)
    found = plan(spec, WHOLE, Asked(32), Masked(kept))
    assert [node.op for node in found.nodes] == ["stretch"]
    values = 32 * FLOAT * sum((6 * 28 * 28, 6 * 14 * 14, 16 * 10 * 10, 16 * 5 * 5, 120, 84, 10))
    assert found.panels < 4 * values, "not once more for every beginning of it"


@pytest.mark.parametrize("sparse", [0.0, 0.1], ids=["dense", "masked"])
def test_an_engine_that_is_let_go_is_gone_at_once(sparse: float) -> None:
    """A circle of references would keep its arena until somebody looks for circles, or for ever where nobody does."""
    gc.collect()
    gc.disable()
    try:
        engine = trained(zoo.by_name("digits-cnn"), 4, sparse=sparse)
        if not sparse:
            engine.narrow(WHOLE).forward(np.zeros((4, 1, 8, 8), np.float32))
        arena = weakref.ref(engine._arena)  # type: ignore[attr-defined]  # a look inside
        del engine
        assert arena() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("sparse", [0.0, 0.1], ids=["dense", "masked"])
def test_no_pass_holds_its_inputs_when_it_is_over(sparse: float) -> None:
    """A batch may be a part of all that a device has to learn from, and keep all of it."""
    spec = zoo.by_name("digits-mlp")
    engine = trained(spec, 4, sparse=sparse)
    data = np.zeros((8, *spec.input_shape), np.float32)
    engine.evaluate(data, np.zeros(8, np.int64), 4)
    engine.forward(data[:4])
    for loss in ("cross_entropy", "mean_squared_error"):
        engine.forward_backward(data[:4], np.zeros(4, np.int64), update=Update(0.1), loss=loss)
    gone = weakref.ref(data)
    del data
    assert gone() is None


def test_it_takes_less_than_torch_and_more_for_more() -> None:
    spec = zoo.by_name("conv-2")
    for batch, momentum in itertools.product((1, 8, 32), (0.0, 0.9)):
        recipe = Recipe(batch=batch, momentum=momentum)
        ours, theirs = (prices.training(engine)(spec, WHOLE, recipe) for engine in ("native", "torch"))
        assert ours.peak < theirs.peak
        assert ours.bound >= memory.bounded(ours.peak, 1.0).peak
    sizes = [native.predict(spec, WHOLE, Recipe(batch=batch, clip=1.0)).peak for batch in (1, 8, 64, 256)]
    assert sizes == sorted(sizes)
    assert native.predict(spec, WHOLE, Recipe(), scale=2.0).bound > native.predict(spec, WHOLE, Recipe()).bound


def test_narrower_widths_are_counted_where_a_rule_trains_them() -> None:
    spec = zoo.by_name("digits-cnn")
    kept = (0.5, 1.0)
    widths = {g.name: tuple(memory.uniform(spec, k).widths[g.name][0] for k in kept) for g in spec.groups if g.prunable}
    nested = Structure(1, widths)
    narrower = native.arena(spec, nested.narrowed(0), Asked(32, views=True))
    both = native.predict(spec, nested, Recipe(knobs={"widths": 1.0}))
    assert both.peak >= narrower
    assert native.predict_evaluation(spec, nested, 32).peak >= native.arena(spec, nested, Asked(32, backward=False))


def test_what_it_lacks_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from wire.native import plan as plans

    monkeypatch.setattr(plans, "NEEDS", {op: say for op, say in plans.NEEDS.items() if op != "conv2d"})
    spec = zoo.by_name("digits-cnn")
    with pytest.raises(Unsupported, match="conv2d"):
        native.predict(spec, WHOLE, Recipe())
    assert prices.having(spec, ["native", "torch"]) == ("torch",)
    with pytest.raises(Unsupported, match="engine 'native' has no conv2d"):
        prices.having(spec, ["native"])


@pytest.mark.parametrize("kind", ["dense", "narrow"])
def test_a_worker_takes_what_is_predicted(tmp_path: Path, kind: str) -> None:
    """By the kernel's high-water mark, two orders one after the other: to 2 %, or a mebibyte where that is more."""
    models = (("lenet-300-100", 20), ("digits-cnn", 32), ("conv-2", 8), ("resnet-18", 1))
    cases = [bench.Case(model, batch, kind, update, "native") for model, batch in models for update in bench.UPDATES]
    for case, found, peak in bench.grid(tmp_path, cases):
        assert abs(found.peak - peak) <= max(0.02 * peak, MIB), case.name
        assert peak <= found.bound
