"""Masks without torch: layers held dense by the native engine's ops, steps in one crossing, and what stretches take."""

from __future__ import annotations

import subprocess
import sys
import weakref
from dataclasses import replace

import numpy as np
import pytest

from edge_runtime.engines import Choice, Update
from edge_runtime.engines.masks import Wires
from edge_runtime.engines.native import straight
from edge_runtime.engines.native.dense import NATIVE, DenseStretch
from edge_runtime.engines.native.engine import NativeEngine
from edge_runtime.engines.ways import Masked, Tools, decide
from edge_runtime.kernels.choose import DENSE
from edge_runtime.kernels.kits import NoKit
from edge_runtime.kernels.library import open_library
from tests.support.stretches import agree, batch, build, draft, make, oracle, small
from wire.errors import BudgetExceeded, DataError, SpecError
from wire.masked import contracted
from wire.masks import packed
from wire.native.stages import sizes, stages_of
from wire.spec import Node, Structure, node_shapes, tensor_shapes
from wire.zoo import Conv, cnn, mlp

FLOAT = np.float32
needs_core = pytest.mark.parametrize("core", [open_library()] if open_library() is not None else [])


def test_nothing_of_it_loads_torch():
    modules = ("masks", "ways", "native.dense", "native.straight", "native.engine")
    code = "import sys\n" + "".join(f"import edge_runtime.engines.{name}\n" for name in modules)
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


LAYERS = [
    draft((7,), "0.4").add("linear", 5),
    draft((40,), "1").add("linear", 300),
    draft((3, 9, 8), "0.3").add("conv2d", 4, kernel=3, stride=2, padding=1),
    draft((2, 6, 6), "one").add("conv2d", 5, kernel=3, stride=1, padding=0),
]


def dense(chain):
    (node,) = chain.nodes
    params = {name: array.copy() for name, array in chain.dense.items()}
    return DenseStretch(node, chain.in_shape, params, chain.masks[node.params["weight"]]), params


@pytest.mark.parametrize("made", LAYERS, ids=["linear", "large", "strided", "one"])
@pytest.mark.parametrize("count", [1, 6])
def test_a_layer_held_dense_is_the_masked_model(made, count):
    chain = made.chain()
    stretch, params = dense(chain)
    x, dy = batch(chain, count)
    grads = {name: np.zeros_like(array) for name, array in params.items()}
    y = stretch.forward(x, train=True).copy()
    dx = stretch.backward(dy, grads=grads, update=None, input_gradient=True)
    agree((y, grads, dx), oracle(chain, x, dy), chain)
    assert np.array_equal(stretch.forward(x, train=False), y)
    with pytest.raises(SpecError, match="training forward pass"):
        stretch.backward(dy, grads=grads, update=None, input_gradient=True)


@pytest.mark.parametrize("made", LAYERS[:3:2], ids=["linear", "conv"])
def test_what_is_pruned_stays_zero_under_any_update(made):
    chain = made.chain()
    stretch, params = dense(chain)
    x, dy = batch(chain, 4)
    ones = {name: np.ones_like(array) for name, array in params.items()}
    stretch.forward(x, train=True)
    stretch.backward(dy, grads=None, update=Update(0.1, 0.9, 0.01, 0.3, dict(ones), dict(ones)), input_gradient=False)
    ((name, mask),) = chain.masks.items()
    assert not params[name][~mask].any()
    assert (params[name] != chain.dense[name])[mask].all()


def test_the_watch_of_a_dense_layer_is_shown_what_passed():
    chain = LAYERS[2].chain()
    stretch, params = dense(chain)
    x, dy = batch(chain, 3)
    grads, seen = {name: np.zeros_like(array) for name, array in params.items()}, []
    stretch.forward(x, train=True)
    stretch.backward(
        dy,
        grads=grads,
        update=None,
        input_gradient=False,
        watch=lambda name, a, b: seen.append((name, a.copy(), b.copy())),
    )
    ((name, shown_x, shown_dy),) = seen
    assert name == chain.nodes[0].params["weight"]
    assert np.array_equal(shown_x, x)
    assert np.array_equal(shown_dy, dy)


def test_without_a_build_everything_is_dense_or_refused():
    node = Node("a", "linear", ("input",), {"weight": "w", "bias": "b"})
    tools = Tools(NATIVE)
    tools.__dict__["kit"] = NoKit()
    layers = {"w": Masked(node, packed(np.eye(4, 3, dtype=bool)), (3,), first=True)}
    assert decide(layers, Choice(4), tools) == [{"w": DENSE}]
    assert decide(layers, Choice(4, {"": "sparse"}), tools) == [{"w": DENSE}]
    with pytest.raises(BudgetExceeded):
        decide(layers, Choice(4, allows=lambda names: not names), tools)
    with pytest.raises(SpecError, match="no layout"):
        NoKit().layout("whole", node, layers["w"].mask)
    with pytest.raises(SpecError, match="'a'"):
        NoKit().stretch([node], (3,), {}, {})


