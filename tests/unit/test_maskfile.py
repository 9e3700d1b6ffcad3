"""Masks as a blob: what it costs, what it says, and whom it fools."""

from __future__ import annotations

import dataclasses
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.golden.attacks import container
from tests.support.models import linear, small_cnn
from tests.support.orders import some_masks
from wire import coding, zoo
from wire.errors import DigestMismatch, Malformed, MaskUnknown, PeerError, TooLarge, Unsupported
from wire.maskfile import WHOLE, outline_of_model, read_masks, write_masks
from wire.masks import mask_digest, packed, unpacked
from wire.outline import outline_of
from wire.spec import Structure, tensor_shapes
from wire.structure import masked, masks_digest
from wire.tensor import Coding, open_blob, write_blob

SPEC = small_cnn()


@settings(deadline=None, max_examples=40)
@given(st.floats(0, 1), st.integers(0, 5), st.sets(st.sampled_from(["c.weight", "f.weight", "o.weight"]), min_size=1))
def test_masks_come_back(tmp_path_factory, density, seed, names):
    masks = some_masks(SPEC, density, seed, names)
    structure = masked(masks)
    path = tmp_path_factory.mktemp("masks") / "blob"
    ref = write_masks(path, masks)
    assert write_masks(path.with_name("again"), masks) == ref
    held = read_masks(str(path), SPEC, structure)
    assert set(held.masks) == set(masks)
    for name, mask in masks.items():
        found = held.masks[name]
        np.testing.assert_array_equal(unpacked(found), mask)
        assert found.kept == mask.sum()
        assert found.line.tobytes() == packed(mask).line.tobytes()
        assert not found.line.flags.writeable
        assert structure.kept[name] == np.count_nonzero(mask)
    arrays = {name: np.zeros(shape, np.float32) for name, shape in tensor_shapes(SPEC, Structure()).items()}
    assert held.outline == outline_of_model(SPEC, masks) == outline_of(arrays, masks)
    assert held.entries == held.outline.entries


@pytest.mark.parametrize(("density", "encoding"), [(0.3, "bitmap"), (0.05, "gaps"), (0.002, "rice")])
def test_reading_makes_nothing_of_a_byte_per_weight(tmp_path, density, encoding):
    spec = zoo.mlp("wide", (3000,), 10, (500,))
    mask = np.random.default_rng(0).random((500, 3000)) < density
    write_masks(tmp_path / "x", {"fc1.weight": mask})
    with open_blob(tmp_path / "x") as blob:
        assert blob.entry("fc1.weight").encoding == encoding
    structure = masked({"fc1.weight": mask})
    read_masks("", spec, Structure())
    tracemalloc.start()
    held = read_masks(str(tmp_path / "x"), spec, structure)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(unpacked(held.masks["fc1.weight"]), mask)
    assert peak < mask.size  # the bits are an eighth; what was unpacked of the file, and 64 Ki bytes of it as numbers


def test_every_weight_kept_needs_no_file():
    assert read_masks("/nowhere/at/all", SPEC, Structure()) is WHOLE
    assert (dict(WHOLE.masks), WHOLE.outline, WHOLE.entries) == ({}, None, ())
    assert masked({}) == Structure()


def test_the_digest_follows_what_is_kept_and_nothing_else():
    masks = some_masks(SPEC)
    turned = dict(reversed(masks.items()))
    assert masks_digest(turned) == masks_digest(masks)
    other = {**masks, "f.weight": ~masks["f.weight"]}
    fewer = {name: mask for name, mask in masks.items() if name != "o.weight"}
    flat = {**masks, "f.weight": masks["f.weight"].reshape(54, 12)}
    assert len({masks_digest(m) for m in (masks, other, fewer, flat, {})}) == 5
    assert masks_digest({}) == ""


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5])
def test_masks_cost_little_more_than_their_entropy(tmp_path, density):
    spec = zoo.by_name("lenet-300-100")
    masks = some_masks(spec, density)
    ref = write_masks(tmp_path / "x", masks)
    bound = sum(coding.entropy(mask.mean()) * mask.size / 8 for mask in masks.values())
    assert ref.size < 1.06 * bound + 700
    assert read_masks(str(tmp_path / "x"), spec, masked(masks)).masks.keys() == masks.keys()


