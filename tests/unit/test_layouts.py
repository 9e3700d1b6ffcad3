"""Layouts that the compiled core makes of a mask's bits, against ones written with loops, and by hand."""

import ctypes
import dataclasses
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_runtime.kernels.conv import ConvLayout, blocks
from edge_runtime.kernels.linear import LinearLayout
from tests.support import cores
from wire.errors import DeviceError, SpecError
from wire.masks import Bits, bits_at, packed

PLAIN = (1, 1, 1)
SHAPE, STARTS = 1, 2
AGAIN = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=cores.CORES, ids=cores.name)
def core(request):
    return cores.ready(request.param)


@st.composite
def masks(draw, *most, square=False):
    shape = [draw(st.integers(1, side)) for side in most]
    shape += shape[-1:] * square
    density = draw(st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0]))
    return np.random.default_rng(draw(st.integers(0, 99))).random(shape) < density


def naive_matrix(mask, block):
    """(starts, index, order) by loops."""
    starts, index, order = [], [], []
    rows, columns = mask.shape
    for first in range(0, columns, block):
        line = [len(index)]
        for r in range(rows):
            for c in range(first, min(first + block, columns)):
                if mask[r, c]:
                    index.append(c - first)
                    order.append(r * columns + c)
            line.append(len(index))
        starts.append(line)
    return starts, index, order


