"""Blob files and masks: every encoding, exact costs, views; see test_conformance for golden bytes and attacks."""

from __future__ import annotations

import hashlib
import tracemalloc
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.golden.attacks import container
from wire import layout, masks, tensor
from wire.coding import plain_cost
from wire.errors import DigestMismatch, Malformed, MaskUnknown, NonFinite, StoreError, TooLarge, Unsupported
from wire.tensor import Coding, open_blob, write_blob

SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=7)
DTYPES = st.sampled_from(sorted(tensor.DTYPES))


def encoding_of(path, name="w"):
    with open_blob(path) as blob:
        return blob.entry(name).encoding


@settings(deadline=None)
@given(
    st.dictionaries(
        st.from_regex(r"[A-Za-z0-9_./:-]{1,128}", fullmatch=True),
        DTYPES.flatmap(lambda d: hnp.arrays(d, SHAPES)),
        max_size=5,
    )
)
def test_any_dense_tensors_come_back_bit_by_bit(tmp_path_factory, arrays):
    path = tmp_path_factory.getbasetemp() / "dense.blob"
    ref = write_blob(path, "update", arrays, meta={"round": 3})
    data = path.read_bytes()
    assert (ref.digest, ref.size) == (hashlib.sha256(data).hexdigest(), len(data))
    with open_blob(path) as blob:
        assert (blob.kind, blob.meta, blob.names) == ("update", {"round": 3}, tuple(arrays))
        for name, array in arrays.items():
            found = blob.tensor(name)
            assert (found.dtype, found.shape) == (array.dtype, array.shape)
            assert found.tobytes() == array.tobytes()
            assert not found.flags.writeable


@settings(deadline=None)
@given(st.data(), SHAPES, DTYPES, st.booleans())
def test_any_mask_comes_back(tmp_path_factory, data, shape, dtype, known):
    path = tmp_path_factory.getbasetemp() / "sparse.blob"
    array = data.draw(hnp.arrays(dtype, shape))
    mask = data.draw(hnp.arrays(np.bool_, shape, elements=st.sampled_from([False, False, True])))
    digest = {"w": masks.mask_digest(mask)} if known else {}
    write_blob(path, "update", {"w": array}, masks={"w": mask}, coding=Coding(known=digest))
    wanted = np.where(mask, array, array.dtype.type(0))
    with open_blob(path) as blob:
        found = blob.tensor("w", mask)
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert found.tobytes() == wanted.tobytes()
        where, values = blob.sparse("w", mask)
        whole = np.zeros(prod(shape), array.dtype)
        whole[where] = values
        assert whole.tobytes() == wanted.tobytes()
        entry = blob.entry("w")
        if entry.encoding != "dense":
            assert entry.kept == np.count_nonzero(mask), "masks drive the format, values never do"
            assert where.tolist() == np.flatnonzero(mask).tolist()


@settings(deadline=None)
@given(
    hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=40), st.integers(0, 40), st.sampled_from([1, 4, 8])
)
def test_costs_are_what_is_written_and_the_cheapest_is_chosen(tmp_path_factory, shape, kept, itemsize):
    dtype = {1: np.uint8, 4: np.float32, 8: np.float64}[itemsize]
    mask = np.zeros(prod(shape), np.bool_)
    mask[:kept] = True
    mask = mask.reshape(shape)
    kept = int(mask.sum())
    path = tmp_path_factory.getbasetemp() / "cost.blob"
    least = min(plain_cost(option, shape, kept, itemsize) for option in ("dense", "bitmap", "index"))
    write_blob(path, "update", {"w": np.ones(shape, dtype)}, masks={"w": mask}, coding=Coding(pack=False))
    with open_blob(path) as blob:
        entry = blob.entry("w")
    spent = sum(length for _, length in layout_of(path))
    assert spent == plain_cost(entry.encoding, shape, kept, itemsize) == least
    write_blob(path, "update", {"w": np.ones(shape, dtype)}, masks={"w": mask})
    assert sum(length for _, length in layout_of(path)) <= least


def layout_of(path):
    import mmap

    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        _, start = layout.read_header(view)
        return layout.find_bodies(view, start)


