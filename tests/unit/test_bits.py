"""Masks as bits: made of bools, of positions and of what came, and taken apart, each against numpy on bools."""

import hashlib

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wire import masks
from wire.errors import Malformed
from wire.masks import all_ones, bits_at, from_bits, mask_digest, packed, positions, unpacked, windows

LENGTHS = [0, 1, 7, 8, 9, 2040, 2041, (1 << 17) - 1, (1 << 17) + 8, 1 << 18, 524_281, 600_000]
DENSITIES = [0.0, 0.00005, 0.01, 0.5, 1.0]


def drawn(size, density):
    return np.random.default_rng(size).random(size) < density


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("size", LENGTHS)
def test_every_way_gives_the_same(size, density):
    mask = drawn(size, density)
    bits = packed(mask)
    assert (bits.shape, bits.size, bits.kept) == ((size,), size, mask.sum())
    assert bits.line.tobytes() == np.packbits(mask, bitorder="little").tobytes()
    assert not bits.line.flags.writeable
    assert np.array_equal(unpacked(bits), mask)
    where = np.flatnonzero(mask)
    for either in (bits, mask):
        assert np.array_equal(positions(either), where)
        assert mask_digest(either) == hashlib.sha256(msgpack.packb([[size], bits.line.tobytes()])).hexdigest()
        assert [start for start, _ in windows(either, 4096)] == list(range(0, size, 4096))
        assert np.array_equal(np.concatenate([np.zeros(0, bool), *(part for _, part in windows(either, 4096))]), mask)
    for runs in ([where], np.array_split(where, 3)):
        made = bits_at(runs, (size,))
        assert (made.shape, made.kept, made.line.tobytes()) == ((size,), bits.kept, bits.line.tobytes())
    read = from_bits(bits.line, (size,), bits.kept, "$")
    assert (read.kept, read.line.tobytes()) == (bits.kept, bits.line.tobytes())


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), max_size=4))
def test_all_ones_of_any_shape(shape):
    bits = all_ones(shape)
    assert np.array_equal(unpacked(bits), np.ones(shape, bool))
    assert (bits.shape, bits.kept) == (tuple(shape), np.ones(shape).size)


@settings(deadline=None)
@given(st.integers(0, 300), st.integers(1, 300), st.floats(0, 1))
def test_rows_and_columns(rows, columns, density):
    mask = (np.random.default_rng(rows).random((rows, columns)) < density)[:, None]
    found = [masks.to_indices(either) for either in (mask, packed(mask))]
    sides = zip(mask[:, 0].shape, np.nonzero(mask[:, 0]), strict=True)
    wanted = tuple(b"" if side <= 1 else index.astype("<u2").tobytes() for side, index in sides)
    assert found[0] == found[1] == wanted


def test_what_came_is_copied_and_checked():
    mask = drawn(100, 0.3)
    line = packed(mask).line.copy()
    bits = from_bits(line, (4, 25), int(mask.sum()), "$")
    line[:] = 0
    assert np.array_equal(unpacked(bits), mask.reshape(4, 25))
    good = packed(mask)
    padded = good.line.copy()
    padded[-1] |= 128  # bit 103 of 100, in the count as well
    for wrong, kept, what in (
        (good.line[:-1], good.kept, "12 bytes"),
        (good.line, good.kept + 1, f"{good.kept} ones"),
        (padded, good.kept + 1, "padding"),
    ):
        with pytest.raises(Malformed, match=what):
            from_bits(wrong, (100,), kept, "$")