def naive(mask, in_block, out_block):
    """(starts, codes, order, starts_t, codes_t, positions of the transposed list's values) by loops."""
    outs, ins, side, _ = mask.shape
    taps = side * side
    starts, codes, order, starts_t, codes_t, places = [], [], [], [], [], []
    for first in range(0, ins, in_block):
        row = [len(codes)]
        for o in range(outs):
            for c in range(first, min(first + in_block, ins)):
                for t in range(taps):
                    if mask[o, c].flat[t]:
                        codes.append((c - first) * taps + t)
                        order.append((o * ins + c) * taps + t)
            row.append(len(codes))
        starts.append(row)
    for first in range(0, outs, out_block):
        row = [len(codes_t)]
        for c in range(ins):
            for o in range(first, min(first + out_block, outs)):
                for t in range(taps):
                    if mask[o, c].flat[t]:
                        codes_t.append((o - first) * taps + t)
                        places.append(order.index((o * ins + c) * taps + t) - starts[c // in_block][first])
            row.append(len(codes_t))
        starts_t.append(row)
    return starts, codes, order, starts_t, codes_t, places


def test_a_convolution_by_hand(core):
    mask = np.zeros((2, 3, 2, 2), bool)
    mask[0, 0, 0, 1] = mask[0, 2, 1, 0] = mask[1, 0, 0, 0] = mask[1, 1, 1, 1] = True
    layout = ConvLayout.of(core, packed(mask), (1, 0, 1), 2, 1)
    assert layout.starts.tolist() == [[0, 1, 3], [3, 4, 4]]  # channels 0 and 1, then channel 2
    assert layout.codes.tolist() == [1, 0, 4 + 3, 2]
    assert cores.order_of(layout, mask).tolist() == [1, 12, 12 + 4 + 3, 8 + 2]
    assert layout.starts_t.tolist() == [[0, 1, 1, 2], [2, 3, 4, 4]]
    assert layout.codes_t.tolist() == [1, 2, 0, 3]
    assert layout.places.tolist() == [0, 0, 0, 1]  # from 0, 3, 1 and 1
    assert (layout.kept, layout.shape, layout.bytes_index) == (4, (2, 3, 2, 2), 4 * (6 + 8) + 6 * 4)
    values = np.array([10, 20, 30, 40], np.float32)
    assert layout.to_c_order(values).tolist() == [10, 40, 20, 30]
    assert layout.from_c_order(layout.to_c_order(values)).tolist() == values.tolist()


@AGAIN
@given(mask=masks(7, 7, 4, square=True), in_block=st.integers(1, 8), out_block=st.integers(1, 8))
def test_a_convolution_as_loops(core, mask, in_block, out_block):
    layout = ConvLayout.of(core, packed(mask), (2, 1, 3), in_block, out_block)
    starts, codes, order, starts_t, codes_t, places = naive(mask, in_block, out_block)
    assert layout.starts.tolist() == starts
    assert layout.codes.tolist() == codes
    assert cores.order_of(layout, mask).tolist() == order
    assert layout.starts_t.tolist() == starts_t
    assert layout.codes_t.tolist() == codes_t
    assert layout.places.tolist() == places
    assert layout.kept == mask.sum()
    call = layout.call
    assert (call.out_channels, call.in_channels, call.kernel, call.kept) == (*mask.shape[:3], mask.sum())
    assert (call.stride, call.padding, call.dilation) == (2, 1, 3)
    assert (call.in_blocks, call.out_blocks) == (len(starts), len(starts_t))
    first = ctypes.cast(call.starts, ctypes.POINTER(ctypes.c_int32))
    assert first[len(mask)] == starts[0][-1]


@AGAIN
@given(mask=masks(9, 200), block=st.sampled_from([1, 7, 8, 63, 64, 65, 256, 300]))
def test_a_matrix_as_loops(core, mask, block):
    layout = LinearLayout.of(core, packed(mask), block)
    starts, index, order = naive_matrix(mask, block)
    assert layout.starts.tolist() == starts
    assert layout.index.tolist() == index
    assert cores.order_of(layout, mask).tolist() == order
    values = np.arange(layout.kept, dtype=np.float32)
    assert layout.to_c_order(layout.from_c_order(values)).tolist() == values.tolist()
    assert layout.kept == mask.sum()


def test_a_wide_matrix_has_wide_columns(core):
    mask = np.random.default_rng(0).random((3, 70_000)) < 0.01
    for block, kind in ((256, np.uint8), (257, np.uint16), (1 << 20, np.uint16)):
        layout = LinearLayout.of(core, packed(mask), block)
        starts, index, order = naive_matrix(mask, min(block, 1 << 16))
        assert layout.index.dtype == kind
        assert (layout.starts.tolist(), layout.index.tolist()) == (starts, index)
        assert cores.order_of(layout, mask).tolist() == order


def test_refused(core):
    dense = np.ones((4, 4, 3, 3), bool)
    for wrong in (dense[0], np.ones((4, 4, 3, 2), bool), np.ones((0, 4, 3, 3), bool)):
        with pytest.raises(SpecError):
            ConvLayout.of(core, packed(wrong), PLAIN, 4, 4)
    for geometry in ((0, 1, 1), (1, -1, 1), (1, 1, 0)):
        with pytest.raises(SpecError):
            ConvLayout.of(core, packed(dense), geometry, 4, 4)
    for in_block, out_block in ((0, 4), (4, -1)):
        with pytest.raises(SpecError):
            ConvLayout.of(core, packed(dense), PLAIN, in_block, out_block)
    for shape, block in (((4, 4, 3, 3), 4), ((0, 4), 4), ((4, 4), 0)):
        with pytest.raises(SpecError):
            LinearLayout.of(core, packed(np.ones(shape, bool)), block)
    wide = packed(np.zeros((1, 7300, 3, 3), bool))  # 7300 * 9 codes do not fit 16 bits
    with pytest.raises(SpecError, match="7300"):
        ConvLayout.of(core, wide, PLAIN, 7300, 1)
    assert ConvLayout.of(core, wide, PLAIN, 7281, 1).kept == 0
    full = packed(np.ones((257, 256, 1, 1), bool))  # 65 792 in one pair of blocks, 65 536 at most
    with pytest.raises(SpecError, match="share"):
        ConvLayout.of(core, full, (1, 0, 1), 256, 257)
    assert ConvLayout.of(core, full, (1, 0, 1), 256, 256).kept == full.kept


@pytest.mark.parametrize("change", [-1, 1, 9])
def test_bits_that_say_another_number_are_refused(core, change):
    """Whoever built them: nothing is written beyond what was made for so many."""
    rng = np.random.default_rng(1)
    for shape, make in (((30, 70), _matrix), ((6, 5, 3, 3), _convolution)):
        mask = packed(rng.random(shape) < 0.3)
        with pytest.raises(DeviceError, match="starts"):
            make(core, dataclasses.replace(mask, kept=mask.kept + change))
        short = Bits(mask.shape, mask.line[:-1], mask.kept)
        with pytest.raises(DeviceError, match="shape"):
            make(core, short)


def _matrix(core, mask):
    return LinearLayout.of(core, mask, 16)


def _convolution(core, mask):
    return ConvLayout.of(core, mask, PLAIN, 2, 3)


def test_values_are_brought_into_order_only_as_many_as_there_are(core):
    layout = _matrix(core, packed(np.random.default_rng(1).random((30, 70)) < 0.3))
    for values in (np.zeros(layout.kept - 1, np.float32), np.zeros((layout.kept, 1), np.float32)):
        with pytest.raises(SpecError, match="values of shape"):
            layout.to_c_order(values)
    starts, to = layout.starts.copy(), np.zeros(layout.kept, np.float32)
    starts[0, 3] += 50
    give = core.calls.nk_reorder
    sizes = (len(starts), starts.shape[1] - 1, layout.kept)
    assert give(starts.ctypes.data, *sizes, to.ctypes.data, to.ctypes.data, 0) == STARTS
    assert give(starts.ctypes.data, 0, *sizes[1:], to.ctypes.data, to.ctypes.data, 0) == SHAPE


@pytest.mark.parametrize("make", [_matrix, _convolution])
def test_nothing_is_made_but_the_layout(core, make):
    shape = (1024, 2048) if make is _matrix else (512, 512, 3, 3)
    mask = bits_at([np.arange(0, int(np.prod(shape)), 100)], shape)
    tracemalloc.start()
    layout = make(core, mask)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < layout.bytes_index + 10_000
    if make is _convolution:
        assert layout.bytes_index == 6 * layout.kept + 4 * (256 * 513 + 171 * 513)


@given(
    st.tuples(st.integers(1, 600), st.integers(1, 600), st.sampled_from([1, 3, 5, 11])),
    st.integers(1, 64),
    st.sampled_from([0.0, 0.001, 0.01, 0.1, 1.0]),
)
def test_blocks(shape, side, density):
    outs, ins, kernel = shape
    found = blocks((outs, ins, kernel, kernel), side, density)
    assert 1 <= len(found) <= 4
    assert len(set(found)) == len(found)
    for in_block, out_block in found:
        assert 1 <= in_block <= ins
        assert 1 <= out_block <= outs
        assert max(in_block, out_block) * kernel * kernel <= 1 << 16
