"""Stretches of several Python threads at once, and what is no number: it stays none; by every maker."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from tests.support.stretches import MAKERS, batch, draft, make, small, threads

kinds = pytest.mark.parametrize("kind", MAKERS)
NAN = np.float32(np.nan)
TURNS = 60


def wide(seed):
    """Big enough that the compiled core shares its work out."""
    made = draft((6, 20, 20), "0.3", seed).add("conv2d", 16, kernel=3, stride=1, padding=1).add("relu")
    made.add("max_pool2d", kernel=2, stride=2).add("flatten").add("linear", 120).add("relu")
    return made.add("linear", 10).chain()


def same(kind, found, wanted):
    """Bit by bit for the core; torch may share its sums out otherwise in another Python thread."""
    pairs = [(found[0], wanted[0]), (found[2], wanted[2]), *((found[1][name], wanted[1][name]) for name in wanted[1])]
    if kind == "native":
        return all(np.array_equal(a, b) for a, b in pairs)
    return all(np.allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max()) for a, b in pairs)


@kinds
def test_two_python_threads_at_once(kind):
    chains = [wide(0), wide(1)]
    layers = [make(kind, chain, (64, 3, 4)) for chain in chains]
    given = [batch(chain, 23, seed) for seed, chain in enumerate(chains)]
    wanted = [layer.step(*arrays) for layer, arrays in zip(layers, given, strict=True)]
    right = [0, 0]
    start = threading.Barrier(2)

    def hammer(place):
        start.wait()
        for _ in range(TURNS):
            right[place] += same(kind, layers[place].step(*given[place]), wanted[place])

    with threads(kind, 2):
        crew = [threading.Thread(target=hammer, args=(place,)) for place in range(2)]
        for thread in crew:
            thread.start()
        for thread in crew:
            thread.join()
    assert right == [TURNS, TURNS]


def spread(kind, chain, name, x, place):
    """Run a chain with NaN at one place of its input, or of a weight or bias: where its output is none, and the rest."""
    made = make(kind, chain)
    if name == "input":
        x = x.copy()
        x.flat[place] = NAN
    else:
        made.stretch.params[name].flat[place] = NAN
    return made.stretch.forward(x, train=False)


@kinds
@pytest.mark.parametrize("count", [1, 7, 16, 29])
def test_nan_stays_through_a_relu_of_a_linear_layer(kind, count):
    chain = draft((9,), "1").add("linear", 5).add("relu").chain()
    x, _ = batch(chain, count)
    whole = make(kind, chain).stretch.forward(x, train=False)
    y = spread(kind, chain, "input", x, 9 * (count - 1) + 4)
    assert np.isnan(y[-1]).all()
    assert np.array_equal(y[:-1], whole[:-1])
    for name in ("n0.weight", "n0.bias"):
        y = spread(kind, chain, name, x, 0)  # of output 0
        assert np.isnan(y[:, 0]).all()
        assert np.allclose(y[:, 1:], whole[:, 1:])


@kinds
@pytest.mark.parametrize("before", [(), ("relu",)])
@pytest.mark.parametrize("side", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 7, 16, 29])
def test_nan_stays_through_a_pool(kind, before, side, count):
    """A convolution that copies its input, so that the NaN is at each place of a window in turn."""
    made = draft((1, 6, 6), "1").add("conv2d", 1, kernel=1, stride=1, padding=0)
    for op in before:
        made.add(op)
    chain = made.add("max_pool2d", kernel=side, stride=side).chain()
    x, _ = batch(chain, count)
    whole = make(kind, chain).stretch.forward(x, train=False)
    for row in range(side):
        for column in range(side):
            y = spread(kind, chain, "input", x, 36 * (count - 1) + 6 * row + column)
            hit = np.zeros(y.shape, bool)
            hit[-1, 0, 0, 0] = True
            assert np.array_equal(np.isnan(y), hit)
            assert np.array_equal(y[~hit], whole[~hit])
    assert np.isnan(spread(kind, chain, "n0.weight", x, 0)).all()


@kinds
@pytest.mark.parametrize("name", ["n0.weight", "n0.bias", "n3.weight", "n6.weight", "n8.bias"])
def test_nan_in_a_weight_comes_out(kind, name):
    chain = small("1")
    x, _ = batch(chain, 5)
    y = spread(kind, chain, name, x, 0)
    assert np.isnan(y if name != "n8.bias" else y[:, 0]).all()


@kinds
@pytest.mark.parametrize("pooled", [False, True])
def test_a_relu_lets_the_gradient_pass_where_its_output_is_nan(kind, pooled):
    made = draft((1, 4, 4), "1").add("conv2d", 1, kernel=1, stride=1, padding=0).add("relu")
    chain = (made.add("max_pool2d", kernel=2, stride=2) if pooled else made).chain()
    x, dy = batch(chain, 2)
    x[0, 0, 1, 1] = NAN
    built = make(kind, chain)
    built.stretch.params["n0.weight"][:], built.stretch.params["n0.bias"][:] = 1, -99
    _, grads, dx = built.step(x, np.ones_like(dy))
    assert dx[0, 0, 1, 1] == grads["n0.bias"][0] == 1
    assert np.count_nonzero(dx) == 1