def test_encodings_cross_where_the_paper_says():
    # PruneFL section 5: ratio to dense is min(1, d + 1/32, 2 d); bitmap and index cross at 1/32, dense at 31/32.
    n = (64, 64)
    for kept in range(0, 4097, 8):
        ratio = min(plain_cost(option, n, kept, 4) for option in ("dense", "bitmap", "index")) / (4096 * 4)
        assert ratio == min(1, kept / 4096 + 1 / 32, 2 * kept / 4096)


@pytest.mark.parametrize(("kept", "encoding"), [(127, "index"), (128, "bitmap"), (3967, "bitmap"), (3968, "dense")])
def test_the_papers_encodings_are_chosen_where_they_cross(tmp_path, kept, encoding):
    mask = np.zeros(4096, np.bool_)
    mask[:kept] = True
    mask = mask.reshape(64, 64)
    plain = Coding(pack=False)
    write_blob(tmp_path / "x", "update", {"w": np.ones((64, 64), np.float32)}, masks={"w": mask}, coding=plain)
    assert encoding_of(tmp_path / "x") == encoding


def test_index_types_grow_with_the_sides():
    assert plain_cost("index", (1, 1), 1, 4) == 4
    assert plain_cost("index", (9,), 1, 4) == 6
    assert plain_cost("index", (65_536, 65_536), 1, 4) == 8
    assert plain_cost("index", (65_537, 2), 1, 4) == 10
    assert plain_cost("index", (2, 3, 40_000), 1, 4) == 10


def test_a_kept_zero_is_kept_and_a_lost_value_is_lost(tmp_path):
    array = np.array([[0.0, 2.0, 3.0, 4.0] * 3], np.float32)
    mask = np.zeros((1, 12), np.bool_)
    mask[0, [0, 2]] = True
    write_blob(tmp_path / "x", "update", {"w": array}, masks={"w": mask})
    with open_blob(tmp_path / "x") as blob:
        where, values = blob.sparse("w")
        assert (where.tolist(), values.tolist()) == ([0, 2], [0.0, 3.0])
        assert blob.tensor("w").tolist() == [[0.0, 0, 3.0] + 9 * [0.0]]


def test_dense_tensors_are_views_of_the_file_and_outlive_it(tmp_path):
    array = np.arange(2_000_000, dtype=np.float32)
    write_blob(tmp_path / "x", "update", {"w": array})
    tracemalloc.start()
    with open_blob(tmp_path / "x") as blob:
        view = blob.tensor("w")
        assert view.ctypes.data % layout.ALIGNMENT == 0
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000
    assert view[-1] == array[-1]


def test_writing_holds_no_second_copy(tmp_path):
    array = np.arange(2_000_000, dtype=np.float32)
    tracemalloc.start()
    write_blob(tmp_path / "x", "update", {"w": array, "v": array})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_strided_and_big_endian_arrays_are_written_as_what_they_are(tmp_path):
    array = np.arange(12, dtype=">f4").reshape(3, 4).T
    write_blob(tmp_path / "x", "update", {"w": array, "v": array[::2, ::-1]})
    with open_blob(tmp_path / "x") as blob:
        np.testing.assert_array_equal(blob.tensor("w"), array)
        np.testing.assert_array_equal(blob.tensor("v"), array[::2, ::-1])
        assert blob.tensor("w").dtype == np.dtype("<f4")


def test_the_same_input_gives_the_same_bytes(tmp_path):
    arrays = {"b": np.ones(3, np.float32), "a": np.zeros(2, np.uint8)}
    first = write_blob(tmp_path / "x", "state", arrays, meta={"z": 1, "a": [1.5, None, "t", b"b", {"n": True}]})
    assert write_blob(tmp_path / "y", "state", arrays, meta={"z": 1, "a": [1.5, None, "t", b"b", {"n": True}]}) == first


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_found_wherever_it_is(tmp_path, bad):
    array = np.zeros((3, 70_000), np.float32)
    array[2, 69_999] = bad
    mask = np.zeros(array.shape, np.bool_)
    mask[2, 69_990:] = True
    for given_masks in (None, {"w": mask}):
        write_blob(tmp_path / "x", "update", {"i": np.ones(3, np.int64), "w": array}, masks=given_masks)
        with open_blob(tmp_path / "x") as blob, pytest.raises(NonFinite, match="'w'"):
            blob.require_finite()
    array[2, 69_999] = np.finfo(np.float32).max
    write_blob(tmp_path / "x", "update", {"w": array})
    with open_blob(tmp_path / "x") as blob:
        blob.require_finite()


