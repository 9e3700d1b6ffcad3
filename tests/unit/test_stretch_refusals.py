"""What a stretch and a layout refuse, and how layouts know their places; by every maker."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edge_runtime.engines import Update
from edge_runtime.kernels.stretch import NativeStretch
from edge_runtime.kernels.twin import CLayout, TwinStretch
from edge_runtime.kernels.twin_steps import sparse_products
from tests.support.cores import order_of
from tests.support.stretches import KINDS, MAKERS, batch, build, draft, make, small
from wire.errors import SpecError
from wire.spec import Node

kinds = pytest.mark.parametrize("kind", MAKERS)
FLOAT = np.float32


@kinds
def test_what_a_backward_pass_must_have(kind):
    chain = small()
    made = make(kind, chain)
    x, dy = batch(chain, 2)
    made.stretch.forward(x, train=False)
    with pytest.raises(SpecError):
        made.stretch.backward(dy, grads=made.zeros(), update=None, input_gradient=True)
    made.stretch.forward(x, train=True)
    for grads, update in ((None, None), (made.zeros(), Update(0.1))):
        with pytest.raises(SpecError):
            made.stretch.backward(dy, grads=grads, update=update, input_gradient=True)
    with pytest.raises(SpecError):
        made.stretch.forward(x[:, :, :-1], train=True)
    with pytest.raises(SpecError):
        made.stretch.forward(x[0], train=True)


@kinds
def test_results_are_written_where_there_is_room_for_them_or_come_in_their_own(kind):
    chain = small()
    made, other = make(kind, chain), make(kind, chain)
    x, dy = batch(chain, 5)
    y, dx = np.full(dy.shape, 7, FLOAT), np.full(x.shape, 7, FLOAT)
    grads = made.zeros()
    writes = isinstance(made.stretch, NativeStretch)
    for train in (False, True):
        y.fill(7)
        found = made.stretch.forward(x, train=train, out=y)
        np.testing.assert_array_equal(found, other.stretch.forward(x, train=train))
        assert (found is y) == writes
        assert (y == 7).all() != writes
    back, plain = made.stretch.backward(dy, grads=grads, update=None, input_gradient=True, into=dx), other.zeros()
    np.testing.assert_array_equal(back, other.stretch.backward(dy, grads=plain, update=None, input_gradient=True))
    assert (back is dx) == writes
    assert (dx == 7).all() != writes
    for name, grad in plain.items():
        np.testing.assert_array_equal(grads[name], grad)
    made.stretch.forward(x, train=True)
    assert made.stretch.backward(dy, grads=grads, update=None, input_gradient=False, into=dx) is None


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if kind == "native"])
def test_the_core_writes_to_no_memory_of_another_form(kind):
    chain = small()
    made = make(kind, chain)
    x, dy = batch(chain, 5)
    frozen = dy.copy()
    frozen.flags.writeable = False
    odd = (dy[:-1], dy.astype(np.float64), np.ones((*dy.shape[:-1], 2 * dy.shape[-1]), FLOAT)[..., ::2], frozen)
    for wrong in odd:
        with pytest.raises(SpecError, match="memory for a result"):
            made.stretch.forward(x, train=True, out=wrong)
    made.stretch.forward(x, train=True)
    with pytest.raises(SpecError, match="memory for a result"):
        made.stretch.backward(dy, grads=made.zeros(), update=None, input_gradient=True, into=np.ones_like(x)[:-1])
    assert made.stretch.backward(dy, grads=made.zeros(), update=None, input_gradient=True) is not None


@kinds
@pytest.mark.parametrize(
    "nodes",
    [
        (Node("t", "tanh", ("input",)),),
        (Node("p", "avg_pool2d", ("input",), {}, {"kernel": 2, "stride": 2}),),
        (Node("p", "max_pool2d", ("input",), {}, {"kernel": 3, "stride": 2}),),
        (Node("p", "max_pool2d", ("input",), {}, {"kernel": 9, "stride": 9}),),
        (Node("a", "relu", ("input",)), Node("b", "relu", ("input",))),
        (Node("d", "linear", ("input",), {"weight": "w", "bias": "b"}),),
        (Node("s", "add", ("input", "input")),),
    ],
    ids=lambda nodes: nodes[-1].op,
)
def test_what_a_stretch_cannot_do_is_refused(kind, nodes):
    in_shape, params = (2, 6, 6), {}
    if nodes[0].op == "linear":  # one whose weight is not masked
        in_shape, params = (72,), {"w": np.ones((3, 72), FLOAT), "b": np.zeros(3, FLOAT)}
    with pytest.raises(SpecError):
        build(kind, nodes, in_shape, params, {})


@kinds
def test_weights_that_do_not_meet_are_refused(kind):
    chain = draft((5,)).add("linear", 3).chain()
    made = make(kind, chain)
    good = dict(made.stretch.params)
    long, double = np.zeros(len(good["n0.weight"]) + 1, FLOAT), good["n0.weight"].astype(np.float64)
    build(kind, chain.nodes, (5,), good, made.layouts)
    for in_shape, changed in (
        ((6,), {}),
        ((5, 1, 1), {}),
        ((5,), {"n0.weight": long}),
        ((5,), {"n0.weight": double}),
        ((5,), {"n0.weight": np.repeat(good["n0.weight"], 2)[::2]}),
        ((5,), {"n0.bias": np.zeros(4, FLOAT)}),
    ):
        with pytest.raises(SpecError):
            build(kind, chain.nodes, in_shape, good | changed, made.layouts)


@kinds
@pytest.mark.parametrize("mask", KINDS)
def test_layouts_know_their_places(kind, mask):
    chain = small(mask)
    made = make(kind, chain, (7, 2, 3))
    for name, layout in made.layouts.items():
        places = order_of(layout, chain.masks[name])
        assert layout.shape == chain.masks[name].shape
        assert layout.kept == len(places) == chain.masks[name].sum()
        assert np.array_equal(np.sort(places), np.flatnonzero(chain.masks[name]))
        assert np.array_equal(chain.dense[name].ravel()[places], made.stretch.params[name])
        assert layout.bytes_index >= layout.kept
    assert all(np.array_equal(array, chain.dense[name]) for name, array in made.dense(made.stretch.params).items())


@pytest.mark.parametrize("products", [None, False])
def test_the_twins_layout_is_in_c_order(products):
    mask = np.random.default_rng(0).random((30, 70)) < 0.2
    layout = CLayout.of(mask, products=products)
    values = np.arange(mask.sum(), dtype=np.float32)
    assert np.array_equal(layout.from_c_order(values), values)
    assert np.array_equal(layout.to_c_order(values), values)
    with pytest.raises(SpecError):
        layout.to_c_order(values[1:])
    if layout.rows is None:
        assert layout.bytes_index == 4 * layout.kept
    else:
        assert layout.bytes_index == 12 * layout.kept + 4 * (31 + 71)
    for positions in ([3, 3], [4, 1], [-1, 2], [0, 30 * 70]):
        with pytest.raises(SpecError):
            CLayout.at((30, 70), np.array(positions), products=products)
    for shape in ((30,), (30, 0), (1 << 16, 1 << 16)):
        with pytest.raises(SpecError):
            CLayout.at(shape, np.array([0]), products=products)


def test_a_torch_without_sparse_products_is_noticed(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("requires MKL")

    mask = np.eye(4, dtype=bool)
    rows = CLayout.of(mask, products=True)
    with monkeypatch.context() as patched:
        patched.setattr(torch.sparse, "sampled_addmm", refuse)
        sparse_products.cache_clear()
        assert CLayout.of(mask).rows is None
        node = Node("l", "linear", ("input",), {"weight": "w", "bias": "b"})
        with pytest.raises(SpecError, match="CSR"):
            TwinStretch((node,), (4,), {"w": np.ones(4, FLOAT), "b": np.ones(4, FLOAT)}, {"w": rows})
    sparse_products.cache_clear()
