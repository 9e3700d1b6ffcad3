"""Stretches by every maker against autograd of the dense masked model in float64, sums done by hand, and themselves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.engines import Update
from edge_runtime.engines.update import apply
from tests.support.stretches import (
    KINDS,
    MAKERS,
    Chain,
    agree,
    batch,
    chains,
    data,
    draft,
    make,
    numbers,
    oracle,
    small,
    threads,
)
from wire.errors import SpecError
from wire.spec import Node

kinds = pytest.mark.parametrize("kind", MAKERS)
blocks = st.tuples(st.sampled_from((1, 7, 64, 256)), st.integers(1, 9), st.integers(1, 9))
FLOAT = np.float32


@kinds
@settings(deadline=None, max_examples=90)
@given(drawn=chains(), sides=blocks)
def test_any_chain_is_its_dense_masked_model(kind, drawn, sides):
    chain, count, rng, whole = drawn
    chain, x, dy = data(chain, count, rng, whole)
    given_x, given_dy = x.copy(), dy.copy()
    agree(make(kind, chain, sides).step(x, dy), oracle(chain, x, dy), chain)
    assert np.array_equal(x, given_x)
    assert np.array_equal(dy, given_dy)


@kinds
@pytest.mark.parametrize("count", [1, 3, 4, 16, 20, 33])
@pytest.mark.parametrize("mask", KINDS)
def test_one_chain_of_everything(kind, mask, count):
    chain, x, dy = data(small(mask), count, np.random.default_rng(5), whole=mask in ("none", "one"))
    agree(make(kind, chain).step(x, dy), oracle(chain, x, dy), chain)


@kinds
@pytest.mark.parametrize(
    ("in_shape", "node", "density"),
    [
        ((3136,), ("linear", 256, {}), "0.05"),
        ((300,), ("linear", 100, {}), "0.3"),
        ((1600,), ("linear", 1500, {}), "0.9"),  # more than two million kept weights
        ((1, 28, 28), ("conv2d", 32, {"kernel": 5, "stride": 1, "padding": 2}), "0.1"),
        ((32, 14, 14), ("conv2d", 64, {"kernel": 5, "stride": 1, "padding": 2}), "0.1"),
        ((130, 7, 5), ("conv2d", 70, {"kernel": 3, "stride": 2, "padding": 1}), "0.2"),
        ((64, 4, 4), ("conv2d", 96, {"kernel": 1, "stride": 1, "padding": 0}), "0.1"),
    ],
)
def test_layers_of_real_sizes(kind, in_shape, node, density):
    op, out, attrs = node
    chain = draft(in_shape, density).add(op, out, **attrs).chain()
    x, dy = batch(chain, 20)
    agree(make(kind, chain, (256, 32, 32)).step(x, dy), oracle(chain, x, dy), chain)


@kinds
def test_linear_by_hand(kind):
    mask = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]], bool)
    dense = {"w": np.array([[2, 0, -1], [0, 0, 0], [0, 3, 0]], FLOAT), "b": np.array([0.5, 1, -4], FLOAT)}
    node = Node("l", "linear", ("input",), {"weight": "w", "bias": "b"})
    relu = Node("r", "relu", ("l",))
    x = np.array([[1, 2, 3], [4, 5, 6]], FLOAT)
    made = make(kind, Chain((node, relu), (3,), (3,), dense, {"w": mask}))
    # 2 - 3 + .5 = -.5 and 8 - 6 + .5 = 2.5; the second row has its bias alone; 6 - 4 = 2 and 15 - 4 = 11.
    y, grads, dx = made.step(x, np.array([[1, 10, 100], [2, 20, 200]], FLOAT))
    assert y.tolist() == [[0, 1, 2], [2.5, 1, 11]]
    assert grads["w"].tolist() == [[8, 0, 12], [0, 0, 0], [0, 200 + 1000, 0]]
    assert grads["b"].tolist() == [2, 30, 300]
    assert dx.tolist() == [[0, 300, 0], [4, 600, -2]]


@kinds
def test_convolution_and_pool_by_hand(kind):
    mask = np.array([[[[0, 1], [0, 0]], [[0, 0], [1, 0]]]], bool)
    dense = {"w": np.where(mask, FLOAT(2), FLOAT(0)), "b": np.array([-1], FLOAT)}
    conv = Node("c", "conv2d", ("input",), {"weight": "w", "bias": "b"}, {"kernel": 2, "stride": 1, "padding": 0})
    pool = Node("p", "max_pool2d", ("c",), {}, {"kernel": 2, "stride": 2})
    x = np.array([[[[0, 1, 2], [3, 4, 5], [6, 7, 8]], [[0, 0, 0], [0, 0, 9], [1, 1, 1]]]], FLOAT)
    made = make(kind, Chain((conv, pool), (2, 3, 3), (1, 1, 1), dense, {"w": mask}))
    # 2 * first[i, j + 1] + 2 * second[i + 1, j] - 1: [[1, 3], [9, 11]], the largest is at (1, 1).
    y, grads, dx = made.step(x, np.array([[[[3]]]], FLOAT))
    assert y.tolist() == [[[[11]]]]
    assert grads["w"].tolist() == [[[[0, 15], [0, 0]], [[0, 0], [3, 0]]]]
    assert grads["b"].tolist() == [3]
    wanted = np.zeros((1, 2, 3, 3))
    wanted[0, 0, 1, 2] = wanted[0, 1, 2, 1] = 6
    assert np.array_equal(dx, wanted)


@kinds
def test_of_equal_values_the_first_gets_the_gradient(kind):
    made = draft((2, 6, 7), "none", whole=True).add("conv2d", 3, kernel=3, stride=1, padding=1)
    made.add("max_pool2d", kernel=2, stride=2).add("conv2d", 2, kernel=3, stride=1, padding=1)
    chain = made.chain()
    x, dy = batch(chain, 5)
    agree(make(kind, chain).step(x, dy), oracle(chain, x, dy), chain)
    pool = draft((1, 3, 4)).add("max_pool2d", kernel=2, stride=2).chain()
    x = np.array([[[[1, 1, 0, 2], [1, 1, 2, 2], [9, 9, 9, 9]]]], FLOAT)
    _, _, dx = make(kind, pool).step(x, np.array([[[[5, 7]]]], FLOAT))
    assert dx.tolist() == [[[[5, 0, 0, 7], [0, 0, 0, 0], [0, 0, 0, 0]]]]


@kinds
def test_gradients_meet_finite_differences(kind):
    made = draft((2, 5, 6), whole=True).add("conv2d", 4, kernel=3, stride=2, padding=1).add("relu").add("flatten")
    chain = made.add("linear", 7).chain()
    chain.dense["n0.bias"] += 0.5  # of integers and a half none is near the kink, and all sums here are exact
    made = make(kind, chain)
    x, dy = (np.rint(array) for array in batch(chain, 4))
    _, grads, dx = made.step(x, dy)
    rng = np.random.default_rng(2)

    def slope(array, place, step=2.0**-10):
        before, sums = array[place], []
        for moved in (before + step, before - step):
            array[place] = moved
            sums.append(float((made.stretch.forward(x, train=False).astype(np.float64) * dy).sum()))
        array[place] = before
        return (sums[0] - sums[1]) / (2 * step)

    for name, array in made.stretch.params.items():
        wanted = made.kept(grads)[name]
        for place in rng.integers(0, len(array), 6):
            assert slope(array, place) == pytest.approx(wanted[place], rel=1e-3), name
    for place in zip(*(rng.integers(0, side, 9) for side in x.shape), strict=True):
        assert slope(x, place) == pytest.approx(dx[place], rel=1e-3)


@kinds
def test_gradients_are_added(kind):
    chain = small()
    made = make(kind, chain)
    x, dy = batch(chain, 6)
    _, once, _ = made.step(x, dy)
    rng = np.random.default_rng(3)
    start = {name: numbers(rng, array.shape) for name, array in made.zeros().items()}
    grads = {name: array.copy() for name, array in start.items()}
    for _ in range(2):
        made.stretch.forward(x, train=True)
        assert made.stretch.backward(dy, grads=grads, update=None, input_gradient=False) is None
    for name, gained in made.dense({name: grads[name] - start[name] for name in grads}).items():
        np.testing.assert_allclose(gained, 2 * once[name], atol=2e-5 * np.abs(once[name]).max() + 1e-6, err_msg=name)


@kinds
@settings(deadline=None, max_examples=20)
@given(
    mask=st.sampled_from(KINDS),
    count=st.integers(1, 24),
    momentum=st.sampled_from((0.0, 0.9)),
    decay=st.sampled_from((0.0, 0.01)),
    pull=st.sampled_from((0.0, 0.3)),
    seed=st.integers(0, 99),
)
def test_an_update_is_reading_gradients_and_applying_them(kind, mask, count, momentum, decay, pull, seed):
    chain = small(mask, seed)
    x, dy = batch(chain, count, seed)
    fused, plain = make(kind, chain), make(kind, chain)
    rng = np.random.default_rng(seed)
    first = {name: numbers(rng, array.shape) for name, array in fused.zeros().items()}
    anchor = {name: numbers(rng, array.shape) for name, array in first.items()} if pull else None

    def update(velocity):
        return Update(0.05, momentum, decay, pull, velocity if momentum else None, anchor)

    velocities = [{name: array.copy() for name, array in first.items()} for _ in range(2)]
    for _ in range(2):
        grads = plain.zeros()
        for made in (fused, plain):
            made.stretch.forward(x, train=True)
        dx = fused.stretch.backward(dy, grads=None, update=update(velocities[0]), input_gradient=True)
        wanted = plain.stretch.backward(dy, grads=grads, update=None, input_gradient=True)
        apply(plain.stretch.params, grads, update(velocities[1]))
        np.testing.assert_allclose(dx, wanted, atol=2e-5 * np.abs(wanted).max())
    for found, wanted in ((fused.stretch.params, plain.stretch.params), (velocities[0], velocities[1])):
        for name, array in wanted.items():
            allowed = 2e-5 * np.abs(array).max(initial=0)
            np.testing.assert_allclose(found[name], array, atol=allowed, rtol=0, err_msg=name)


@kinds
def test_the_arrays_stay_the_callers(kind):
    chain = small()
    made = make(kind, chain)
    x, dy = batch(chain, 3)
    for array in made.stretch.params.values():
        np.multiply(array, 0.5, out=array)  # as a rule does, that writes to the weights
    halved = {name: array / 2 for name, array in chain.dense.items()}
    other = Chain(chain.nodes, chain.in_shape, chain.out_shape, halved, chain.masks)
    agree(made.step(x, dy), oracle(other, x, dy), chain)
    before = {name: array.copy() for name, array in made.stretch.params.items()}
    made.step(x, dy)
    assert all(np.array_equal(array, before[name]) for name, array in made.stretch.params.items())


@kinds
def test_an_output_may_be_written_to(kind):
    chain = draft((4, 5, 5)).add("conv2d", 3, kernel=3, stride=1, padding=1).add("relu").chain()
    made = make(kind, chain)
    x, dy = batch(chain, 4)
    grads = made.zeros()
    made.stretch.forward(x, train=True)[...] = -1
    dx = made.stretch.backward(dy, grads=grads, update=None, input_gradient=True)
    answer = oracle(chain, x, dy)
    agree((answer.y.astype(FLOAT), made.dense(grads), dx), answer, chain)


@kinds
def test_batches_of_changing_size(kind):
    chain = small()
    made = make(kind, chain)
    for count in (5, 40, 1, 16, 17, 2, 40):
        x, dy = batch(chain, count, count)
        agree(made.step(x, dy), oracle(chain, x, dy), chain)


@kinds
def test_the_latest_pass_counts(kind):
    chain = small()
    made = make(kind, chain)
    x, dy = batch(chain, 7)
    other, _ = batch(chain, 30, 9)
    grads = made.zeros()
    made.stretch.forward(other, train=True)
    y = made.stretch.forward(x, train=True)
    dx = made.stretch.backward(dy, grads=grads, update=None, input_gradient=True)
    agree((y, made.dense(grads), dx), oracle(chain, x, dy), chain)
    trained = made.stretch.forward(other, train=True)
    assert np.array_equal(made.stretch.forward(other, train=False), trained)
    with pytest.raises(SpecError):  # nothing is kept for it any more
        made.stretch.backward(dy, grads=grads, update=None, input_gradient=True)


@kinds
def test_inputs_laid_out_in_any_way(kind):
    chain = small()
    x, dy = batch(chain, 6)
    answer = oracle(chain, x, dy)
    frozen = x.copy()
    frozen.flags.writeable = False
    backwards = np.ascontiguousarray(x[..., ::-1])[..., ::-1]
    for laid in (np.asfortranarray(x), np.repeat(x, 2, axis=0)[::2], backwards, frozen):
        agree(make(kind, chain).step(laid, np.asfortranarray(dy)), answer, chain)


@kinds
@pytest.mark.parametrize("count", [1, 2])
def test_the_same_order_gives_the_same_bits(kind, count):
    chain = small("0.3")
    x, dy = batch(chain, 20)
    with threads(kind, count):
        first, second = make(kind, chain), make(kind, chain)
        runs = [first.step(x, dy), second.step(x.copy(), dy.copy()), first.step(x, dy)]
    for y, grads, dx in runs[1:]:
        assert np.array_equal(y, runs[0][0])
        assert np.array_equal(dx, runs[0][2])
        assert all(np.array_equal(array, runs[0][1][name]) for name, array in grads.items())
    agree(runs[0], oracle(chain, x, dy), chain)


@kinds
@pytest.mark.parametrize("count", [2, 3])
def test_threads_do_not_change_what_is_computed(kind, count):
    made = draft((16, 14, 14), "0.2").add("conv2d", 48, kernel=3, stride=1, padding=1).add("relu")
    made.add("max_pool2d", kernel=2, stride=2).add("flatten").add("linear", 200).add("relu").add("linear", 10)
    chain, x, dy = data(made.chain(), 20, np.random.default_rng(0), whole=False)
    with threads(kind, count):
        agree(make(kind, chain, (256, 4, 8)).step(x, dy), oracle(chain, x, dy), chain)


@kinds
def test_stretches_without_weights(kind):
    chain = draft((2, 6, 6)).add("max_pool2d", kernel=3, stride=3).add("relu").add("flatten").chain()
    x, dy = batch(chain, 5)
    made = make(kind, chain)
    made.stretch.forward(x, train=True)  # the pool's gradient is made all the same, and must have its room
    assert made.stretch.backward(dy, grads={}, update=None, input_gradient=False) is None
    agree(made.step(x, dy), oracle(chain, x, dy), chain)