def test_values_need_their_mask(tmp_path):
    mask = np.eye(4, dtype=np.bool_)
    digest = masks.mask_digest(mask)
    array = np.ones((4, 4), np.float32)
    write_blob(tmp_path / "x", "update", {"w": array}, masks={"w": mask}, coding=Coding(known={"w": digest}))
    with open_blob(tmp_path / "x") as blob:
        with pytest.raises(MaskUnknown, match=digest):
            blob.tensor("w")
        with pytest.raises(DigestMismatch, match=digest):
            blob.tensor("w", ~mask)
        with pytest.raises(DigestMismatch):
            blob.tensor("w", mask.reshape(2, 8))
        np.testing.assert_array_equal(blob.tensor("w", mask), mask.astype(np.float32))
    assert masks.mask_digest(mask) != masks.mask_digest(mask.reshape(16))


def test_writers_are_held_to_the_same_rules(tmp_path):
    path, ones, mask = tmp_path / "x", np.ones((2, 2), np.float32), np.ones((2, 2), np.bool_)
    with pytest.raises(Unsupported, match="float16"):
        write_blob(path, "update", {"w": ones.astype(np.float16)})
    with pytest.raises(Malformed, match="the mask of tensor 'w'"):
        write_blob(path, "update", {"w": ones}, masks={"w": mask[:1]})
    with pytest.raises(Malformed, match="not the mask"):
        write_blob(path, "update", {"w": ones}, coding=Coding(known={"w": "ab" * 32}))
    with pytest.raises(DigestMismatch):
        write_blob(path, "update", {"w": ones}, masks={"w": mask}, coding=Coding(known={"w": "ab" * 32}))
    with pytest.raises(TooLarge, match="header"):
        write_blob(path, "update", {"w": ones}, meta={"x": bytes(layout.HEADER_BYTES)})
    with pytest.raises(StoreError):
        write_blob(tmp_path / "no" / "x", "update", {"w": ones})


def test_files_that_are_no_blobs(tmp_path):
    with pytest.raises(StoreError):
        open_blob(tmp_path / "nobody")
    with pytest.raises(StoreError):
        open_blob(tmp_path)
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(Malformed, match="empty"):
        open_blob(tmp_path / "x")
    write_blob(tmp_path / "y", "update", {"w": np.ones(1, np.float32)})
    with open_blob(tmp_path / "y") as blob, pytest.raises(Malformed, match="no tensor 'v'"):
        blob.tensor("v")


def test_a_header_beyond_the_limit_is_refused_while_it_is_read(tmp_path):
    head = {"v": 1, "kind": "x", "meta": {"x": bytes(layout.HEADER_BYTES)}, "tensors": []}
    (tmp_path / "x").write_bytes(container(head, []))
    with pytest.raises(TooLarge, match="header"):
        open_blob(tmp_path / "x")


def test_a_small_file_cannot_make_its_reader_allocate_much(tmp_path):
    entry = {"name": "w", "dtype": "float64", "shape": [1 << 20], "encoding": "bitmap", "parts": [0, 1], "kept": 0}
    (tmp_path / "x").write_bytes(
        container({"v": 1, "kind": "x", "meta": {}, "tensors": [entry]}, [bytes(1 << 17), b""])
    )
    with pytest.raises(TooLarge, match="the limit is 1000"):
        open_blob(tmp_path / "x", elements_max=1000)
    many = [
        {**entry, "name": f"w{i}", "shape": [1 << 27], "encoding": "index", "parts": [3 * i, 3 * i + 1, 3 * i + 2]}
        for i in range(3)
    ]
    (tmp_path / "x").write_bytes(container({"v": 1, "kind": "x", "meta": {}, "tensors": many}, [b""] * 9))
    tracemalloc.start()
    with pytest.raises(TooLarge, match="sparse"):
        open_blob(tmp_path / "x")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_encoding_is_seen_without_touching_values(tmp_path):
    mask = np.zeros((40, 40), np.bool_)
    mask[3, 4] = True
    write_blob(tmp_path / "x", "update", {"w": np.ones((40, 40), np.float32)}, masks={"w": mask})
    assert encoding_of(tmp_path / "x") == "gaps"
    assert (tmp_path / "x").stat().st_size < 500
