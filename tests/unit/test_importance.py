"""Squared gradients in row blocks against autograd of the dense layer in float64, loops, and a bound on memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.kernels.importance import Passed, row_blocks, top, whole
from wire.errors import DataError, SpecError

FLOAT = np.float32


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(FLOAT)


def squares(passed):
    """The definition: the squared gradient of the weights of a dense layer, by autograd in float64."""
    weight = torch.zeros(passed.shape, dtype=torch.float64, requires_grad=True)
    for x, dy in passed.batches:
        seen, came = (torch.tensor(array, dtype=torch.float64) for array in (x, dy))
        options = passed.stride, passed.padding, passed.dilation
        y = F.linear(seen, weight) if len(passed.shape) == 2 else F.conv2d(seen, weight, None, *options)
        y.backward(came)
    return weight.grad.numpy() ** 2


def gathered(passed, block_bytes=1 << 20):
    result, rows = np.full(passed.shape, np.nan, FLOAT), 0
    for first, block in row_blocks(passed, block_bytes):
        assert first == rows
        assert block.nbytes <= block_bytes or len(block) == 1
        rows += len(block)
        result[first:rows] = block
    assert rows == passed.shape[0]
    return result


@st.composite
def linears(draw):
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    out, width = draw(st.integers(1, 40)), draw(st.integers(1, 50))
    counts = draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    return Passed((out, width), tuple((normal(rng, n, width), normal(rng, n, out)) for n in counts))


@st.composite
def convs(draw):
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    kernel, stride, dilation = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    padding = draw(st.integers(0, 5))
    reach = dilation * (kernel - 1) + 1
    height, width = (draw(st.integers(max(1, reach - 2 * padding), reach + 6)) for _ in range(2))
    shape = (draw(st.integers(1, 7)), draw(st.integers(1, 5)), kernel, kernel)
    sides = [(side + 2 * padding - reach) // stride + 1 for side in (height, width)]
    counts = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    batches = tuple((normal(rng, n, shape[1], height, width), normal(rng, n, shape[0], *sides)) for n in counts)
    return Passed(shape, batches, stride, padding, dilation)


@settings(deadline=None, max_examples=60)
@given(passed=linears() | convs(), block_bytes=st.sampled_from((1, 200, 1000, 1 << 20)))
def test_blocks_are_the_squared_gradient_of_the_dense_layer(passed, block_bytes):
    wanted = squares(passed)
    np.testing.assert_allclose(gathered(passed, block_bytes), wanted, rtol=0, atol=4e-5 * wanted.max() + 1e-9)


@settings(deadline=None, max_examples=50)
@given(passed=linears() | convs(), count=st.integers(0, 3000), block_bytes=st.sampled_from((1, 300, 1 << 20)))
def test_the_largest_are_those_of_a_stable_sort(passed, count, block_bytes):
    dense = gathered(passed, block_bytes).ravel()
    order = np.argsort(-dense, kind="stable")[:count]
    places, values = top(passed, count, block_bytes)
    assert places.dtype == np.int64
    assert values.dtype == FLOAT
    assert np.array_equal(places, order)
    assert np.array_equal(values, dense[order])


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 999), count=st.integers(0, 60), block_bytes=st.sampled_from((1, 40, 90)))
def test_of_equal_values_the_lowest_positions_are_taken(seed, count, block_bytes):
    rng = np.random.default_rng(seed)
    x, dy = (rng.integers(-1, 2, (1, side)).astype(FLOAT) for side in (7, 8))
    passed = Passed((8, 7), ((x, dy),))  # nothing but zeros and ones
    dense = (dy.T @ x).ravel() ** 2
    order = np.argsort(-dense, kind="stable")[:count]
    places, values = top(passed, count, block_bytes)
    assert places.tolist() == order.tolist()
    assert values.tolist() == dense[order].tolist()


def test_a_matrix_by_hand():
    x = np.array([[1, 2, 0], [0, 1, -1]], FLOAT)
    dy = np.array([[1, 3], [2, -1]], FLOAT)
    # The gradient is [[1, 2 + 2, -2], [3, 6 - 1, 1]].
    passed = Passed((2, 3), ((x, dy),))
    into = np.ones((2, 3), FLOAT)
    whole(passed, into)
    assert into.tolist() == [[2, 17, 5], [10, 26, 2]]
    places, values = top(passed, 3)
    assert (places.tolist(), values.tolist()) == ([4, 1, 3], [25, 16, 9])
    # One sample at a time, summed before squaring: the same.
    again = np.ones((2, 3), FLOAT)
    whole(Passed((2, 3), tuple((x[n : n + 1], dy[n : n + 1]) for n in range(2))), again, block_bytes=4)
    assert again.tolist() == into.tolist()


def test_a_convolution_by_loops():
    rng = np.random.default_rng(0)
    x, dy = normal(rng, 2, 3, 5, 4), normal(rng, 2, 2, 3, 2)
    wanted = np.zeros((2, 3, 3, 3))
    for n, o, i, j, c, a, b in np.ndindex(2, 2, 3, 2, 3, 3, 3):
        row, column = 2 * i + a - 1, 2 * j + b - 1
        if 0 <= row < 5 and 0 <= column < 4:
            wanted[o, c, a, b] += float(dy[n, o, i, j]) * float(x[n, c, row, column])
    found = gathered(Passed((2, 3, 3, 3), ((x, dy),), stride=2, padding=1))
    np.testing.assert_allclose(found, wanted**2, rtol=1e-4)


def test_arrays_laid_out_in_any_way():
    rng = np.random.default_rng(0)
    x, dy = normal(rng, 4, 3, 6, 6), normal(rng, 4, 5, 6, 6)
    plain = gathered(Passed((5, 3, 3, 3), ((x, dy),), padding=1))
    turned = gathered(Passed((5, 3, 3, 3), ((np.asfortranarray(x), np.asfortranarray(dy)),), padding=1))
    np.testing.assert_allclose(turned, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "x", "dy"),
    [((1000, 600), (8, 600), (8, 1000)), ((96, 96, 3, 3), (8, 96, 5, 5), (8, 96, 5, 5))],
    ids=["linear", "conv2d"],
)
def test_no_dense_gradient_is_ever_held(shape, x, dy):
    rng = np.random.default_rng(0)
    passed = Passed(shape, ((normal(rng, *x), normal(rng, *dy)), (normal(rng, *x), normal(rng, *dy))), 1, 1)
    dense, block = 4 * int(np.prod(shape)), 1 << 15
    tracemalloc.start()
    try:
        for _ in row_blocks(passed, block):
            pass
        blocks = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        top(passed, 1000, block)
        selection = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert blocks < 4 * block < dense / 2
    assert selection < 10 * block < dense


def test_what_does_not_meet_is_refused():
    x, dy = np.ones((2, 3), FLOAT), np.ones((2, 4), FLOAT)
    image, back = np.ones((2, 3, 5, 5), FLOAT), np.ones((2, 4, 3, 3), FLOAT)
    for passed in (
        Passed((4, 3), ()),
        Passed((3, 4), ((x, dy),)),
        Passed((4, 3), ((x, dy[:1]),)),
        Passed((4,), ((x, dy),)),
        Passed((4, 3), ((image, back),)),
        Passed((4, 3, 3, 3), ((x, dy),)),
        Passed((4, 3, 3, 3), ((image, back),), padding=1),
        Passed((4, 3, 3, 3), ((image, back),), stride=2),
    ):
        with pytest.raises(SpecError):
            list(row_blocks(passed))


def test_what_is_not_finite_is_refused():
    x = np.ones((1, 3), FLOAT)
    for bad in (np.nan, np.inf, 1e30):
        with pytest.raises(DataError, match="rows 0 to 3"):
            top(Passed((4, 3), ((x, np.array([[1, 1, bad, 1]], FLOAT)),)), 2)