def test_masks_that_are_not_those_of_the_structure_are_refused(tmp_path):
    masks, other = some_masks(SPEC), some_masks(SPEC, seed=9)
    structure, path = masked(masks), str(tmp_path / "x")
    write_masks(tmp_path / "x", masks)
    with pytest.raises(DigestMismatch, match="structure names"):
        read_masks(path, SPEC, masked(other))
    for kept in ({}, {**structure.kept, "f.weight": 0}, {**structure.kept, "f.bias": 12}):
        with pytest.raises(DigestMismatch, match="do not keep"):
            read_masks(path, SPEC, dataclasses.replace(structure, kept=kept))
    for odd in (Structure(kept=structure.kept), dataclasses.replace(structure, widths={"a": (5,)})):
        with pytest.raises((Malformed, TooLarge)):
            read_masks(path, SPEC, odd)
    for spec in (small_cnn(hidden=13), linear()):
        with pytest.raises(PeerError):
            read_masks(path, spec, structure)
    for nowhere in ("", str(tmp_path / "y"), str(tmp_path / "x" / "y")):
        with pytest.raises(Malformed, match="masks"):
            read_masks(nowhere, SPEC, structure)


def test_a_file_that_is_no_blob_of_masks_is_refused(tmp_path):
    masks = some_masks(SPEC, names=["f.weight"])
    (mask,) = masks.values()
    structure, path = masked(masks), tmp_path / "x"
    ones = {"f.weight": np.ones(np.count_nonzero(mask), np.float32)}

    def refused(error):
        with pytest.raises(error):
            read_masks(str(path), SPEC, structure)
        path.unlink()

    write_blob(path, "update", ones, masks=masks, coding=Coding(form="ones"))
    refused(Malformed)
    write_blob(path, "masks", ones, masks=masks, coding=Coding(known={"f.weight": mask_digest(mask)}))
    refused(MaskUnknown)
    write_blob(path, "masks", ones, coding=Coding(outline=outline_of(ones, {})))
    refused(MaskUnknown)
    write_blob(path, "masks", {"f.weight": mask.astype(np.float32)})
    refused(DigestMismatch)  # as values it says that all is kept
    for data in (b"", b"junk", b"\xdd\0\0\0\1\x80"):
        path.write_bytes(data)
        refused(PeerError)
    head = {"v": 1, "kind": "masks", "meta": {}}
    entry = {"name": "f.weight", "dtype": "float32", "parts": [0], "encoding": "dense", "form": "ones"}
    for shape, error in (([1 << 28], TooLarge), ([12, 54, 1], Malformed), ([54, 12], Malformed), ([1 << 40], TooLarge)):
        count = int(np.prod(shape))
        path.write_bytes(container({**head, "tensors": [{**entry, "shape": shape, "kept": count}]}, [b""]))
        refused(error)
    path.write_bytes(container({**head, "tensors": [{**entry, "shape": [12, 54], "kept": 648, "form": "one"}]}, [b""]))
    refused(Unsupported)


def test_a_bomb_of_ones_costs_its_reader_nothing(tmp_path):
    """A few hundred bytes that stand for 2^28 ones."""
    entry = {"dtype": "float32", "encoding": "dense", "form": "ones", "shape": [1 << 24], "kept": 1 << 24}
    entries = [{**entry, "name": f"t{i}", "parts": [i]} for i in range(16)]
    path = tmp_path / "x"
    path.write_bytes(container({"v": 1, "kind": "masks", "meta": {}, "tensors": entries}, 16 * [b""]))
    structure = masked(some_masks(SPEC))
    tracemalloc.start()
    with pytest.raises(TooLarge):
        read_masks(str(path), SPEC, structure)
    with pytest.raises(TooLarge):
        open_blob(path, elements_max=(1 << 28) - 1)
    with open_blob(path) as blob:  # as much as any blob may be; whoever takes one tensor at a time pays for one
        assert len(blob.names) == 16
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