def pooled():
    """A first convolution that is pooled at once, and one that is not."""
    made = draft((2, 13, 12), "0.5").add("conv2d", 5, kernel=3, stride=1, padding=1).add("relu")
    made.add("max_pool2d", kernel=2, stride=2).add("conv2d", 6, kernel=3, stride=1, padding=2).add("relu")
    return made.add("max_pool2d", kernel=2, stride=2).add("flatten").add("linear", 6).chain()


CHAINS = {"small": small, "pooled": pooled}


def softmax(logits, labels):
    odds = np.exp(logits.astype(float) - logits.max(1, keepdims=True))
    odds /= odds.sum(1, keepdims=True)
    here = np.arange(len(labels))
    lost = -np.log(odds[here, labels]).mean()
    odds[here, labels] -= 1
    return lost, odds / len(labels)


@needs_core
@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
@pytest.mark.parametrize("count", [1, 5, 20])
@pytest.mark.parametrize("watched", [False, True])
def test_a_step_in_one_crossing_is_the_step_by_step_one(core, chain, count, watched):
    chain = chain()
    one, two = make("native", chain), make("native", chain)
    x, _ = batch(chain, count)
    labels = np.arange(count) % 6
    seen, shown = [], []
    watch = (lambda *word: seen.append([np.copy(part) for part in word])) if watched else None
    grads, wanted = one.zeros(), two.zeros()
    logits, lost = one.stretch.learn(x, labels, 0.5, (grads, None, watch))
    y = two.stretch.forward(x, train=True)
    right, dy = softmax(y, labels)
    watch = (lambda *word: shown.append([np.copy(part) for part in word])) if watched else None
    dy = (dy / 2).astype(FLOAT)
    two.stretch.backward(dy, grads=wanted, update=None, input_gradient=False, watch=watch)
    assert np.array_equal(logits, y)
    assert lost == pytest.approx(right, rel=1e-6)
    for name, array in wanted.items():
        np.testing.assert_allclose(grads[name], array, atol=1e-6 * max(1, np.abs(array).max()), rtol=0, err_msg=name)
    for found, expected in zip(seen, shown, strict=True):
        assert str(found[0]) == str(expected[0])
        np.testing.assert_array_equal(found[1], expected[1])
        np.testing.assert_allclose(found[2], expected[2], atol=1e-6)
    moved = one.stretch.learn(x, labels, 1.0, (None, Update(0.25), watch))[0]
    assert np.array_equal(moved, y)  # the weights of before
    for name, array in two.stretch.params.items():
        np.testing.assert_allclose(one.stretch.params[name], array - 0.5 * wanted[name], atol=2e-6, err_msg=name)


@needs_core
def test_an_update_that_does_not_fit_is_refused_however_often(core):
    made, chain = make("native", small()), small()
    x, _ = batch(chain, 3)
    labels, velocity = np.zeros(3, np.int64), made.zeros()
    name = chain.nodes[0].params["bias"]
    before = {key: array.copy() for key, array in made.stretch.params.items()}
    for broken in (
        {key: array for key, array in velocity.items() if key != name},
        {**velocity, name: np.zeros(99, FLOAT)},
    ):
        update = Update(0.1, 0.9, velocity=broken)
        for _ in range(2):
            with pytest.raises(SpecError, match=name):
                made.stretch.learn(x, labels, 1.0, (None, update, None))
    for label in (-1, 6):
        with pytest.raises(DataError, match="6 classes"):
            made.stretch.learn(x, np.array([0, label, 1]), 1.0, (None, Update(0.1), None))
    for key, array in before.items():
        assert np.array_equal(made.stretch.params[key], array)
    with pytest.raises(SpecError, match="labels"):
        made.stretch.learn(x, labels[:2], 1.0, (None, Update(0.1), None))


@needs_core
def test_a_layout_of_another_dilation_is_refused(core):
    """Even where what goes in and comes out is of the same shapes."""
    chain = draft((2, 11, 11)).add("conv2d", 3, kernel=2, stride=2, padding=1, dilation=1).chain()
    made, (node,) = make("native", chain), chain.nodes
    other = replace(node, attrs={**node.attrs, "dilation": 2})
    with pytest.raises(SpecError, match="in a layout"):
        build("native", (other,), chain.in_shape, made.stretch.params, made.layouts)


@needs_core
def test_velocities_of_another_order_are_the_ones_that_are_written(core):
    chain = small()
    made = make("native", chain)
    x, _ = batch(chain, 3)
    labels = np.zeros(3, np.int64)
    held: dict = made.zeros()
    update = Update(0.0, 0.9, velocity=held)
    made.stretch.learn(x, labels, 1.0, (None, update, None))
    old = {name: array.copy() for name, array in held.items()}
    kept = dict(held)
    held.update(made.zeros())  # the same update, other arrays
    made.stretch.learn(x, labels, 1.0, (None, update, None))
    for name, array in kept.items():
        assert np.array_equal(array, old[name])
        assert held[name] is not array
        assert np.array_equal(held[name], old[name])


