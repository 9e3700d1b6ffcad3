"""The layout of a masked convolution, against one written with loops, and by hand."""

import ctypes
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.kernels import from_c_order, to_c_order
from edge_runtime.kernels.conv import ConvLayout, blocks
from wire.errors import SpecError


@st.composite
def masks(draw):
    outs, ins, side = (draw(st.integers(1, most)) for most in (7, 7, 4))
    density = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    return np.random.default_rng(draw(st.integers(0, 99))).random((outs, ins, side, side)) < density


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


def test_by_hand():
    mask = np.zeros((2, 3, 2, 2), bool)
    mask[0, 0, 0, 1] = mask[0, 2, 1, 0] = mask[1, 0, 0, 0] = mask[1, 1, 1, 1] = True
    layout = ConvLayout.of(mask, 1, 0, 2, 1)
    assert layout.starts.tolist() == [[0, 1, 3], [3, 4, 4]]  # channels 0 and 1, then channel 2
    assert layout.codes.tolist() == [1, 0, 4 + 3, 2]
    assert layout.order().tolist() == [1, 12, 12 + 4 + 3, 8 + 2]
    assert layout.starts_t.tolist() == [[0, 1, 1, 2], [2, 3, 4, 4]]
    assert layout.codes_t.tolist() == [1, 2, 0, 3]
    assert layout.places.tolist() == [0, 0, 0, 1]  # from 0, 3, 1 and 1
    assert (layout.kept, layout.shape, layout.bytes_index) == (4, (2, 3, 2, 2), 4 * (6 + 8) + 6 * 4)
    values = np.array([10, 20, 30, 40], np.float32)
    assert to_c_order(layout, values).tolist() == [10, 40, 20, 30]
    assert from_c_order(layout, to_c_order(layout, values)).tolist() == values.tolist()


@settings(max_examples=60, deadline=None)
@given(masks(), st.integers(1, 8), st.integers(1, 8))
def test_as_loops(mask, in_block, out_block):
    layout = ConvLayout.of(mask, 2, 1, in_block, out_block, dilation=3)
    starts, codes, order, starts_t, codes_t, places = naive(mask, in_block, out_block)
    assert layout.starts.tolist() == starts
    assert layout.codes.tolist() == codes
    assert layout.order().tolist() == order
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


def test_refused():
    dense = np.ones((4, 4, 3, 3), bool)
    for wrong in (dense[0], dense.astype(np.uint8), np.ones((4, 4, 3, 2), bool), np.ones((0, 4, 3, 3), bool)):
        with pytest.raises(SpecError):
            ConvLayout.of(wrong, 1, 1, 4, 4)
    for stride, padding, dilation in ((0, 1, 1), (1, -1, 1), (1, 1, 0)):
        with pytest.raises(SpecError):
            ConvLayout.of(dense, stride, padding, 4, 4, dilation=dilation)
    for in_block, out_block in ((0, 4), (4, -1)):
        with pytest.raises(SpecError):
            ConvLayout.of(dense, 1, 1, in_block, out_block)
    wide = np.zeros((1, 7300, 3, 3), bool)  # 7300 * 9 codes do not fit 16 bits
    with pytest.raises(SpecError, match="7300"):
        ConvLayout.of(wide, 1, 1, 7300, 1)
    assert ConvLayout.of(wide, 1, 1, 7281, 1).kept == 0
    full = np.ones((257, 256, 1, 1), bool)  # 65 792 in one pair of blocks, 65 536 at most
    with pytest.raises(SpecError, match="share"):
        ConvLayout.of(full, 1, 0, 256, 257)
    assert ConvLayout.of(full, 1, 0, 256, 256).kept == full.size


def test_small_scratch():
    mask = np.zeros((512, 512, 3, 3), bool)
    mask.reshape(-1)[::100] = True
    tracemalloc.start()
    layout = ConvLayout.of(mask, 1, 1, 64, 64)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 * layout.kept < mask.nbytes * 2
    assert layout.bytes_index == 6 * layout.kept + 2 * 8 * 513 * 4


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