@needs_core
def test_momentum_goes_with_its_order_and_is_missed_if_it_is_gone(core):
    chain = small()
    made = make("native", chain)
    x, _ = batch(chain, 3)
    labels = np.zeros(3, np.int64)
    velocity: dict = made.zeros()
    update = Update(0.1, 0.9, velocity=velocity)
    made.stretch.learn(x, labels, 1.0, (None, update, None))
    made.stretch.forward(x, train=True)
    made.stretch.backward(np.zeros((3, *chain.out_shape), FLOAT), grads=None, update=update, input_gradient=False)
    gone = [weakref.ref(array) for array in velocity.values()]
    velocity.clear()
    assert [held() for held in gone] == [None] * len(gone)
    with pytest.raises(SpecError, match="velocity"):
        made.stretch.learn(x, labels, 1.0, (None, update, None))


@needs_core
@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
@pytest.mark.parametrize("wanted", [False, True])
def test_a_stretch_holds_what_is_said(core, chain, wanted):
    chain = chain()
    made = make("native", chain)
    shapes = {name: mask.shape for name, mask in chain.masks.items()}
    stages, out = stages_of(chain.nodes, chain.in_shape, shapes)
    assert out == chain.out_shape
    for count in (3, 20):
        x, dy = batch(chain, count)
        made.step(x, dy, input_gradient=wanted)
        said = sizes(stages, count, train=True, input_gradient=wanted).total
        assert made.stretch.bytes_held <= said <= made.stretch.bytes_held + 64 * (len(stages) + 3)
    values = {"input": chain.in_shape}
    for node, shape in zip(chain.nodes, _shapes(chain), strict=True):
        values[node.name] = shape
    panels: dict = {}
    contracted(chain.nodes, set(chain.masks), panels, (values, 20))
    ((name, (evaluation, beyond)),) = panels.items()
    assert name == chain.nodes[-1].name
    assert evaluation == sizes(stages, 20, train=False).total
    assert evaluation + beyond == sizes(stages, 20, train=True, watched=True).total


def _shapes(chain):
    weights = {name: mask.shape for name, mask in chain.masks.items()}
    for end in range(1, len(chain.nodes) + 1):
        yield stages_of(chain.nodes[:end], chain.in_shape, weights)[1]


def engine(spec, skip=()):
    shapes, rng = tensor_shapes(spec, Structure()), np.random.default_rng(0)
    weights = [node.params["weight"] for node in spec.nodes if node.params]
    masks = {name: rng.random(shapes[name]) < 0.3 for name in weights if name not in skip}
    made = NativeEngine()
    made.load(spec, Structure(), None, masks, Choice(4, {"": "sparse"}))
    for name, array in made.params.items():
        array[...] = rng.standard_normal(array.shape) * 0.3
        assert name in shapes
    return made


@needs_core
@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy", "sum"])
def test_the_engine_goes_straight_only_where_it_is_the_same(core, loss, monkeypatch):
    spec = cnn("straight", (1, 10, 10), 4, (Conv(4, 3, 1, 2),), (9,))
    one, two = engine(spec), engine(spec)
    x = np.random.default_rng(1).standard_normal((6, 1, 10, 10)).astype(FLOAT)
    labels = np.arange(6) % 4
    assert straight.whole(spec, one._stretches) is not None
    found = [one.forward_backward(x, labels, update=Update(0.1), loss=loss) for _ in range(3)]
    monkeypatch.setattr(straight, "whole", lambda *_: None)
    wanted = [two.forward_backward(x, labels, update=Update(0.1), loss=loss) for _ in range(3)]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_allclose(one.logits, two.logits, rtol=1e-4, atol=1e-5)
    for name in one.params:
        np.testing.assert_allclose(one.read(name), two.read(name), rtol=1e-4, atol=1e-5)


@needs_core
def test_a_model_that_is_not_one_stretch_goes_step_by_step(core):
    spec = mlp("plain", (2, 3), 3, (5,))
    made = engine(spec)
    assert straight.whole(spec, made._stretches) is not None  # a flatten before it is but another look
    part = engine(spec, skip=(spec.nodes[-1].params["weight"],))
    assert straight.whole(spec, part._stretches) is None
    x = np.ones((2, 2, 3), FLOAT)
    soft = np.full((2, 3), 1 / 3, FLOAT)
    stretch = straight.whole(spec, made._stretches)
    assert straight.learn(stretch, Wires(), x, soft, ("cross_entropy", 1.0)) is None
    with pytest.raises(DataError, match="labels"):
        straight.learn(stretch, Wires(update=[Update(0.1)]), x, np.zeros(3, np.int64), ("cross_entropy", 1.0))
    assert node_shapes(spec, Structure())[spec.nodes[-1].name] == (3,)
